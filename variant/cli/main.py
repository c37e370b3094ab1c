"""The command line ``variant``: generate, plan, train, train-vae, bench, convert, info.

The module of a command is imported when it runs, so that ``--help`` starts without torch.
"""

from __future__ import annotations

import sys
import traceback

from variant.cli.options import (
    Bench,
    Command,
    Convert,
    Generate,
    Info,
    Plan,
    Train,
    TrainVae,
)
from variant.errors import UserError
from variant_kernels import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 for an error, printed as one line (with ``--debug``: its traceback too); 130 after
        Ctrl-C. Wrong usage exits with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        print(f"variant {__version__}")
        return 0
    # Imported here: on machines without tyro, benchmarks.gpu_engine calls the commands' functions.
    import tyro

    debug = "--debug" in words
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="variant",
        description="Visual autoregressive models at any depth. --version prints the version, "
        "--debug shows tracebacks.",
        args=[word for word in words if word != "--debug"],
    )
    try:
        run(command)
    except KeyboardInterrupt as stop:
        print(f"variant: stopped. {stop}".rstrip(), file=sys.stderr)
        return 130
    except Exception as error:
        # Unexpected errors are printed as one line too; --debug shows the traceback.
        if debug:
            traceback.print_exc()
        print(f"variant: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def run(command: Command) -> None:
    """Run the function of a command."""
    match command:
        case Generate():
            from variant.cli.generate import generate

            generate(command)
        case Plan():
            from variant.cli.plan import plan

            plan(command)
        case Train():
            from variant.cli.train import train

            train(command)
        case TrainVae():
            from variant.cli.train import train_vae

            train_vae(command)
        case Bench():
            from variant.cli.bench import bench

            bench(command)
        case Convert():
            from variant.cli.convert import convert

            convert(command)
        case Info():
            from variant.cli.info import info

            info(command)


def one_line(error: Exception) -> str:
    """The message of an error that is meant for users; of any other error its type too."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | ValueError | MemoryError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
