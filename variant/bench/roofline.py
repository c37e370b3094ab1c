"""Peak rates of this machine, measured in the same run as everything else: the roofline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from variant.bench.interleaved import Call, time_interleaved
from variant.torch_modes import modes_of_a_new_process
from variant_kernels.dispatch.request import dtype_name

# Rows, inputs, outputs: the first MLP layer of VAR-d16 on the last scale with guidance.
GEMM = (512, 1024, 4096)
GEMM_CUDA = (8192, 8192, 8192)
# A CPU that emulates a dtype multiplies fewer rows: at 1.3 GFLOP/s, the rate of bfloat16 on one
# thread of an AVX2 processor, all of them take 3 s.
PRODUCT_SECONDS = 0.2
MIN_ROWS = 32
# Far beyond any cache.
COPY_BYTES = 256 * 2**20
COPY_BYTES_CUDA = 2**30


@dataclass(frozen=True)
class Peaks:
    """gemm: FLOP/s of torch's matrix product by dtype.  copy: bytes/s, read and written counted."""

    gemm: dict[str, float]
    copy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def seconds(self, dtype: str, flop: float, moved: float) -> tuple[float, str]:
        """The shortest possible time, seconds, and its bound: "compute" or "memory"."""
        compute, memory = flop / self.gemm[dtype], moved / self.copy
        return (compute, "compute") if compute > memory else (memory, "memory")


@modes_of_a_new_process()
def measure_peaks(
    device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float32,), *, quick: bool = False
) -> Peaks:
    """GEMM rate of each dtype and copy bandwidth: a few seconds a dtype, with ``quick`` under one.

    A dtype that the processor computes slowly (bfloat16 without bfloat16 products: a thirtieth of
    the float32 rate) is measured on fewer rows, so that its time is bounded on any machine.
    """
    size = COPY_BYTES_CUDA if device == "cuda" else COPY_BYTES
    source = torch.ones(size // (8 if quick else 1) // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    flop: dict[str, int] = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        calls[name], flop[name] = _gemm(device, dtype)
    samples = time_interleaved(calls, rounds=5 if quick else 15, device=device)
    return Peaks(
        gemm={name: flop[name] / samples[name].median for name in flop},
        copy=2 * source.nbytes / samples["copy"].median,
    )


def _gemm(device: str, dtype: torch.dtype) -> tuple[Call, int]:
    """A matrix product of that dtype, and its FLOP."""
    rows, inputs, outputs = GEMM_CUDA if device == "cuda" else GEMM
    right = torch.randn(inputs, outputs, device=device).to(dtype)
    if device == "cpu":
        rows = _rows_within_budget(rows, right)
    left = torch.randn(rows, inputs, device=device).to(dtype)
    out = torch.empty(rows, outputs, device=device, dtype=dtype)
    return lambda: torch.mm(left, right, out=out), 2 * rows * inputs * outputs


def _rows_within_budget(rows: int, right: Tensor) -> int:
    """The most rows whose product takes at most PRODUCT_SECONDS; at least MIN_ROWS."""
    few = torch.randn(MIN_ROWS, right.shape[0], device="cpu").to(right.dtype)
    torch.mm(few, right)  # the first call of a dtype compiles its kernel
    begin = time.perf_counter()
    torch.mm(few, right)
    seconds = time.perf_counter() - begin
    while rows > MIN_ROWS and seconds * rows / MIN_ROWS > PRODUCT_SECONDS:
        rows //= 2
    return rows


def drift(start: Peaks, end: Peaks) -> dict[str, float]:
    """Each peak at the end over that at the start: how steady the machine was."""
    changes = {f"gemm {name}": end.gemm[name] / rate for name, rate in start.gemm.items()}
    return {**changes, "copy": end.copy / start.copy}
