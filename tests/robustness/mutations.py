"""Ways to spoil one argument of a call.

A mutation returns the new value and what is known of it: ``refuse`` (no function may take it in
this place), ``huge`` (memory may run out), ``gradient`` (it requires one).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
NUMBERS = (-1, 0, 1, 2, 3, 7, 16, 17, 1000, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1)
BEYOND = (2**63, 2**64, -(2**31), -(2**63), -(2**63) - 1, 10**30, -2)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e-300, 3e38, 1e39, 1e308, 1e38)


class NotAnything:
    """An object that is no number, no sequence and no tensor."""

    def __repr__(self) -> str:
        return "NotAnything()\nof two lines"


class Strings(str):
    """A subclass of str."""


@dataclass
class Spoilt:
    """A new value, and what is known of it."""

    value: Any
    text: str
    refuse: bool = False
    huge: bool = False
    gradient: bool = False
    extreme: bool = False
    tags: set[str] = field(default_factory=set)


def _never(rng: random.Random) -> Any:
    """A value that is of no plain kind."""
    makers: tuple[Callable[[], Any], ...] = (
        NotAnything,
        dict,
        set,
        lambda: lambda: None,
        lambda: NotAnything,
        lambda: 1j,
        lambda: b"1",
        lambda: np.array(["a", "b"]),
        lambda: np.array([1, 2]),
        lambda: np.array([[0.5, 1.5]]),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.empty(2, 3, device="meta"),
        lambda: {"depth": 1},
        lambda: (x for x in (1, 2)),
        lambda: ...,
        lambda: NotImplemented,
        lambda: torch.float32,
        lambda: ["a", None],
    )
    return rng.choice(makers)()


def plain(rng: random.Random, value: Any, kind: str) -> Spoilt:
    """Another value for an integer, a number, a text, a flag or a list of numbers."""
    roll = rng.random()
    if roll < 0.3:
        odd = _never(rng)
        # Elsewhere a list, an array or a tensor may be meant.
        refuse = kind in ("integer", "real", "choice") or (
            kind in ("tensor", "config") and not isinstance(odd, Tensor)
        )
        return Spoilt(odd, _short(odd), refuse=refuse)
    if roll < 0.45:
        text = rng.choice(("3", "", "auto", "cpu", "meta", "fp8", "reference", "x" * 5000, "a\nb"))
        return Spoilt(text, _short(text), refuse=kind in ("integer", "real", "tensor", "config"))
    if roll < 0.55:
        number: Any = rng.choice((None, True, False, np.bool_(True), torch.tensor(True)))
        return Spoilt(number, _short(number), refuse=kind == "integer" and number is not None)
    if roll < 0.75:
        number = rng.choice((*NUMBERS, *BEYOND))
        if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
            number = value + rng.choice((-2, -1, 1, 2))
        wrap = rng.choice((None, None, np.int64, np.int32, torch.tensor, np.array))
        if wrap is not None and -(2**31) <= number < 2**31:
            number = wrap(number)
        refuse = kind in ("tensor", "config") and isinstance(number, int)
        return Spoilt(number, _short(number), refuse=refuse, extreme=abs(int(number)) > 10**4)
    if roll < 0.9:
        number = rng.choice((*FLOATS, float("nan"), float("inf"), -float("inf"), 2.5))
        wrap = rng.choice((None, None, np.float32, np.float64, torch.tensor))
        with np.errstate(over="ignore"):
            shown = number if wrap is None else wrap(number)
        finite = number == number and abs(number) != float("inf")
        refuse = kind in ("integer", "choice") or (kind == "real" and not finite)
        extreme = abs(number) > 1e4 or not finite
        return Spoilt(shown, _short(shown), refuse=refuse, extreme=extreme)
    items = rng.choice(((), (1,), (0, 1), (0, 3), (3, 0), (0, 0, 3), (-1, 3), (0.5, 1), ("0", "3")))
    listed: Any = rng.choice((tuple, list))(items)
    return Spoilt(listed, _short(listed), refuse=kind in ("integer", "real", "choice", "tensor"))


def tensor(rng: random.Random, value: Tensor) -> Spoilt:
    """Another tensor, or what is none."""
    name, spoil = rng.choice(_TENSORS)
    if not value.is_nested and value.numel() > 2**24:
        # Made huge before: a list or a copy of it would take all memory.
        name, spoil = "huge as it was", lambda rng, t: t
    try:
        result = spoil(rng, value)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        # Not possible for this tensor, e.g. no axis to cut.
        result, name = torch.zeros(3), "zeros of shape (3,) instead of " + name
    if isinstance(result, Spoilt):
        return result
    text = f"{name} {_shape(result)}" if isinstance(result, Tensor) else name
    return Spoilt(
        result,
        text,
        refuse=not isinstance(result, Tensor),
        huge="huge" in name,
        gradient="gradient" in name,
        extreme="extreme" in name,
    )


def _axis(rng: random.Random, t: Tensor) -> int:
    return rng.randrange(t.ndim)


def _one_element(rng: random.Random, t: Tensor, values: tuple[Any, ...]) -> Tensor:
    t = t.clone()
    flat = t.view(-1)
    for _ in range(rng.choice((1, 1, 3))):
        flat[rng.randrange(flat.numel())] = rng.choice(values)
    return t


def _cut(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    return t.narrow(axis, 0, rng.choice((0, t.shape[axis] - 1)))


def _longer(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    return torch.cat((t, t.narrow(axis, 0, 1)), axis)


def _restride(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    return t.transpose(axis, -1).contiguous().transpose(axis, -1)


def _expanded(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    return t.narrow(axis, 0, 1).expand(t.shape)


def _huge(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    shape = list(t.shape)
    shape[axis] = rng.choice((2**38, 2**44, 2**55))
    return t.narrow(axis, 0, 1).expand(shape)


def _overlapping(rng: random.Random, t: Tensor) -> Tensor:
    strides = list(t.stride())
    axis = _axis(rng, t)
    strides[axis] = rng.choice((0, 1, max(1, strides[axis] // 2)))
    return t.as_strided(t.shape, strides)


def _every_other(rng: random.Random, t: Tensor) -> Tensor:
    axis = _axis(rng, t)
    return torch.stack((t, t), axis + 1).flatten(axis, axis + 1)[
        (slice(None),) * axis + (slice(None, None, 2),)
    ]


def _negative(rng: random.Random, t: Tensor) -> Tensor:
    if t.is_quantized or t.dtype == torch.bool or t.dtype.itemsize == 1:
        raise TypeError("torch itself cannot compute it, and crashes for quantised tensors")
    return torch._neg_view(t)


class Subclass(Tensor):
    """A tensor of another class."""


def _floats(t: Tensor) -> tuple[float, ...]:
    return (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30)


_INDICES = (-1, -2, 0, 5, 10**6, 2**31 - 1, -(2**31))
_TENSORS: tuple[tuple[str, Callable[[random.Random, Tensor], Any]], ...] = (
    ("no tensor", lambda r, t: plain(r, t, "tensor")),
    ("no tensor", lambda r, t: plain(r, t, "tensor")),
    ("numpy array", lambda r, t: t.float().numpy()),
    ("list", lambda r, t: t.float().tolist() if t.ndim else [0.0]),
    ("dtype", lambda r, t: t.to(r.choice(DTYPES))),
    ("dtype", lambda r, t: t.to(r.choice(DTYPES))),
    ("unsqueeze", lambda r, t: t.unsqueeze(r.randrange(t.ndim + 1))),
    ("first", lambda r, t: t[0]),
    ("flat", lambda r, t: t.flatten()),
    ("0-d", lambda r, t: t.flatten()[0]),
    ("cut", _cut),
    ("cut", _cut),
    ("longer", _longer),
    ("longer", _longer),
    ("transposed", lambda r, t: t.transpose(_axis(r, t), -1)),
    ("restrided", _restride),
    ("every other", _every_other),
    ("expanded", _expanded),
    ("huge", _huge),
    ("overlapping", _overlapping),
    ("negative view", _negative),
    ("imaginary part", lambda r, t: torch.complex(t.float(), t.float()).conj().imag),
    ("meta", lambda r, t: t.to("meta")),
    ("sparse", lambda r, t: t.to_sparse()),
    ("csr", lambda r, t: t.flatten(1).to_sparse_csr()),
    ("nested", lambda r, t: torch.nested.nested_tensor([t[0], t[0]])),
    ("mkldnn", lambda r, t: t.to_mkldnn()),
    ("quantised", lambda r, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)),
    ("gradient", lambda r, t: t.clone().requires_grad_()),
    ("subclass", lambda r, t: t.as_subclass(Subclass)),
    (
        "extreme elements",
        lambda r, t: _one_element(r, t, _floats(t) if t.is_floating_point() else _INDICES),
    ),
    (
        "extreme elements",
        lambda r, t: _one_element(r, t, _floats(t) if t.is_floating_point() else _INDICES),
    ),
    ("zeros", lambda r, t: torch.zeros_like(t)),
    ("empty", lambda r, t: t.new_empty(0)),
    ("empty of its rank", lambda r, t: t.new_empty((0,) * t.ndim)),
    ("scaled", lambda r, t: t * 50),
)


def _shape(value: Any) -> object:
    return "nested" if getattr(value, "is_nested", False) else tuple(value.shape)


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {_shape(value)}"
    text = " ".join(f"{type(value).__name__} {value!r}".split())
    return text if len(text) < 50 else text[:47] + "..."
