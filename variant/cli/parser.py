"""The command line of the dataclasses in ``options.py``, by tyro."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import MISSING, fields, replace
from typing import Annotated, get_args, get_origin, get_type_hints

import tyro

from variant.cli.options import Command, Convert, Recipe
from variant.cli.words import UsageError
from variant.training.overrides import split_overrides

DESCRIPTION = """Visual autoregressive models at any depth.

--version prints the version. `variant COMMAND --help` lists the options of a command.

Tab completion: variant --tyro-print-completion bash (or zsh, tcsh) prints a script."""
# Wide enough that no message is wrapped.
ERROR_COLUMNS = "100000"
# Of help in a narrower terminal: below, tyro writes a letter a line; at 5 it does not end.
HELP_COLUMNS = 60
# Options that are given by their place, besides those without a default.
POSITIONAL = {Recipe: ("recipe",), Convert: ("checkpoint",)}
KINDS = {"INT": "an integer", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}


def parse(words: Sequence[str]) -> Command:
    """The command of these words.

    Raises:
        UsageError: they make no command.
        SystemExit: 0, after help or a completion script was printed.
    """
    _annotate()
    words, overrides = _overrides(words)
    names = ", ".join(_command_names())
    if words[0].startswith("-") and not words[0].startswith(("-h", "--help", "--tyro-")):
        raise UsageError(f"the command comes before {shorten(words[0])}; commands: {names}")
    if not words[0].startswith("-") and words[0] not in _command_names():
        raise UsageError(f"{shorten(words[0])}: no such command; commands: {names}")
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in words):
        try:
            columns = max(shutil.get_terminal_size().columns, HELP_COLUMNS)
            with _columns(str(columns)), redirect_stderr(io.StringIO()):
                return _cli(words)
        except SystemExit as stop:
            if not stop.code:
                raise  # the help was printed; wrong usage is told below, on one line
        except AssertionError:
            if not words[0].startswith("--tyro-"):  # which refuses other shells by one
                raise
            raise UsageError(f"{words[0]} must be one of bash, zsh, tcsh, fish") from None
    _check_values(words)
    words = [_expanded(word) for word in words]
    errors = io.StringIO()
    try:
        with _columns(ERROR_COLUMNS), redirect_stderr(errors):
            command = _cli(words)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(errors.getvalue(), words)) from None
    return replace(command, overrides=tuple(overrides)) if overrides else command


def _check_values(words: Sequence[str]) -> None:
    """Options with a list of values have one, and switches have none.

    Raises:
        UsageError: one of them is otherwise.
    """
    kind = _kind_of(words[0])
    if kind is None:
        return
    hints, defaults = get_type_hints(kind), {option.name: option.default for option in fields(kind)}
    takes_places = kind in POSITIONAL or MISSING in defaults.values()
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        hint = hints.get(name.removeprefix("no_") if name not in hints else name)
        if not option.startswith("--") or hint is None:
            continue
        has_value = bool(equals) or not (following.startswith("--") or takes_places)
        is_list = any(get_origin(part) is tuple for part in (hint, *get_args(hint)))
        if is_list and not equals and following.startswith("--"):
            raise UsageError(f"{words[0]}: {option} needs a value; see variant {words[0]} --help")
        if hint is bool and has_value:
            got = shorten(value if equals else following)
            raise UsageError(f"{words[0]}: {option} takes no value; got {got}")


def _expanded(word: str) -> str:
    """With the home folder in place of ~/: shells leave it in ``--out=~/images``.

    Of words, not of paths: a folder named ~ is given as ./~/images, of which a path is ~/images.
    """
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~/") else word


def _overrides(words: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """The words without values for single keys of a recipe, and those values."""
    kind = _kind_of(words[0])
    if kind is None or "overrides" not in {option.name for option in fields(kind)}:
        return words, []
    try:
        return split_overrides(words)
    except ValueError as error:
        raise UsageError(f"{words[0]}: {error}; see variant {words[0]} --help") from None


def _cli(words: Sequence[str]) -> Command:
    return tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="variant",
        description=DESCRIPTION,
        args=list(words),
        config=(tyro.conf.DisallowNone,),
    )


def _annotate() -> None:
    """Tell tyro how the options look in the help.

    Here and not in ``options.py``, which must be importable without tyro.
    """
    for kind in get_args(Command):
        if hasattr(kind, "__tyro__"):
            continue
        defaults = {option.name: option.default for option in fields(kind)}
        for name, annotation in get_type_hints(kind).items():
            hint = tyro.conf.arg(
                help_behavior_hint=_default_text, metavar=_metavar_of_list(annotation)
            )
            if name == "overrides":  # given as --SECTION.KEY VALUE, see variant.training.overrides
                annotation = tyro.conf.Suppress[annotation]
            elif defaults[name] is MISSING or name in POSITIONAL.get(kind, ()):
                annotation = tyro.conf.Positional[annotation]
            elif defaults[name] is False:  # --debug, without --no-debug
                annotation = tyro.conf.FlagCreatePairsOff[annotation]
            elif bool in get_args(annotation):  # --using-znorm True, not given by default
                annotation = tyro.conf.FlagConversionOff[annotation]
            kind.__annotations__[name] = Annotated[annotation, hint]
        kind.__tyro__ = True


def _metavar_of_list(annotation: object) -> str | None:
    """Of a list that may be missing, without tyro's braces; None leaves others to tyro."""
    kinds = [get_args(part)[0] for part in get_args(annotation) if get_origin(part) is tuple]
    return f"[{(name := kinds[0].__name__.upper())} [{name} ...]]" if kinds else None


def _default_text(default: str) -> str:
    """Nothing for a default that the text of the option describes in words."""
    return "" if default in ("", "''", "None", "False") else f"(default: {default})"


@contextmanager
def _columns(width: str) -> Iterator[None]:
    """The width of the terminal, as libraries see it, within the block."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str, words: Sequence[str]) -> str:
    """tyro's box around an error as one line: its first section, a proposal, where help is."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first is the title
        text = line.strip(" │╭╮╰╯")
        if set(text) <= {"─", "-"}:
            sections.append([])
        else:
            sections[-1].append(text)
    sections = [section for section in sections if section]
    if not sections:
        return " ".join(box.split()) or "wrong usage; see variant --help"
    message = _problem(sections, words)
    # tyro proposes the options of every command.
    kind = _kind_of(words[0])
    own = {option.name.replace("_", "-") for option in fields(kind)} if kind else set()
    proposals = [
        match[0]
        for section in sections[1:]
        if section[0].startswith("Perhaps you meant")
        for line in section
        if (match := re.match(r"--(?:no-)?([\w-]+)", line))
        and match[0] not in words
        and match[1] in own
    ]
    if proposals:
        message += f"; perhaps you meant {' or '.join(dict.fromkeys(proposals))}"
    return f"{words[0]}: {message}; see variant {words[0]} --help"


def _problem(sections: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """What is wrong, in the words of other errors where the option and its type are known."""
    text = " ".join(part for part in sections[0] if part)
    if text.startswith("Unrecognized or misplaced"):
        given = re.findall(r"(\S.*?) \(applied to variant [\w-]+\)", text.partition(": ")[2])
        return f"unrecognized options: {', '.join(map(shorten, given))}"
    parsing = re.match(r"Error parsing (--[\w-]+)", text)
    usage = [line for section in sections[1:] for line in section if line.startswith("--")]
    if parsing and usage:
        _, _, metavar = usage[0].partition(" ")
        return f"{parsing[1]} must be {_kind(metavar)}; got {_got(parsing[1], words)}"
    place = re.match(r"invalid choice '(.*)' for argument '\w+'. Expected one of \((.*)\)", text)
    if place:
        names = ", ".join(re.findall(r"'([^']*)'", place[2]))
        return f"needs one of {names}; got {shorten(place[1])}"
    choice = re.match(r"invalid choice .* for argument '(--[\w-]+)'. Expected one of (.*)", text)
    if choice:
        names = [name for name in re.findall(r"'([^']*)'", choice[2]) if name != "None"]
        return (
            f"{choice[1]} must be one of {', '.join(sorted(names))}; got {_got(choice[1], words)}"
        )
    place = re.match(r"Missing from variant .*?\{([\w,-]+)\}", text)
    if place:
        return f"needs one of {', '.join(place[1].split(','))}"
    missing = re.match(r"Missing value for argument '(--[\w-]+)'", text)
    if missing:
        return f"{missing[1]} needs a value"
    return text[0].lower() + text[1:].rstrip(".")


def _kind(metavar: str) -> str:
    several = re.match(r"\{?\[(\w+) \[", metavar)
    if several:
        kind = KINDS.get(several[1], several[1])
        return f"{kind.split()[-1]}s"
    if metavar.startswith("{"):
        return "one of " + ", ".join(metavar.strip("{}").split(","))
    return KINDS.get(metavar, metavar)


def _got(option: str, words: Sequence[str]) -> str:
    """The values that follow an option."""
    values: list[str] = []
    found = False
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            found = True
            values += [value] if equals else []
        elif found and word.startswith("--"):
            break
        elif found:
            values.append(word)
    return shorten(" ".join(values)) or "nothing"


def shorten(text: str, length: int = 200) -> str:
    """The text, its middle left out if it is long."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def _kind_of(word: str) -> type | None:
    """The options of a command."""
    return next((kind for kind in get_args(Command) if _command_name(kind) == word), None)


def _command_names() -> tuple[str, ...]:
    return tuple(map(_command_name, get_args(Command)))


def _command_name(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower()
