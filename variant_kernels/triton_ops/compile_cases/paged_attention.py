"""Compile-report cases of ``triton_ops/paged_attention.py``: every config, and an unsplit call."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from typing import Any

from variant_kernels.triton_ops.compile_cases.case import (
    DTYPES,
    FAMILY_TARGETS,
    CompileCase,
    argument_types,
)
from variant_kernels.triton_ops.e4m3 import NO_SCALES
from variant_kernels.triton_ops.paged_attention import (
    BLOCK_ROWS,
    paged_attention_combine_kernel,
    paged_attention_kernel,
)
from variant_kernels.triton_ops.paged_attention_configs import (
    WIDE_OR_FP32,
    configs_by_queries,
    without_page_numbers,
)


def _case(kv8: bool, constants: dict[str, Any], norm: bool = False, **options: Any) -> CompileCase:
    constants = {"lens_stride": 1, "KV8": kv8, **constants}
    if not norm:
        constants["scale_ptr"] = None
    if not kv8:
        constants.update(NO_SCALES)
    types = {
        "?_scales_ptr": "*u8:16",
        "?_scales_stride_?": "i32",
        "q_ptr": "*T:16",
        **dict.fromkeys(("k_ptr", "v_ptr"), "*u8:16" if kv8 else "*T:16"),
        **dict.fromkeys(("table_ptr", "lens_ptr"), "*i32:16"),
        **dict.fromkeys(("out_ptr", "statistics_ptr", "scale_ptr"), "*fp32:16"),
        "?_stride_?": "i32:16",
        **dict.fromkeys(("table_stride", "batch", "num_queries", "heads"), "i32"),
        **dict.fromkeys(("num_pages", "entries", "splits"), "i32"),
        "scale_log2": "fp32",
    }
    return CompileCase(
        kernel=paged_attention_kernel,
        arguments=argument_types(paged_attention_kernel, constants, types),
        constants=constants,
        **options,
    )


def _cases() -> Iterator[CompileCase]:
    modes = product(FAMILY_TARGETS.items(), (False, True), (False, True))
    for (kind, target), kv8, consecutive in modes:
        for head_dim, by_queries, dtypes in (
            (64, configs_by_queries(kind, False, kv8), ("bf16", "fp16")),
            (128, configs_by_queries(kind, True, kv8), ("bf16", "fp16")),
            (64, {128: WIDE_OR_FP32}, ("fp32",)),
            (256, {128: WIDE_OR_FP32}, DTYPES),
        ):
            # Each config once, in order.
            configs = chain.from_iterable(by_queries.values())
            if consecutive:
                configs = map(without_page_numbers, configs)
            for config in dict.fromkeys(configs):
                constants = {
                    "CONSECUTIVE": consecutive,
                    "NEGATE": False,
                    "SPLIT": True,
                    "PAGE_SIZE": 16,
                    "D": head_dim,
                    "D_PADDED": head_dim,
                    "BLOCK_Q": config.block_q,
                    "BLOCK_K": config.block_k,
                }
                # Consecutive pages with the norm of the queries: as the engine calls it.
                yield _case(
                    kv8,
                    constants,
                    norm=consecutive,
                    **config.options,
                    targets=(target,),
                    dtypes=dtypes,
                    label=f"D {head_dim}, {config.block_q} x {config.block_k}"
                    + (", 8 bits" if kv8 else "")
                    + (", consecutive pages, query norm" if consecutive else ""),
                )
    # Without a split no statistics are written: another kernel.
    for kv8 in (False, True):
        yield _case(
            kv8,
            {
                "statistics_ptr": None,
                "CONSECUTIVE": False,
                "NEGATE": True,
                "SPLIT": False,
                "PAGE_SIZE": 5,
                "D": 24,
                "D_PADDED": 32,
                "BLOCK_Q": 16,
                "BLOCK_K": 32,
            },
            num_warps=4,
            num_stages=2,
            label="in one part, D 24" + (", 8 bits" if kv8 else ""),
        )
    yield CompileCase(
        kernel=paged_attention_combine_kernel,
        arguments={
            "parts_ptr": "*fp32:16",
            "statistics_ptr": "*fp32:16",
            "out_ptr": "*T:16",
            "num_rows": "i32",
            "splits": "i32",
            "scale_log2": "fp32",
        },
        constants={"D": 64, "D_PADDED": 64, "BLOCK_R": BLOCK_ROWS},
        num_warps=4,
        num_stages=1,
        label="D 64",
    )


CASES = tuple(_cases())
