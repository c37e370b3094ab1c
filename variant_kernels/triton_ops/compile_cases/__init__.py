"""The cases of the compile report: for every Triton kernel the shapes and dtypes that are compiled.

One module per op, each a table ``CASES``; kernel files hold kernels and launchers only.
"""

from variant_kernels.triton_ops.compile_cases import (
    adaln,
    append_paged_kv,
    block_causal_attention,
    group_norm,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)

COMPILE_CASES = (
    *adaln.CASES,
    *append_paged_kv.CASES,
    *block_causal_attention.CASES,
    *group_norm.CASES,
    *paged_attention.CASES,
    *qk_norm.CASES,
    *qk_norm_append_paged_kv.CASES,
    *sample_tokens.CASES,
)
