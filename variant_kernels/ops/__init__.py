"""One file per op: plain-torch definition, checks, declaration, public function."""

from __future__ import annotations

from variant_kernels.dispatch.select import Backend
from variant_kernels.ops.adaln import adaln_op, gated_op
from variant_kernels.ops.append_paged_kv import append_paged_kv_op
from variant_kernels.ops.block_causal_attention import block_causal_attention_op
from variant_kernels.ops.paged_attention import paged_attention_op
from variant_kernels.ops.qk_norm import qk_norm_op
from variant_kernels.ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv_op
from variant_kernels.ops.sample_tokens import sample_tokens_op


def tables() -> dict[str, dict[str, Backend]]:
    """Backends of every op, by the op's public name."""
    ops = (
        block_causal_attention_op,
        paged_attention_op,
        qk_norm_op,
        append_paged_kv_op,
        qk_norm_append_paged_kv_op,
        adaln_op,
        gated_op,
        sample_tokens_op,
    )
    return {op.title: op.backends for op in ops}
