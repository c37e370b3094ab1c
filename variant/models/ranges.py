"""Types of numbers with a range, for the fields of the sections of a recipe.

pydantic checks them when a recipe is read, all fields at once; :func:`check_ranges` checks the same
ranges when a section is built by Python code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import Field
from pydantic.fields import FieldInfo

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ShareBelowOne: TypeAlias = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Within:
    """In an ``Annotated`` type: a range that a section checks itself, beside others of its own.

    low, high: of the number, both included; None has no bound here.
    words: in place of these in :func:`range_text`, where they are not all, or depend on other keys.
    """

    low: float | None = None
    high: float | None = None
    words: str = ""


# pydantic's kinds of errors, and the name of the bound in their context.
BOUNDS = {
    "greater_than": ("> ", "gt"),
    "greater_than_equal": (">= ", "ge"),
    "less_than": ("< ", "lt"),
    "less_than_equal": ("<= ", "le"),
}
FINITE = "finite"


def bound_text(kind: str, context: dict[str, Any]) -> str | None:
    """What a number must be, by one of pydantic's errors; None for other kinds of errors."""
    if kind == "finite_number":
        return FINITE
    if kind not in BOUNDS:
        return None
    sign, name = BOUNDS[kind]
    return f"{sign}{_number(context[name])}"


def check_ranges(section: Any) -> None:
    """Check the fields of a dataclass against the ranges of their types.

    Raises:
        ValueError: naming the first field that is out of range, e.g. ``clip must be > 0; got -1``.
    """
    for name, hint in hints_of(type(section)).items():
        for expected, value in _violations(hint, getattr(section, name)):
            raise ValueError(f"{name} must be {expected}; got {value!r}")


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, ranges included."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def range_text(hint: Any) -> str:
    """The range of a type in words of mathematics: ``>= 1``, ``in [0, 1)``; empty without one."""
    words = next((within.words for within in _within(hint) if within.words), None)
    if words is not None:
        return words
    limits = {sign.strip(): limit for sign, limit in _limits(hint)}
    low = next((sign for sign in (">", ">=") if sign in limits), None)
    high = next((sign for sign in ("<", "<=") if sign in limits), None)
    if low and high:
        opening, closing = "(["[low == ">="], ")]"[high == "<="]
        return f"in {opening}{_number(limits[low])}, {_number(limits[high])}{closing}"
    sign = low or high
    return f"{sign} {_number(limits[sign])}" if sign else ""


@cache
def numbers_within(kind: type) -> dict[str, tuple[type, Within]]:
    """The numbers of a dataclass whose types have a :class:`Within`: int or float, and it."""
    return {
        name: (get_args(hint)[0], within)
        for name, hint in hints_of(kind).items()
        if get_origin(hint) is Annotated
        for within in _within(hint)
    }


def _within(hint: Any) -> Iterator[Within]:
    """Every :class:`Within` of a type and of the types in it."""
    for part in get_args(hint):
        if isinstance(part, Within):
            yield part
        else:
            yield from _within(part)


def _violations(hint: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(what was expected, what came) for every number of ``value`` that breaks a range."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            if value is not None and part is not type(None):
                yield from _violations(part, value)
    elif get_origin(hint) is tuple:
        items = [part for part in get_args(hint) if part is not Ellipsis]
        if isinstance(value, tuple | list):
            for index, item in enumerate(value):
                yield from _violations(items[min(index, len(items) - 1)], item)
    elif isinstance(value, int | float) and get_origin(hint) is Annotated:
        if isinstance(value, float) and not math.isfinite(value):
            yield FINITE, value
            return
        for sign, limit in _limits(hint):
            if not _holds(value, sign.strip(), limit):
                yield f"{sign}{_number(limit)}", value


def _limits(hint: Any) -> Iterator[tuple[str, float]]:
    """(sign with a space, limit) of every bound in a type."""
    if get_origin(hint) is not Annotated:
        for part in get_args(hint):
            yield from _limits(part)
        return
    for field in get_args(hint)[1:]:
        if isinstance(field, Within):
            if field.low is not None:
                yield ">= ", field.low
            if field.high is not None:
                yield "<= ", field.high
        for rule in field.metadata if isinstance(field, FieldInfo) else ():
            for kind, sign, name in (
                (annotated_types.Gt, "> ", "gt"),
                (annotated_types.Ge, ">= ", "ge"),
                (annotated_types.Lt, "< ", "lt"),
                (annotated_types.Le, "<= ", "le"),
            ):
                if isinstance(rule, kind):
                    yield sign, getattr(rule, name)


def _holds(value: float, sign: str, limit: float) -> bool:
    return {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[
        sign
    ]


def _number(limit: float) -> str:
    """A limit as a text: whole numbers without a fraction."""
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
