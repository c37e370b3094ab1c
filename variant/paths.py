"""Paths that users give: looked at before anything is read. Imports no torch.

A named pipe or a device under the name of a file would be read without end; :func:`open_regular` is
the one place that opens a file for reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Literal, cast

from variant.errors import UserError

MAX_TEXT_BYTES = 2**24  # of a config.json, an index of shards or a recipe
SHOWN_CHARACTERS = 200  # of a path in a message

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def shown(path: str | os.PathLike[str]) -> str:
    """The path for a message: on one line, and shortened where it is very long."""
    text = os.fspath(path)
    if not text.isprintable():
        text = repr(text)[1:-1]
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def printable(text: str) -> str:
    """The text with control characters, which a terminal obeys, as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def path_kind(path: str | os.PathLike[str]) -> Literal["file", "folder", "other"] | None:
    """What is at a path, links followed: None where there is nothing.

    Raises:
        UserError: no path of this system: too long, with a NUL byte, a link to itself; or a folder
            above it may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: {_reason(error)}") from None
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def foreign_name(
    folder: str | os.PathLike[str],
    is_own: Callable[[str], bool],
    counts: Callable[[str], bool] = lambda name: True,
) -> str | None:
    """A name in a folder of another kind: where it holds something, but no name that is own.

    Hidden names do not count. None where there is no such folder, or it cannot be listed.

    Args:
        counts: whether a name that is not own makes a folder one of another kind.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return None
    return None if any(map(is_own, names)) else next(filter(counts, names), None)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        UserError: missing, not readable, or no regular file; one line that names the path.
    """
    try:
        _check_regular(path, os.stat(path).st_mode)
        file = open(path, "rb", opener=open_at_once)  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: {_reason(error)}") from None
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal.  Raises: UserError, if it cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read: {_reason(error)}") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8 of at most 16 MiB, without the byte order mark that it may begin with.

    Raises:
        UserError: as :func:`open_regular`; too large, or not UTF-8.
    """
    with open_regular(path) as file:
        try:
            content = file.read(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read: {_reason(error)}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{shown(path)}: must have at most {MAX_TEXT_BYTES:,} bytes; it is larger")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: cannot be read as text in UTF-8: {error}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: as :func:`read_text`; no JSON, nested too deeply, or an object has a key twice:
            readers differ in which of the two values they take.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise UserError(f"{shown(path)}: cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{shown(path)}: cannot be read as JSON: {error}") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, an ``object_pairs_hook`` of ``json.loads``.

    Raises:
        ValueError: a key comes twice.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"an object has the key {shown(key)} twice")
        result[key] = value
    return result


def json_text(value: Any, indent: int | None = None) -> str:
    """The text of a JSON file of ours, which every reader of JSON can read; see :func:`finite`."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with texts in place of what JSON has no numbers for.

    They are "NaN", "Infinity" and "-Infinity", which ``float`` reads.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait, should a named pipe have the file's name."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _check_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise UserError(f"{shown(path)}: must be a regular file; it is {kind}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)
