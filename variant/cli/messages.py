"""Errors and warnings of the command line: one line each, in the words of the command line."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, TextIO, get_args

from variant.cli.options import Command
from variant.errors import UserError
from variant.paths import printable

# Of torch's allocator and of oneDNN, which raise a plain RuntimeError.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
)
# What a write ends in. Python names no file then; ours are written through ``variant.files``.
WRITE_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT}
MAX_CHARACTERS = 2000
QUOTES = "'\""
# An argument of Python with its value, and classes of the Python API in front of a message.
KEYWORD = re.compile(
    r"(?<![\w.=/-])([a-z]\w*)=(True|False|None|torch\.\w+|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|'\w+'|\"\w+\")(?![\w/=-])"
)
TYPES = re.compile(r" \((?:bool|float|int|list|str|tuple)\)(?=[.;]|$)")
# The remedy of Python for a depth that is not trained.
UNTRAINED = re.compile(r"\. A list of layers, such as \[[\d, ]*\], runs untrained")
CLASSES = re.compile(r"^(?:Engine|Sampling|VARiant|VAR|VQVAE)(?:\.\w+)?: ")


def one_line(error: Exception, command: str) -> str:
    """The message of an error that is meant for users; of any other error its type too.

    Args:
        command: e.g. "generate". An argument named in the message becomes that command's option.
    """
    text = plain(str(error))
    if isinstance(error, OSError) and error.strerror:
        return f"{_place_of(error, command)}: {plain(error.strerror)}"
    if is_unnamed_memory(error):
        return f"{command}: this machine has too little memory for it"
    if isinstance(error, UserError | ValueError | MemoryError) and text:
        return in_words(text, command)
    return f"{type(error).__name__}: {text} (--debug shows where)"


def is_unnamed_memory(error: Exception) -> bool:
    """Whether memory was refused by Python or torch, which do not say for what."""
    text = str(error)
    return (isinstance(error, MemoryError) and not text) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)
    )


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Within the block, an error of memory says for what it was asked.

    Raises:
        MemoryError: the block raised one, or torch's error of it, without such words.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which is imported late
        if not on_gpu and not is_unnamed_memory(error):
            raise
        where = "the GPU" if on_gpu else "this machine"
        raise MemoryError(f"{what}: {where} has too little memory for it; {remedy}") from error


def _place_of(error: OSError, command: str) -> str:
    """The file that an error of the system is about; else what else it can be about."""
    if error.filename:
        return plain(str(error.filename))
    if error.errno in WRITE_ERRORS:
        return "standard output"
    # Of all calls without a name, os.getcwd alone finds no file: its folder was removed.
    return "the current folder" if error.errno == errno.ENOENT else command


def in_words(text: str, command: str) -> str:
    """A message of the Python API in the words of a command.

    ``select_layers: depth must ...`` is ``generate: --depth must ...`` if the command has --depth,
    ``top_k=1`` is ``--top-k 1``, and ``'foo' (str)`` is ``'foo'``.
    """
    own = _options(command)
    text = _backend_in_options(text, command, own)
    text = _argument_as_option(text, command, own)
    text = CLASSES.sub(f"{command}: ", text)
    text = re.sub(r"(?<=[ (])strict=False (?=leaves)", "in Python, strict=False ", text)
    return KEYWORD.sub(lambda match: _keyword_as_option(match, own), text)


def _argument_as_option(text: str, command: str, own: dict[str, object]) -> str:
    # The prefix is a function or a method; in `r.toml: seed must ...` it is a file.
    prefix = r"(?:\S+: load_recipe: |(?:(?:[A-Z]\w*\.)?[\w-]+: )?)"
    match = re.match(prefix + r"(?:--)?([\w-]+) (?=must )", text)
    argument = match[1].replace("-", "_") if match else ""
    names = argument, f"{argument}s"
    name = next((name for name in names if name in own), None)
    if match is None or name is None:
        return text
    rest = text[match.end() :]
    if name in ("depth", "depths"):  # which take no list of layers here
        schedule = next((option for option in ("schedule", "schedules") if option in own), None)
        remedy = f"; a file as --{schedule} runs other layers untrained" if schedule else ""
        rest = rest.replace(", or a list of layers", "")
        rest = UNTRAINED.sub(remedy, rest)
    expected, got, value = rest.partition("; got ")
    value = TYPES.sub("", value)  # which the command line does not choose
    if re.fullmatch(r"\(-?[\d.]+(?:, -?[\d.]+)*,?\)", value):
        value = value.strip("(),").replace(",", "")
    if expected.startswith("must be one of "):
        expected = expected.replace("'", "")
    return f"{command}: {_option(name)} {expected}{got}{value}"


def _backend_in_options(text: str, command: str, own: dict[str, object]) -> str:
    """Where a backend that was asked for cannot run an op: what asked for it, and a remedy."""
    match = re.fullmatch(
        r'(\w+): backend "(\w+)" cannot run this call: (.*)\. Use backend="auto"', text
    )
    if match is None:
        return text
    op, backend, reason = match.groups()
    if os.environ.get("VARIANT_BACKEND") == backend:
        asked, remedy = f"VARIANT_BACKEND={backend}", "Unset VARIANT_BACKEND"
    elif "backend" in own:
        asked, remedy = f"--backend {backend}", "Give --backend auto"
    else:
        return text
    return f"{command}: {asked} cannot run {op}: {reason}. {remedy}"


def _keyword_as_option(match: re.Match[str], own: dict[str, object]) -> str:
    name, value = match.groups()
    if name not in own:
        return match[0]
    if value in ("True", "False") and own[name] in (bool, "bool"):  # a switch
        return _option(name) if value == "True" else f"--no-{_option(name)[2:]}"
    if value == "None":
        return f"no {_option(name)}"
    return f"{_option(name)} {value.removeprefix('torch.').strip(QUOTES)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options(command: str) -> dict[str, object]:
    """Names of the fields of a command, and the type of each."""
    name = command.replace("-", "")
    kinds = [kind for kind in get_args(Command) if kind.__name__.lower() == name]
    return {option.name: option.type for kind in kinds for option in fields(kind)}


def plain(text: str) -> str:
    """One line without control characters; the middle of a very long text is left out."""
    text = printable(" ".join(text.split()))
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text


@contextmanager
def one_line_warnings(command: str = "") -> Iterator[None]:
    """Within the block a warning, of ours or of a library, is one line on standard error.

    Args:
        command: as in :func:`one_line`.
    """
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> Any:
        with suppress(OSError):
            text = in_words(plain(str(message)), command)
            print(f"variant: warning: {text}", file=file or sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
