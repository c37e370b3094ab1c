"""What a run measures: on a GPU, and in the rehearsal, where everything is tiny and on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The kernel cases, by bench file and name. The first ones answer most questions: block-causal
# attention, paged attention and sampling at the sizes of VAR-d30.
_ATTENTION = tuple(
    ("block_causal_attention", f"L{shape}-heads30-head_dim64-bfloat16-{direction}")
    for shape in ("680-batch64", "2240-batch16")
    for direction in ("forward", "forward+backward")
)
_ROWS = (
    ("paged_attention", "layout256-scale9-rows128-heads30-bfloat16"),
    ("sample_tokens", "batch64-tokens256-bfloat16-seed"),
)
_MORE = (
    ("paged_attention", "layout256-kv8-scale9-rows128-heads30-bfloat16"),
    *(("block_causal_attention", name.replace("-bfloat16", "-qk_norm-bfloat16"))
      for _, name in _ATTENTION),
)  # fmt: skip
_HMAR = tuple((op, name.replace("bfloat16", "float16")) for op, name in _ATTENTION)


@dataclass(frozen=True)
class Settings:
    """Everything that differs between a run and its rehearsal.

    kernels: cases timed without peers that must be compiled, in this order.  compiled: cases timed
    again with them.  batches, depths, rounds: of the engine; the first two depths come first.
    smoke: arguments of pytest, by name.  tests: the same for the last step.
    """

    device: str
    model: str
    dtype: str
    batches: tuple[int, ...]
    depths: tuple[int, ...]
    bridge: int | None
    rounds: dict[int, int]
    kernels: tuple[tuple[str, str], ...]
    compiled: tuple[tuple[str, str], ...]
    quick: bool
    training_batch: int
    training_depths: tuple[int, ...]
    training_rounds: tuple[int, ...]
    memory_gib: float
    memory_small: tuple[int, int]
    memory_depths: tuple[int, ...]
    smoke: dict[str, tuple[str, ...]]
    tests: dict[str, tuple[str, ...]]
    var_repo: Path | None = None
    hmar_repo: Path | None = None


# A file that needs a package which is not installed costs its own tests alone.
_PYTEST = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")

GPU = Settings(
    device="cuda",
    model="var-d30",
    dtype="bfloat16",
    batches=(64, 1),
    depths=(30, 8, 16, 4, 2),
    bridge=6,
    rounds={64: 3, 1: 10},
    kernels=(*_ATTENTION, *_ROWS, *_MORE),
    compiled=(*_ATTENTION, *_HMAR),
    quick=False,
    # At 64 the activations of VAR-d30 alone are more than 100 GB.
    training_batch=16,
    training_depths=(30, 16),
    training_rounds=(2, 8),
    # The memory of the GPU in the paper.
    memory_gib=48,
    memory_small=(4, 12),
    memory_depths=(30, 8),
    smoke={
        "golden model": (
            *(*_PYTEST, "tests/gpu/test_engine_on_gpu.py", "-k"),
            "plain and (equals_the_original and triton) or graphs_give or (as_near_as_autocast "
            "and triton and bfloat16 and plain)",
        ),
        "small cases": (*_PYTEST, "tests/gpu/test_small_cases.py"),
    },
    tests={
        "kernels": (*_PYTEST, "-n", "8", "tests/kernels", "-k", "triton or cuda or reference"),
        "engine": (*_PYTEST, "tests/gpu"),
    },
)

REHEARSAL = Settings(
    device="cpu",
    model="digits",
    dtype="bfloat16",
    batches=(2, 1),
    depths=(8, 2),
    bridge=4,
    rounds={2: 2, 1: 2},
    kernels=(
        ("block_causal_attention", "L91-batch1-float32-forward"),
        ("paged_attention", "layout256-scale0-rows2-float32"),
        ("sample_tokens", "batch1-tokens16-float32-seed"),
    ),
    compiled=(("block_causal_attention", "L91-batch1-float32-forward"),),
    quick=True,
    training_batch=1,
    training_depths=(8, 4),
    training_rounds=(1, 2),
    memory_gib=1,
    memory_small=(1, 2),
    memory_depths=(8,),
    smoke={
        "golden model": (*_PYTEST, "tests/kernels/test_tensors.py"),
        "small cases": (*_PYTEST, "tests/gpu/test_small_cases.py"),
    },
    tests={"kernels": (*_PYTEST, "-n", "1", "tests/kernels/test_tensors.py")},
)
