"""Compare kernels: error against float64, relative to the error of plain torch.

A result may be at most ``times`` as far from the float64 reference as a plain-torch computation in
the same dtype, plus one unit in the last place of the largest expected value.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.robustness.forked import option
from variant_kernels.cuda_ops.library import is_emulated
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import BACKENDS, triton_interprets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensor = torch.Tensor

DRAWS = 4
# Numbers of a large case: among so many the largest error varies little.
LARGE_EMULATED, LARGE_INTERPRETED = 20_000, 2_000
# Kernels are compared here; inputs are drawn and errors measured on the CPU.
DEVICE = os.environ.get("VARIANT_TEST_DEVICE", "cpu")


def backends_for(
    impls: dict[str, Backend], dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> list[str]:
    """Backends that can serve these dtypes on the device under test.

    ``TRITON_INTERPRET=1`` adds triton, run by its interpreter; ``VARIANT_CUDA_EMULATION`` adds
    cuda, compiled for the CPU.
    """
    request = Request(DEVICE, (dtype,), 64, kv_dtype=kv_dtype)
    return [name for name in BACKENDS if name in impls and impls[name].unsupported(request) is None]


def cases(
    impls: dict[str, Backend], kv_dtype: torch.dtype | None = None
) -> list[tuple[str, torch.dtype]]:
    """(backend, dtype) for parametrize."""
    return [
        (name, dtype)
        for dtype in DTYPES
        for name in backends_for(impls, dtype, kv_dtype)
        if not (name == "triton" and left_to_nightly(dtype))
    ]


def left_to_nightly(dtype: torch.dtype) -> bool:
    """Whether ``make nightly`` alone runs the tests of a dtype in Triton's interpreter.

    It takes most of their time for 16-bit types, which random cases of every op have in each run
    (tests/robustness/test_differential.py).
    """
    return triton_interprets() and dtype != torch.float32 and not option("TRITON_DTYPES", 0)


def draws(
    sample_inputs: Callable[[torch.dtype, torch.Generator], list[Any]],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Iterator[tuple[int, Any]]:
    """The number of each case and its inputs, DRAWS times.

    Interpreted and emulated kernels take most of their time for the large cases: these are drawn
    once, in ``make nightly`` as often as the others.
    """
    large = LARGE_INTERPRETED if triton_interprets() else LARGE_EMULATED
    once = (triton_interprets() or is_emulated()) and not option("LARGE_DRAWS", 0)
    for draw in range(DRAWS):
        for case, inputs in enumerate(sample_inputs(dtype, generator)):
            if draw == 0 or not once or inputs[0].numel() < large:
                yield case, inputs


def random_cases(number: int) -> range:
    """Of that many random cases: half of them in Triton's interpreter, all in ``make nightly``."""
    return range(number // 2 if triton_interprets() and not option("LARGE_DRAWS", 0) else number)


def moved(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the device under test, strides kept."""
    return [t if t.device.type == DEVICE else _moved(t) for t in tensors]


def _moved(t: Tensor) -> Tensor:
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
    return out.copy_(t)


def name_of(value: object) -> str:
    """``float32`` for a dtype, the text itself otherwise: test ids."""
    return str(value).removeprefix("torch.")


def wide(*tensors: Tensor) -> list[Tensor]:
    """The same values in float64."""
    return [t.detach().double() for t in tensors]


# (exponent, softmax_scale): sizes of unscaled scores as powers of two. The rounding error of scores
# exceeds the range of 2^x in float16 from 2^28 on, in float32 from 2^31 on. float16 scores end at
# 2^34.
SCORE_SIZES = ((20, 1.0), (28, -0.25), (31, 1.0), (127, -0.25))


def scores_of_size(
    exponent: int, tokens: int, heads: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (tokens, heads, 64), of scores near 2^exponent that have no error.

    All scores of a query are 2^exponent + n * 2^max(0, exponent - 22), n in [-4, 4] by key: float32
    holds each of them and every partial sum, in any order. The last key has the largest.
    """
    exponent = min(exponent, 34) if dtype == torch.float16 else exponent
    step = max(0, exponent - 22)
    q, k = torch.zeros(2, tokens, heads, 64)
    half = (exponent - 4) // 2
    q[..., :16], k[..., :16] = 2.0**half, 2.0 ** (exponent - 4 - half)
    n = torch.randint(-4, 4, (tokens, heads), generator=generator).float()
    n[-1] = 4
    q[..., 16], k[..., 16] = 2.0 ** (step // 2), n * 2.0 ** (step - step // 2)
    v = torch.randn(tokens, heads, 64, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def assert_softmax(ours: Tensor, exact: Tensor) -> None:
    """Two units of the dtype, or 2^-11: what one rounding of a score below 2^13 may change."""
    tolerance = max(2 * torch.finfo(ours.dtype).eps, 2**-11) * float(exact.abs().max())
    torch.testing.assert_close(ours.detach().cpu().double(), exact, rtol=0, atol=tolerance)


class Tally:
    """Collects errors of ours and of plain torch against float64, then compares them.

    The largest error among a few numbers varies by chance, so a test draws each case several times
    and compares the largest errors over the draws.
    """

    def __init__(self) -> None:
        self._ours: dict[str, float] = defaultdict(float)
        self._allowed: dict[str, float] = defaultdict(float)
        self._ulp: dict[str, float] = defaultdict(float)

    def add(
        self,
        name: str,
        ours: Tensor,
        plain: Tensor,
        exact: Tensor,
        times: float = 2.0,
        largest: float | None = None,
    ) -> None:
        """Record one result.

        Args:
            times: how many times plain torch's error is allowed.
            largest: magnitude whose last place is the unit; for results that are computed from one
                another, because an expected zero has no last place. None is that of ``exact``.
        """
        # Plain torch may overflow where ours must not (16-bit norms of zero).
        ours, plain, exact = ours.detach(), plain.detach().nan_to_num(), exact.detach()
        assert ours.shape == exact.shape, name
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        if exact.numel() == 0:
            return
        ulp = torch.finfo(ours.dtype).eps * (largest or float(exact.abs().max()))
        error = float((plain.double() - exact).abs().max())
        self._ours[name] = max(self._ours[name], float((ours.double() - exact).abs().max()))
        self._allowed[name] = max(self._allowed[name], times * error)
        self._ulp[name] = max(self._ulp[name], ulp)

    def check(self) -> None:
        """Assert that there are results and that every error is within its limit."""
        assert self._ours, "nothing was compared"
        for name, error in self._ours.items():
            allowed = self._allowed[name] + self._ulp[name]
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def largest_of(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude in several tensors."""
    return max(float(t.detach().abs().max()) for t in tensors)
