"""Checks of the words of a command line that a parser by types does not make."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from variant.errors import UserError

OPTION = re.compile(r"--[A-Za-z][\w.-]*")
NUMBER = re.compile(r"-[\d.]")


class UsageError(Exception):
    """A command line that cannot be parsed; the message is one line."""


def check_words(words: Sequence[str]) -> list[str]:
    """The words, ``--help`` in place of none, and ``--debug`` behind the command.

    Raises:
        UsageError: an option is given twice, or its value is an empty text, or - where that is not
            standard output.
    """
    if not words:
        return ["--help"]
    words = [word for word in words if word != "--debug"] + ["--debug"] * ("--debug" in words)
    seen: set[str] = set()
    option = ""
    for word in words:
        match = OPTION.match(word)
        if match:
            option = match[0].replace("_", "-")
            if option.replace("--no-", "--", 1) in seen:
                raise UsageError(
                    f"{words[0]}: {option} is given twice; give it once, with all of its values"
                )
            seen.add(option.replace("--no-", "--", 1))
        if word == "" or (match and word == match[0] + "="):
            raise UsageError(
                f"{words[0]}: {option or 'an argument'} must not be empty; leave it out for its "
                "default"
            )
        is_stream = (word == "-" and option) or (match and word == match[0] + "=-")
        if is_stream and option != "--json":
            raise UsageError(
                f"{words[0]}: {option} must not be -; only --json writes to standard output (a "
                "file or folder of that name is ./-)"
            )
    return list(words)


def refuse_given(op: str, command: Any, names: Sequence[str], reason: str) -> None:
    """Refuses options that would have no effect.

    Args:
        command: an options object.
        names: of its fields.
        reason: ends the message, as in "info: --images is for --kv-dtype".
    Raises:
        UserError: one of them is not at its default.
    """
    for option in fields(command):
        value = getattr(command, option.name)
        if option.name in names and value != option.default:
            prefix = "--no-" if value is False else "--"
            raise UserError(f"{op}: {prefix}{option.name.replace('_', '-')} is {reason}")


def command_line(name: str, command: Any, **changes: Any) -> str:
    """The shell command of an options object; options at their default are left out.

    Args:
        changes: values that replace those of the object.
    """
    words = ["variant", name]
    for option in fields(command):
        value = changes.get(option.name, getattr(command, option.name))
        default = option.default
        if value == default:
            continue
        word = f"--{option.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(word if value else word.replace("--", "--no-", 1))
        else:
            words += option_words(word, *(value if isinstance(value, tuple) else (value,)))
    return shlex.join(words)


def option_words(option: str, *values: object) -> list[str]:
    """The words that give an option these values, whatever they begin with."""
    # A folder that is named ~ is here not that of the user, in whose place a command takes it.
    texts = [f"./{value}" if str(value).startswith("~/") else str(value) for value in values]
    if len(texts) == 1 and texts[0].startswith("-") and not NUMBER.match(texts[0]):
        return [f"{option}={texts[0]}"]  # apart, it would be an option
    return [option, *texts]
