"""Random bad calls of every public name, on every backend that runs here.

A case takes good arguments of one name (``subjects``) and spoils none, one or several
(``mutations``). The call must return, or raise ValueError, TypeError or UserError of one line that
names the function or its class. It must not crash, hang, write outside its pools, write before it
raises, or take a value of another kind in silence. What it returns must equal the result of the
reference backend.

    python -m tests.robustness.bad_calls --seed 7 --cases 1000
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.robustness import forked, mutations, subjects
from tests.robustness.forked import Failed
from tests.robustness.mutations import Spoilt
from variant.errors import UserError
from variant_kernels.arguments import sequence

MODULE = "tests.robustness.bad_calls"
# Of each case, by the number of arguments that are spoilt.
SPOILT = (0, 1, 1, 1, 1, 1, 1, 2, 2, 3)
# Arguments whose value a function stores or hands on without using it, or takes in any form.
FREE = {
    ("VARiantAttention", "block_idx"),
    ("VARiantAttention", "flash_if_available"),
    ("VARiant.generate_model_card", "model_id"),
    ("VAR.layers_of", "op"),
    ("VAR.schedule", "op"),
    ("Sampling.with_tensors", "cfg"),
    ("Sampling.with_tensors", "seed"),
    ("PartialResult.images", "_decode"),
}
# Functions with keyword arguments of another library's method.
OPEN = ("VARiant.generate_model_card",)
PER_SCALE = ("cfg", "temperature")
# A message may name these in place of the function or its class.
ALIASES = {
    "Sampling": ("generate",),
    "Engine": ("VARiant",),
    "Engine.generate_with": ("generate",),
    "Engine.forced_log_probs": ("forced_logits", "generate"),
    "Engine.generate_batches": ("generate",),
    "Engine.generate_batches_with": ("generate",),
    "VARiant.generate_batches": ("generate",),
}
# Functions on files: their UserError names the file.
FILES = (
    "VARiant.from_pretrained",
    "VARiant.from_var_checkpoint",
    "VARiant.save_pretrained",
    "load_schedule",
)


@dataclass
class Call:
    """One call, and what is known of its arguments."""

    name: str
    target: Callable[..., Any]
    arguments: dict[str, Any]
    pools: list[Any]
    spoilt: list[tuple[str, Any]]

    @property
    def text(self) -> str:
        what = ", ".join(f"{name}={spoilt.text}" for name, spoilt in self.spoilt)
        backend = self.arguments.get("backend")
        where = f" [{backend}]" if isinstance(backend, str) and "backend" in self.arguments else ""
        return f"{self.name}{where} with {what or 'good arguments'}"


class Generator:
    """Builds the calls of a seed.

    Args:
        only: parts of subjects' names; None takes all.
        backend: the only backend of ops; None takes all that run here.
    """

    def __init__(self, only: str | None = None, backend: str | None = None) -> None:
        names = sorted(subjects.public_names() - set(subjects.NOT_CALLED))
        if only:
            names = [name for name in names if any(part in name for part in only.split(","))]
        ops = [name for name in names if subjects.is_op(name)]
        # Half of the cases are ops.
        self.names = names + ops * max(1, (len(names) - 2 * len(ops)) // max(1, len(ops)))
        self.backends = (backend,) if backend else subjects.called_backends()

    def call(self, seed: int, case: int) -> Call:
        rng = forked.rng_of(seed, case)
        name = rng.choice(self.names)
        draw = subjects.Draw(rng, self.backends)
        target, arguments = subjects.MAKERS[name](draw)
        # Arguments that the maker does not draw are given their defaults now and then.
        for parameter in inspect.signature(target).parameters.values():
            given = parameter.name in arguments or parameter.name in subjects.NOT_GIVEN
            if not given and parameter.default is not parameter.empty and rng.random() < 0.15:
                arguments[parameter.name] = parameter.default
        spoilt = []
        kinds = {key: kind_of(key, value) for key, value in arguments.items()}
        for _ in range(rng.choice(SPOILT)):
            change = self._spoil(rng, name, arguments, kinds)
            if change:
                spoilt.append(change)
        return Call(name, target, arguments, draw.pools, spoilt)

    def _spoil(
        self, rng: random.Random, name: str, arguments: dict[str, Any], kinds: dict[str, str]
    ) -> tuple[str, Spoilt] | None:
        """Change one argument in place; its name and what is known of the new value."""
        if not arguments:
            return None
        key = rng.choice(list(arguments))
        roll = rng.random()
        if roll < 0.02:
            del arguments[key]
            return key, mutations.Spoilt(None, "missing")
        if roll < 0.04:
            arguments["no_such_argument"] = 1
            return "no_such_argument", mutations.Spoilt(
                1, "1", refuse="save_pretrained" not in name
            )
        value = arguments[key]
        if roll < 0.1:  # another argument's object: aliasing
            other = rng.choice(list(arguments))
            arguments[key] = arguments[other]
            return key, mutations.Spoilt(None, f"the object of {other}", extreme=True)
        kind = kinds.get(key, "any")
        if isinstance(value, Tensor) and (kind == "tensor" or rng.random() < 0.5):
            spoilt = mutations.tensor(rng, value)
            spoilt.refuse = spoilt.refuse and kind == "tensor"
        else:
            spoilt = mutations.plain(rng, value, kind)
        if (name, key) in FREE or name in subjects.RECORDS:
            spoilt.refuse = False
        arguments[key] = spoilt.value
        return key, spoilt


def kind_of(name: str, value: Any) -> str:
    """What an argument takes: tensor, integer, real, choice, config (an own class) or any."""

    if isinstance(value, Tensor):
        # Tokens, labels and ids may be lists, too.
        return "any" if name in ("labels", "image_ids", "tokens_BL", "labels_B") else "tensor"
    if isinstance(value, bool) or name in ("depth", "labels", "values", "extra"):
        return "any"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "real"
    if name in ("backend", "selection", "op"):
        return "choice"
    module = type(value).__module__.split(".")[0]
    return "config" if module in ("variant", "variant_kernels") else "any"


def check(generator: Generator, seed: int, case: int) -> None:
    """Make the call of a case.  Raises: Failed, or whatever the call must not raise."""

    torch.manual_seed(0)
    call = generator.call(seed, case)
    is_op = subjects.is_op(call.name)
    before = _Memory(call) if is_op else None
    warnings.simplefilter("ignore")
    try:
        result = call.target(**call.arguments)
    except Exception as error:
        if call.name not in subjects.PARTS:
            _check_error(call, error)
        if before:
            before.check(written=False)
        return
    if call.name in subjects.PARTS:
        return
    for key, spoilt in call.spoilt:
        if key == "no_such_argument" and call.name in OPEN:
            continue
        if key in PER_SCALE and sequence(spoilt.value) is not None:
            continue  # one number per scale; their number is compared when the model is known
        if spoilt.refuse and key in call.arguments and call.arguments[key] is spoilt.value:
            raise Failed(f"{call.text}: accepted; expected TypeError or ValueError about {key}")
    if before:
        before.check(written=True)
        if _is_comparable(call):
            _check_result(generator, seed, case, call, result)


def _check_error(call: Call, error: Exception) -> None:
    text = str(error)
    if callable(call.arguments.get("on_scale")):
        return  # it is called, and raises what it raises
    gradient = any(spoilt.gradient for _, spoilt in call.spoilt)
    huge = any(spoilt.huge for _, spoilt in call.spoilt)
    numbers = any(_is_large(value) for value in call.arguments.values())
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    memory |= "allocate memory" in text or "Storage size calculation overflowed" in text
    if memory and (huge or numbers):
        return
    kinds = (ValueError, TypeError, UserError, *((RuntimeError,) if gradient else ()))
    if not isinstance(error, kinds):
        raise Failed(
            f"{call.text}: {type(error).__name__}: {text[:250]}; expected ValueError or "
            "TypeError that names the function"
        )
    function = call.name.split(".")
    # Methods of VAR begin their messages with the argument op. A tensor is formatted as its value.
    op = call.arguments.get("op")
    names = (*function, str(op), f"{op}", *ALIASES.get(call.name, ()))
    named = isinstance(error, UserError) and call.name in FILES
    # A function may hand an argument on to another public one, which then speaks.
    other = re.match(r"([A-Za-z_]\w*)(\.\w+)*: ", text)
    named = named or (other is not None and other[1] in _public())
    if not named and not any(name in text for name in names):
        raise Failed(f"{call.text}: {type(error).__name__} that does not name it: {text[:250]}")
    if "\n" in text.strip():
        raise Failed(f"{call.text}: {type(error).__name__} of several lines: {text[:250]}")


@cache
def _public() -> set[str]:
    return {name.split(".")[0] for name in subjects.public_names()}


def _is_large(value: Any) -> bool:
    """A number that may size an allocation beyond memory, alone or in a list."""
    if isinstance(value, dict):
        return any(map(_is_large, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_large, value))
    try:
        return abs(int(value)) >= 2**24
    except (TypeError, ValueError, OverflowError, RuntimeError, IndexError):
        return False


class _Memory:
    """The bytes of all arguments and of the guards before a call."""

    def __init__(self, call: Call) -> None:

        self.call = call
        self.bases = [(base, base.clone(), start, size) for base, start, size in call.pools]
        addresses = [(b.data_ptr(), b.data_ptr() + b.numel()) for b, _, _ in call.pools]
        self.inputs = []
        for name, value in call.arguments.items():
            if not _is_plain(value) or name.endswith(("_PNHD", "_PNH")):
                continue
            address = value.data_ptr()
            if any(low <= address < high for low, high in addresses):
                continue  # the pool itself in another argument's place
            if value.untyped_storage().nbytes() < 1 << 20:
                bytes_ = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                self.inputs.append((name, bytes_, bytes_.clone()))

    def check(self, written: bool) -> None:

        text = self.call.text
        shared = {id(v) for v in self.call.arguments.values() if isinstance(v, Tensor)}
        aliased = len(shared) < sum(isinstance(v, Tensor) for v in self.call.arguments.values())
        for name, now, then in self.inputs:
            if not torch.equal(now, then) and not aliased:
                raise Failed(f"{text}: wrote to {name}, which is an input")
        for base, then, start, size in self.bases:
            low, high = base[:start], base[start + size :]
            if not torch.equal(low, then[:start]) or not torch.equal(high, then[start + size :]):
                raise Failed(f"{text}: wrote outside a pool")
            if not written and not torch.equal(base, then):
                raise Failed(f"{text}: wrote to a pool, then raised")


def _is_plain(value: Any) -> bool:
    """A dense tensor on the CPU."""

    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_nested
        and not value.is_quantized
    )


def _is_comparable(call: Call) -> bool:
    """Whether backends must agree: finite arguments of usual size, on another backend."""

    if call.arguments.get("backend", "auto") == "reference":
        return False
    if any(spoilt.extreme or spoilt.huge for _, spoilt in call.spoilt):
        return False
    for value in call.arguments.values():
        if isinstance(value, Tensor):
            if not _is_plain(value):
                return False
            if value.is_floating_point() and value.numel():
                largest = float(value.detach().float().abs().max())
                if not math.isfinite(largest) or largest > 1e4:
                    return False
    return call.name in call.target.__name__


def _check_result(generator: Generator, seed: int, case: int, call: Call, result: Any) -> None:
    """The reference backend's result and pools for the same arguments, up to rounding."""

    torch.manual_seed(0)
    again = generator.call(seed, case)
    again.arguments["backend"] = "reference"
    expected = again.target(**again.arguments)
    pairs = list(zip(_tensors(result), _tensors(expected), strict=True))
    for name, value in call.arguments.items():
        if name.endswith(("_PNHD", "_PNH")):
            pairs.append((value, again.arguments[name]))
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Failed(
                f"{call.text}: {tuple(ours.shape)} {ours.dtype}; the reference backend "
                f"returns {tuple(theirs.shape)} {theirs.dtype}"
            )
        if ours.numel() == 0:
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        if not ours.dtype.is_floating_point:
            # One draw in a million lies on the edge of two tokens.
            if not torch.equal(a, b):
                raise Failed(f"{call.text}: other integers than the reference backend's")
            continue
        eps = 0.13 if ours.dtype.itemsize == 1 else torch.finfo(ours.dtype).eps * 32
        # Scores of hundreds are rounded to 1e-5 of a softmax's exponent.
        eps *= 16 if any(spoilt.text.startswith("scaled") for _, spoilt in call.spoilt) else 1
        scales = call.arguments.get("k_scales_PNH")
        if isinstance(scales, Tensor):  # keys of 8 bits may be large, and so may scores
            eps *= max(1.0, 2.0 ** (int(scales.max()) - 127) / 16)
        bound = eps * max(1.0, float(b.nan_to_num().abs().max()))
        wrong = ~torch.isclose(a, b, rtol=0, atol=bound, equal_nan=True)
        if bool(wrong.any()):
            raise Failed(
                f"{call.text}: differs from the reference backend by "
                f"{float((a - b).abs().max()):.3g}; allowed {bound:.3g}"
            )


def _tensors(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def main() -> int:
    made: list[Generator] = []

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", help="parts of names, separated by commas")
        parser.add_argument("--backend", help="the only backend of ops; default: all that run here")

    def prepare(arguments: argparse.Namespace) -> str:
        folder = tempfile.TemporaryDirectory(prefix="bad-calls-")
        folders.append(folder)
        made.append(Generator(arguments.only, arguments.backend))
        os.chdir(folder.name)
        warnings.simplefilter("ignore")
        subjects.warm_up()
        words = [("--only", arguments.only), ("--backend", arguments.backend)]
        return "".join(f" {option} {value}" for option, value in words if value)

    folders: list[tempfile.TemporaryDirectory[str]] = []
    sys.path.insert(0, os.getcwd())
    return forked.main(
        MODULE,
        lambda seed, case: check(made[0], seed, case),
        forked.option("CALLS", 5000),
        extra=extra,
        prepare=prepare,
        describe=lambda seed, case: made[0].call(seed, case).text,
    )


if __name__ == "__main__":
    raise SystemExit(main())
