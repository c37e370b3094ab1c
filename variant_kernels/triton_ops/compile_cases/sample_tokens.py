"""Compile-report cases of ``triton_ops/sample_tokens.py``."""

from __future__ import annotations

from collections.abc import Iterator

from variant_kernels.triton_ops.common import padded
from variant_kernels.triton_ops.compile_cases.case import (
    CompileCase,
    argument_types,
    warps_by_target,
)
from variant_kernels.triton_ops.sample_tokens import ENTRIES_PER_THREAD, sample_tokens_kernel

_TYPES = {
    **dict.fromkeys(("batch", "tokens", "top_k"), "i32"),
    **dict.fromkeys(("cond_weight", "uncond_weight", "one_minus_top_p"), "fp32"),
    **dict.fromkeys(("seed", "position"), "i64"),
    **dict.fromkeys(("seed_ptr", "image_ids_ptr", "out_ptr"), "*i64:16"),
    "logits_ptr": "*T:16",
    "guidance_ptr": "*fp64:16",
    "exponential_ptr": "*fp32:16",
    **dict.fromkeys(("stride_b", "stride_t"), "i32:16"),
}
_SEEDED = ("guidance_ptr", "seed_ptr", "exponential_ptr")
# Codebook entries, whether top-k and top-p run, pointers that are None, label.
_TABLE = (
    (4096, True, _SEEDED, "filtered"),
    (4096, True, ("exponential_ptr",), "filtered, for a graph"),
    (4096, True, ("guidance_ptr", "seed_ptr"), "filtered, multinomial"),
    (4096, False, _SEEDED, "all"),
    (1000, True, _SEEDED, "filtered"),
    (65536, True, _SEEDED, "filtered"),
)


def _cases() -> Iterator[CompileCase]:
    for entries, filtered, absent, label in _TABLE:
        block_v = padded(entries)
        constants = {
            **dict.fromkeys(absent),
            "image_stride": 1,
            "GUIDED": True,
            "TOP_K": filtered,
            "TOP_P": filtered,
            "V": entries,
            "BLOCK_V": block_v,
        }
        for targets, num_warps in warps_by_target(block_v, ENTRIES_PER_THREAD):
            yield CompileCase(
                kernel=sample_tokens_kernel,
                arguments=argument_types(sample_tokens_kernel, constants, _TYPES),
                constants=constants,
                num_warps=num_warps,
                num_stages=1,
                targets=targets,
                label=f"V {entries}, {label}",
                fp_fusion=False,
            )


CASES = tuple(_cases())
