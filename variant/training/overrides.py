"""Values for single keys of a recipe, given on a command line: ``--optim.learning-rate 2e-4``.

An override is a text ``optim.learning_rate=2e-4``; the type of the key decides how its value is
read. Imports neither torch nor pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

OPTION = re.compile(r"--([A-Za-z][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
MAX_SHOWN = 100


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The other words of a command line, and the overrides among them.

    An option with a dot in its name is an override: ``--schedule.depths 8 4`` or
    ``--schedule.depths=[8,4]``. Its values end before the next word that begins with two dashes.

    Raises:
        ValueError: an override has no value, or is given twice.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        option = OPTION.fullmatch(word)
        if option:
            key = option[1].replace("-", "_")
            if key in found:
                raise ValueError(f"--{option[1][:MAX_SHOWN]} is given twice")
            values = found.setdefault(key, [])
            if option[2]:
                values.append(option[2][1:])
        elif values is not None and not word.startswith("--"):
            values.append(word)
        else:
            values = None
            rest.append(word)
    for key, given in found.items():
        if not given:
            raise ValueError(f"{option_name(key)[:MAX_SHOWN]} needs a value")
    return rest, [f"{key}={' '.join(given)}" for key, given in found.items()]


def option_name(key: str) -> str:
    """``optim.learning_rate`` as an option: ``--optim.learning-rate``."""
    return f"--{key.replace('_', '-')}"


def override_words(overrides: Sequence[str]) -> list[str]:
    """The words of a command line that give these overrides."""
    words = []
    for override in overrides:
        key, _, value = override.partition("=")
        words += [f"{option_name(key)}={value}" if value.startswith("--") else option_name(key)]
        words += [] if value.startswith("--") else [value]
    return words


def override(values: Mapping[str, Any], overrides: Sequence[str], kind: type) -> dict[str, Any]:
    """A recipe's plain values with some of them replaced.

    Args:
        values: as in the TOML file.
        overrides: ``key=value`` with dotted keys; "none" removes a key that need not be set.
        kind: the dataclass of the recipe.
    Raises:
        ValueError: there are no such keys; the message names each and its nearest.
    """
    _, problems = known_overrides(overrides, kind)
    if problems:
        raise ValueError(f"{'; '.join(problems)}; docs/recipes.md lists all")
    known = dict(key_hints(kind))
    result = _copy(values)
    for text in overrides:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        inside = result
        for section in sections:
            inside = inside.setdefault(section, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{section} must be a section; got {inside!r:.60}")
        plain = plain_value(known[key], value)
        if plain is None:
            inside.pop(last, None)
        else:
            inside[last] = plain
    return result


def known_overrides(overrides: Sequence[str], kind: type) -> tuple[list[str], list[str]]:
    """The overrides of keys that a dataclass has, and a text for each of the others."""
    keys = dict(key_hints(kind))
    known, problems = [], []
    for text in overrides:
        key = text.partition("=")[0]
        if key in keys:
            known.append(text)
            continue
        near = difflib.get_close_matches(key, keys, 1, 0.4)
        nearest = f"; perhaps you meant {option_name(near[0])}" if near else ""
        shown = option_name(key)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        problems.append(f"{shown}: no such key of a recipe{nearest}")
    return known, problems


def key_hints(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every key of a dataclass and of the sections in it."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        section = section_type(hints[field.name])
        if section is None:
            yield f"{prefix}{field.name}", hints[field.name]
        else:
            yield from key_hints(section, f"{prefix}{field.name}.")


def section_type(hint: Any) -> type | None:
    """The dataclass of a field that is a section, also of one that may be missing; else None."""
    parts = (part for part in _alternatives(hint) if isinstance(part, type))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def plain_value(hint: Any, text: str) -> Any:
    """A text as the plain value of a type: a number, text, boolean, list, or None for "none".

    A text that is none of the type is returned as it is, for the check of the recipe to refuse.
    """
    parts = _alternatives(hint)
    if type(None) in parts and text.lower() == "none":
        return None
    for part in parts:
        if get_origin(part) is tuple:
            return _items(text)
    number = _toml(text)
    if isinstance(number, bool):
        return number if bool in parts else text
    if int in parts and isinstance(number, int):
        return number
    if float in parts:
        return number if isinstance(number, int | float) else _float(text)
    is_text = str in parts or any(get_origin(part) is Literal for part in parts)
    return text if is_text or not isinstance(number, int | float) else number


def _items(text: str) -> Any:
    """A list of TOML, or values between spaces."""
    if text.lstrip().startswith("["):
        return _toml(text)
    return [_toml(word) for word in text.replace(",", " ").split()]


def _toml(text: str) -> Any:
    """The value that the text is in TOML; the text itself if it is none."""
    try:
        values = tomllib.loads(f"x = {text}")
    except (ValueError, RecursionError):
        return text
    return values["x"] if values.keys() == {"x"} else text


def _float(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union, without ranges."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [part for inner in get_args(hint) for part in _alternatives(inner)]
    return [hint]


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
