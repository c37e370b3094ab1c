"""Compile-report cases of block_causal_attention: every config, and the smallest arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from variant_kernels.plans.attention_tiles import cut_keys, cut_queries
from variant_kernels.triton_ops import block_causal_attention as forward
from variant_kernels.triton_ops import block_causal_attention_configs as configs
from variant_kernels.triton_ops.block_causal_attention_backward import (
    block_causal_attention_dkv_kernel,
    block_causal_attention_dq_kernel,
)
from variant_kernels.triton_ops.compile_cases.case import (
    FAMILY_TARGETS,
    CompileCase,
    argument_types,
)
from variant_kernels.triton_ops.tuning import Config

# The ten scales of the 256x256 models.
_LENGTHS = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
_TYPES = {
    **dict.fromkeys(("lse_ptr", "statistics_ptr", "scale_ptr"), "*fp32:16"),
    "*_ptr": "*T:16",
    "*_stride_?": "i32:16",
    **dict.fromkeys(("length", "heads"), "i32"),
    **dict.fromkeys(("softmax_scale", "scale_log2"), "fp32"),
}
# Pointers that are None without qk_norm.
_QK_NORM_ONLY = ("scale_ptr", "near_q_ptr", "raw_k_ptr")


def _case(
    kernel: Any,
    config: Config,
    qk_norm: bool,
    scale_lengths: tuple[int, ...],
    head_dim: int,
    label: str,
    ones: dict[str, int] | None = None,
    **options: Any,
) -> CompileCase:
    cut = cut_keys if kernel is block_causal_attention_dkv_kernel else cut_queries
    cuts = cut(scale_lengths, config.block_q, config.block_k)
    constants = {**forward.constants(scale_lengths, head_dim, config, cuts), **(ones or {})}
    if "NEGATE" in kernel.arg_names:
        constants = {**constants, "NEGATE": False}
    if not qk_norm:
        constants = {
            **constants,
            **{name: None for name in _QK_NORM_ONLY if name in kernel.arg_names},
        }
    return CompileCase(
        kernel=kernel,
        arguments=argument_types(kernel, constants, _TYPES),
        constants=constants,
        **config.options,
        label=label + (", qk_norm" if qk_norm else ""),
        **options,
    )


def _cases(kernel: Any, table: configs.Table) -> Iterator[CompileCase]:
    for kind, target in FAMILY_TARGETS.items():
        for head_dim in (64, 128, 256):
            float32 = configs.FLOAT32 if head_dim == 64 else configs.FLOAT32_WIDE
            entries = [(config, ("bf16", "fp16")) for config in table[kind][head_dim]]
            entries += [(config, ("fp32",)) for config in float32]
            for config, dtypes in entries:
                for qk_norm in (False, True):
                    yield _case(
                        kernel,
                        config,
                        qk_norm,
                        _LENGTHS,
                        head_dim,
                        f"D {head_dim}, {config.block_q} x {config.block_k}",
                        targets=(target,),
                        dtypes=dtypes,
                    )
    # An integer argument of 1 is a constant to the compiler.
    config = table["nvidia"][64][0]
    for qk_norm in (False, True):
        ones = {"length": 1, "heads": 1}
        yield _case(kernel, config, qk_norm, (1,), 24, "one token, one head, D 24", ones)


CASES = (
    *_cases(forward.block_causal_attention_forward_kernel, configs.FORWARD),
    *_cases(block_causal_attention_dq_kernel, configs.DQ),
    *_cases(block_causal_attention_dkv_kernel, configs.DKV),
)
