"""The first line of a command: what it is about to do, before torch is imported."""

from __future__ import annotations

from pathlib import Path

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
from variant.cli.output import STANDARD_OUTPUT, console
from variant_kernels.wording import counted


def announce(command: Command) -> None:
    """Print the first line, on standard error if standard output is for the result alone.

    ``variant plan`` has its table as fast.
    """
    text = first_line(command)
    if text:
        name, target = text.partition(":")[0], getattr(command, "json", None)
        if _prints_its_result_alone(command):
            target = STANDARD_OUTPUT
        console(target, stderr=True, command=name).print(text)


def _prints_its_result_alone(command: Command) -> bool:
    """Whether standard output is for a file's text, or for a comparison."""
    match command:
        case Recipe():
            return command.action == "show" or (command.action == "new" and command.out is None)
        case Eval():
            return bool(command.compare)
    return False


def first_line(command: Command) -> str:
    """What the command is about to do; empty for a command that needs no such line."""
    match command:
        case Generate():
            depth = "every depth" if command.all_depths else _layers(command)
            return (
                f"generate: {command.model}, {depth}, {command.dtype or 'dtype of the weights'}, "
                f"{command.device}, to {command.out}"
            )
        case Bench():
            return (
                f"bench: {command.model}, batch {_list(command.batch)}, {_list(command.dtype)}, "
                f"{command.device}, {counted(command.runs, 'round')}"
            )
        case Train() | TrainVae():
            name = "train" if isinstance(command, Train) else "train-vae"
            out = command.out or Path("runs") / Path(command.recipe).stem
            return f"{name}: recipe {command.recipe}, to {out}"
        case Tokenize():
            out = command.out or Path("runs") / Path(command.recipe).stem / "tokens"
            return f"tokenize: recipe {command.recipe}, passes {command.passes}, to {out}"
        case Convert():
            inputs = command.checkpoint, command.model, command.var, command.vae
            names = [str(name) for name in inputs if name]
            return f"convert: reading {' and '.join(names)}" if names else ""
        case Sample():
            return (
                f"sample: {command.model}, {_layers(command)}, {command.device}, to {command.out}"
            )
        case Eval():
            source = command.images or command.model or command.reconstruct
            if command.compare:
                return f"eval: comparing {' and '.join(map(str, command.compare))}"
            if source is None or command.reference is None:
                return ""
            return (
                f"eval: {source} against {command.reference}, features of {command.features}, "
                f"{command.device}"
            )
        case Search():
            budget = ", ".join(command.budget)
            return f"search: {command.model}, {budget}, {command.device}, to {command.out}"
        case Info():
            return f"info: reading {command.model}"
        case Recipe():
            if command.action == "new":
                to = f", to {command.out}" if command.out is not None else ""
                return f"recipe: reading {command.data}{to}" if command.data is not None else ""
            doing = {"show": "reading", "check": "checking"}[command.action]
            return f"recipe: {doing} {command.recipe}" if command.recipe else ""
        case Warm():
            depths = _list(command.depths) or "every depth"
            return (
                f"warm: {command.model}, batch {_list(command.batch)}, {depths}, "
                f"{command.dtype or 'dtype of the weights'}, {command.device}"
            )
        case Plan():
            return ""


def _layers(command: Generate | Sample) -> str:
    if command.schedule is not None:
        return f"schedule {command.schedule}"
    return "full depth" if command.depth is None else f"depth {command.depth}"


def _list(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
