"""The command line ``variant``: generate, plan, train, train-vae, recipe, bench, convert,
info, tokenize, sample, eval, search, warm.

The module of a command is imported when it runs, so that ``--help`` starts without torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from variant.cli import signals
from variant.cli.announce import announce
from variant.cli.messages import one_line, plain
from variant.cli.options import (
    Bench,
    Command,
    Convert,
    Eval,
    Generate,
    Info,
    Plan,
    Recipe,
    Sample,
    Search,
    Tokenize,
    Train,
    TrainVae,
    Warm,
)
from variant.cli.words import UsageError, check_words
from variant.errors import UserError
from variant_kernels import __version__


def main(
    arguments: list[str] | None = None, *, before_work: Callable[[], None] = lambda: None
) -> int:
    """Run one command.

    Args:
        arguments: None takes those of the process.
        before_work: called after the command's modules are imported.
    Returns:
        0; 1 for an error, printed as one line (with ``--debug``: its traceback too); 2 for wrong
        usage, one line too; 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        if words in (["--version"], ["-V"]):
            print(f"variant {__version__}")
            return 0
        words = check_words(words)
        # Imported here: on machines without tyro, benchmarks.gpu_engine calls the commands'
        # functions.
        from variant.cli.parser import parse

        command = parse(words)
        _check_current_folder()
        announce(command)
        function = function_of(command)
        before_work()
        function(command)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except UsageError as error:
        _print_error(str(error))
        return 2
    except Exception as error:
        if signals.received():  # a library turned the signal's exception into its own
            return _stopped(KeyboardInterrupt())
        # Unexpected errors are printed as one line too; --debug shows the traceback.
        if debug:
            traceback.print_exc()
        _print_error(one_line(error, words[0] if words else ""))
        return 1
    return 0


def function_of(command: Command) -> Callable[[Any], None]:
    """The function of a command, imported now."""
    match command:
        case Generate():
            from variant.cli.generate import generate

            return generate
        case Plan():
            from variant.cli.plan import plan

            return plan
        case Train():
            from variant.cli.train import train

            return train
        case TrainVae():
            from variant.cli.train import train_vae

            return train_vae
        case Recipe():
            from variant.cli.recipe import recipe

            return recipe
        case Tokenize():
            from variant.cli.tokenize import tokenize

            return tokenize
        case Bench():
            from variant.cli.bench import bench

            return bench
        case Convert():
            from variant.cli.convert import convert

            return convert
        case Sample():
            from variant.cli.sample import sample_command

            return sample_command
        case Eval():
            from variant.cli.evaluate import evaluate_command

            return evaluate_command
        case Search():
            from variant.cli.search import search_command

            return search_command
        case Info():
            from variant.cli.info import info

            return info
        case Warm():
            from variant.cli.warm import warm

            return warm


def _check_current_folder() -> None:
    """Raises: UserError, if it was removed: torch's library of products would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed; change to another one") from None


def _stopped(stop: KeyboardInterrupt) -> int:
    _print(f"variant: stopped. {stop}".rstrip())
    return signals.exit_code(signals.received() or signals.signum_of(stop))


def _print_error(text: str) -> None:
    # Wrong usage quotes the words of the command line, line breaks included.
    _print(f"variant: error: {plain(text)}")


def _print(line: str) -> None:
    # Standard error may be closed, or its disk full: the exit code has to do.
    with suppress(OSError):
        print(line, file=sys.stderr)
