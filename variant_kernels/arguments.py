"""Checks of plain arguments: numbers, booleans, names and objects, without an import of torch.

Numbers of Python, numpy and torch are taken alike: whatever ``operator.index`` takes is an integer,
whatever ``float`` takes is a number. Booleans, text, complex numbers and arrays of several values
are neither, though numpy's ``float`` takes text and drops imaginary parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any, SupportsFloat, SupportsIndex, TypeVar, cast

T = TypeVar("T")


def integer(
    op: str,
    name: str,
    value: object,
    low: int | None = None,
    high: int | None = None,
    note: str = "",
) -> int:
    """The value as an ``int`` in [low, high]; either bound may be missing.

    Args:
        op, name: of the function and of its argument, for the message.
        note: follows the range in the message, e.g. "(0 keeps all)".
    Raises:
        TypeError: the value is no integer (3.0, True and "3" are none).
        ValueError: it is out of range.
    """
    if type(value) is int:
        number = value
    else:
        try:
            number = _index(value)
        # Of several values, of fractions, without values (on meta), or a class's own error.
        except Exception:
            expected = _expected("an integer", low, high, note)
            raise _wrong_type(op, name, expected, value) from None
    if (low is None or number >= low) and (high is None or number <= high):
        return number
    expected = _expected("an integer", low, high, note)
    raise ValueError(f"{op}: {name} must be {expected}; got {shown(number)}")


def real(
    op: str,
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> float:
    """The value as a finite ``float`` in [low, high]; either bound may be missing.

    Args and Raises: as :func:`integer`; NaN and infinities are out of every range.
    """
    if type(value) is float:
        number = value
    else:
        try:
            number = _float(value)
        except OverflowError:
            expected = _expected("a finite number", low, high, note)
            raise ValueError(f"{op}: {name} must be {expected}; got {typed(value)}") from None
        except Exception:  # of several values, without values (on meta), or a class's own error
            expected = _expected("a finite number", low, high, note)
            raise _wrong_type(op, name, expected, value) from None
    inside = (low is None or number >= low) and (high is None or number <= high)
    if -math.inf < number < math.inf and inside:
        return number
    expected = _expected("a finite number", low, high, note)
    raise ValueError(f"{op}: {name} must be {expected}; got {number!r}")


def boolean(op: str, name: str, value: object) -> bool:
    """The value as a ``bool``.

    Raises:
        TypeError: the value is no boolean of Python, numpy or torch (0, 1 and None are none).
    """
    if isinstance(value, bool):
        return value
    if not _is_bool(value) or getattr(value, "ndim", None) != 0:
        raise _wrong_type(op, name, "True or False", value)
    return bool(value)


def choice(op: str, name: str, value: object, choices: Sequence[str]) -> str:
    """The value, one of ``choices``.

    Raises:
        TypeError: the value is no text.
        ValueError: it is none of the choices.
    """
    expected = "one of " + ", ".join(repr(known) for known in choices)
    if not isinstance(value, str):
        raise _wrong_type(op, name, expected, value)
    if value not in choices:
        raise ValueError(f"{op}: {name} must be {expected}; got {typed(value)}")
    return value


def integers(
    op: str,
    name: str,
    values: object,
    low: int | None = None,
    high: int | None = None,
) -> tuple[int, ...]:
    """The values of a list, tuple, range, 1-D array or 1-D tensor, each as :func:`integer`.

    Raises:
        TypeError: no such list, or a value of it is no integer; the message names its position.
        ValueError: a value is out of range.
    """
    items = sequence(values)
    if items is None:
        raise _wrong_type(op, name, "a list of integers", values)
    return tuple(integer(op, f"{name}[{i}]", item, low, high) for i, item in enumerate(items))


def sequence(values: object) -> Sequence[Any] | None:
    """The items of a list, tuple, range, array or tensor; None for numbers, text and the rest."""
    if isinstance(values, str | bytes | bytearray):
        return None
    if getattr(values, "ndim", 0):  # of numpy and torch
        if getattr(getattr(values, "dtype", None), "kind", "") in ("m", "M"):
            return None  # durations and dates, whose list may be integers
        try:
            return cast("Any", values).tolist()
        except Exception:  # sparse, or without values (on meta)
            return None
    return values if isinstance(values, Sequence) else None


def instance(op: str, name: str, value: object, kind: type[T], remedy: str = "") -> T:
    """The value, an object of class ``kind``.

    Raises:
        TypeError: it is of another class; ``remedy`` follows in the message.
    """
    if not isinstance(value, kind):
        error = _wrong_type(op, name, f"of type {kind.__name__}", value)
        raise TypeError(f"{error}. {remedy}" if remedy else str(error))
    return value


def _expected(kind: str, low: float | None, high: float | None, note: str) -> str:
    return " ".join(filter(None, (kind, _range(low, high), note)))


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f"<= {_text(high)}"
    return f">= {_text(low)}" if high is None else f"in [{_text(low)}, {_text(high)}]"


def _text(bound: float) -> str:
    if isinstance(bound, int):
        bits = bound.bit_length()
        if bits >= 31 and bound & (bound + 1) == 0:
            return f"2^{bits} - 1"
        return str(bound)
    text = f"{bound:g}"
    # Six digits may be another number than the bound, and beyond it.
    return text if float(text) == bound else f"{bound:.15g}"


def _index(value: object) -> int:
    if _is_bool(value):
        raise TypeError
    return index(cast("SupportsIndex", value))


def _float(value: object) -> float:
    if not _is_real(value):
        raise TypeError
    return float(cast("SupportsFloat", value))


def _is_bool(value: object) -> bool:
    """Booleans of Python, of numpy and of torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_real(value: object) -> bool:
    """Whether this is neither text, nor a boolean, nor of another dtype than a real number's."""
    if isinstance(value, str | bytes | bytearray | complex) or _is_bool(value):
        return False
    dtype = getattr(value, "dtype", None)
    # numpy's complex numbers, objects, text, durations and dates; V: bfloat16 of other libraries.
    return getattr(dtype, "kind", "f") in "fiuV" and not getattr(dtype, "is_complex", False)


def _wrong_type(op: str, name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{op}: {name} must be {expected}; got {typed(value)}")


def shown(value: object, longest: int = 60) -> str:
    """The value on one line, shortened; an array or a tensor by its shape and dtype."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() >= 200:  # repr refuses thousands of digits
        return f"an integer of {value.bit_length()} bits"
    try:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{kind} of shape {tuple(shape)} {getattr(value, 'dtype', '')}".rstrip()
        text = " ".join(repr(value).split())
    except Exception:  # of any object's repr: a nested tensor, a list that is nested deeply
        return f"an object of type {kind}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def typed(value: object) -> str:
    """:func:`shown`, followed by the type where the text does not begin with it."""
    text, kind = shown(value), type(value).__name__
    return text if kind in text.split("(")[0].split() else f"{text} ({kind})"
