"""One file per op: contract, plain-torch definition, backends, autograd."""

from __future__ import annotations

from variant_kernels.dispatch.select import Impl
from variant_kernels.ops import (
    adaln,
    append_paged_kv,
    block_causal_attention,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)


def tables() -> dict[str, dict[str, Impl]]:
    """Backends of every op, by the op's public name."""
    return {
        **block_causal_attention.IMPLS,
        **paged_attention.IMPLS,
        **qk_norm.IMPLS,
        **append_paged_kv.IMPLS,
        **qk_norm_append_paged_kv.IMPLS,
        **adaln.IMPLS,
        **sample_tokens.IMPLS,
    }
