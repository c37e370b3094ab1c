"""What this machine can do at most, measured in the same run as everything else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from variant.bench.alternate import alternate
from variant_kernels.backends import dtype_name

# Rows, inputs, outputs: the first MLP layer of VAR-d16 on the last scale with guidance.
GEMM = (512, 1024, 4096)
GEMM_CUDA = (8192, 8192, 8192)
# Far beyond any cache.
COPY_BYTES = 256 * 2**20
COPY_BYTES_CUDA = 2**30


@dataclass(frozen=True)
class Limits:
    """gemm: FLOP/s of torch's matrix product by dtype.  copy: bytes/s, read and written counted."""

    gemm: dict[str, float]
    copy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def seconds(self, dtype: str, flop: float, moved: float) -> tuple[float, str]:
        """The shortest possible time of some work, and what bounds it: "compute" or "memory"."""
        compute, memory = flop / self.gemm[dtype], moved / self.copy
        return (compute, "compute") if compute > memory else (memory, "memory")


def measure_limits(device: str = "cpu", *, quick: bool = False) -> Limits:
    """GEMM rate per dtype and copy bandwidth; a few seconds, with ``quick`` less than one."""
    rows, inputs, outputs = GEMM_CUDA if device == "cuda" else GEMM
    size = COPY_BYTES_CUDA if device == "cuda" else COPY_BYTES
    source = torch.ones(size // (8 if quick else 1) // 4, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    sixteen = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,)
    for dtype in (torch.float32, *sixteen):
        left = torch.randn(rows, inputs, device=device).to(dtype)
        right = torch.randn(inputs, outputs, device=device).to(dtype)
        out = torch.empty(rows, outputs, device=device, dtype=dtype)
        calls[dtype_name(dtype)] = lambda a=left, b=right, c=out: torch.mm(a, b, out=c)
    found = alternate(calls, rounds=5 if quick else 15, device=device)
    flop = 2 * rows * inputs * outputs
    return Limits(
        gemm={name: flop / samples.median for name, samples in found.items() if name != "copy"},
        copy=2 * source.nbytes / found["copy"].median,
    )


def drift(start: Limits, end: Limits) -> dict[str, float]:
    """Each limit at the end over that at the start: how steady the machine was."""
    changes = {f"gemm {name}": end.gemm[name] / rate for name, rate in start.gemm.items()}
    return {**changes, "copy": end.copy / start.copy}
