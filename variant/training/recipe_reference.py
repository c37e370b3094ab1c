"""The keys of recipes, read from the dataclasses: their reference, and recipes as commented TOML.

The docstring of a section documents its fields as ``key: text`` or ``key, key: text``, each at the
start of a line or after two spaces; types, ranges and defaults are those of the fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from variant.models.config import to_plain
from variant.models.ranges import hints_of, range_text
from variant.training.overrides import section_type
from variant.training.recipe import Recipe, load_recipe, recipe_names

INTRODUCTION = """\
# Recipe keys

`make docs-results` writes this page from the sections' dataclasses; do not edit it.
[training.md](training.md) explains how to train.

A recipe is a TOML file. `variant recipe new` writes one for a folder of images; `variant recipe
show NAME` prints one with every key and a comment for each; `variant recipe check FILE` names every
mistake and prints what the run will be. Unknown keys and values out of range stop a run with one
line that names all of them.

Any key can be given on the command line, in `variant train`, `train-vae` and `recipe`:
`--optim.learning-rate 2e-4`, `--schedule.depths 8 4`, `--model.weights none`.

"-" means that the key is required, "none" that it is not set.

## Packaged recipes

| name | what it trains |
|---|---|
"""
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """One key of a section.

    default: the plain value; dataclasses.MISSING for a required key.
    values: its type and range in words.  text: what it means.
    """

    name: str
    default: Any
    values: str
    text: str


@dataclass(frozen=True)
class Section:
    """A section of recipes: its dotted title ("" for the top level), its introduction, its keys."""

    title: str
    kind: type
    text: str
    keys: tuple[Key, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every section in the order of the recipe's fields, the top level first."""
    fields = dataclasses.fields(Recipe)
    kinds = {field.name: section_type(hints_of(Recipe)[field.name]) for field in fields}
    nested = [_section(name, kind) for name, kind in kinds.items() if kind is not None]
    return (_section("", Recipe, [name for name, kind in kinds.items() if kind is None]), *nested)


def nested_sections(section: Section) -> Iterator[Section]:
    """The sections within a section, but for those that are sections of a recipe too."""
    own = {each.kind for each in sections()}
    for key in section.keys if section.title else ():
        inner = section_type(hints_of(section.kind)[key.name])
        if inner is not None and inner not in own:
            yield _section(f"{section.title}.{key.name}", inner)


def _section(title: str, kind: type, names: list[str] | None = None) -> Section:
    intro, texts = documented(kind)
    keys = []
    for field in dataclasses.fields(kind):
        if names is None or field.name in names:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            hint = hints_of(kind)[field.name]
            values = ", ".join(filter(None, (type_text(hint), range_text(hint))))
            keys.append(Key(field.name, to_plain(default), values, texts.get(field.name, "")))
    return Section(title, kind, intro, tuple(keys))


def documented(kind: type) -> tuple[str, dict[str, str]]:
    """The first paragraph of a dataclass's docstring, and the text of every field it documents.

    Under ``python -OO`` there are no docstrings, and no texts.
    """
    names = "|".join(field.name for field in dataclasses.fields(kind))
    doc = inspect.cleandoc(kind.__doc__ or "")
    entry = rf"(?:^|\n\s*|  )((?:{names})(?:, (?:{names}))*): "
    matches = list(re.finditer(entry, doc))
    texts = {}
    ends = [*(match.start() for match in matches[1:]), len(doc)]
    for match, end in zip(matches, ends, strict=False):
        text = doc[match.end() : end]
        text = re.split(r"\n\s*\n|\n\w+:", text)[0]
        for name in match[1].split(", "):
            texts[name] = _prose(text)
    intro = doc[: matches[0].start()] if matches else doc
    return _prose(re.sub(r"\n\s*Args:\s*$", "", intro)), texts


def _prose(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).rstrip(".")


def type_text(hint: Any) -> str:
    """A type in words: ``integer``, ``list of numbers``, ``"a" or "b"``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_text(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(type_text(part) for part in parts if part is not type(None))
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in parts)
    if origin is tuple:
        return f"list of {' or '.join(map(_plural, type_text(parts[0]).split(' or ')))}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return WORDS.get(hint, str(hint))


def _plural(words: str) -> str:
    return re.sub(r"\blist\b", "lists", words, count=1) if "list" in words else f"{words}s"


def default_text(key: Key) -> str:
    """The default as it stands in the reference."""
    if key.default is dataclasses.MISSING:
        return "-"
    if isinstance(key.default, dict):  # a section, whose own keys have their defaults
        return "its own"
    return "none" if key.default is None else json.dumps(key.default)


def reference() -> str:
    """The text of ``docs/recipes.md``."""
    lines = [INTRODUCTION.rstrip()]
    for name in recipe_names():
        lines.append(f"| `{name}` | {load_recipe(name).description} |")
    every = (part for section in sections() for part in (section, *nested_sections(section)))
    for section in every:
        title = f"`[{section.title}]`" if section.title else "Top level"
        lines += ["", f"## {title}", "", f"{section.text}.", ""]
        lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            values = key.values.replace("|", "\\|")
            lines.append(f"| `{key.name}` | {default_text(key)} | {values} | {key.text} |")
    return "\n".join(lines) + "\n"


# --- a recipe as TOML ---------------------------------------------------------------------------


def recipe_toml(recipe: Recipe, *, every_key: bool = True) -> str:
    """The recipe with one comment line a key. Loading the text gives an equal recipe.

    Args:
        every_key: False leaves out keys that have their defaults.
    """
    lines: list[str] = []
    for section in sections():
        value = getattr(recipe, section.title) if section.title else recipe
        lines += list(_section_lines(section.title, section, value, every_key))
    return "\n".join(lines).strip() + "\n"


def _section_lines(title: str, section: Section, value: Any, every_key: bool) -> Iterator[str]:
    """A section, then the sections within it, as TOML wants them."""
    if value is None:
        yield from ("", f"# [{title}] is not set") if every_key else ()
        return
    keys = list(_key_lines(section, value, every_key))
    if keys or every_key:
        yield ""
        yield from [f"[{title}]"] if title else []
        yield from keys
    for key in section.keys:
        inner = section_type(hints_of(section.kind)[key.name])
        if inner is not None:
            name = f"{title}.{key.name}"
            yield from _section_lines(
                name, _section(name, inner), getattr(value, key.name), every_key
            )


def _key_lines(section: Section, value: Any, every_key: bool) -> Iterator[str]:
    """The keys of a section that are no sections themselves, each with its comment."""
    for key in section.keys:
        if section_type(hints_of(section.kind)[key.name]) is not None:
            continue
        plain = to_plain(getattr(value, key.name))
        if plain == key.default and not every_key:
            continue
        if plain is None:
            yield f"# {key.name} (not set; {key.values}): {key.text}".rstrip(": ")
        else:
            yield f"# {f'{key.text} ({key.values})'.lstrip()}"
            yield f"{key.name} = {toml_value(plain)}"


def toml_value(value: Any) -> str:
    """A text, boolean, number or list as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's texts are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
