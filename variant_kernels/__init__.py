"""Kernels, schedules and caches for visual autoregressive models.

The names below are the public ones; ``python -m variant_kernels`` says what runs where.
"""

from variant_kernels.attention import VARiantAttention
from variant_kernels.backends import available_backends, explain, use_backend
from variant_kernels.integrations import patch
from variant_kernels.kv_cache import KVStep, PagedKVCache
from variant_kernels.ops.adaln import adaln_modulate, gated_residual_adaln
from variant_kernels.ops.append_paged_kv import append_paged_kv
from variant_kernels.ops.block_causal_attention import block_causal_attention
from variant_kernels.ops.paged_attention import paged_attention
from variant_kernels.ops.qk_norm import qk_norm
from variant_kernels.ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv
from variant_kernels.ops.sample_tokens import sample_tokens
from variant_kernels.plans.cache_plan import CachePlan, KVLifetime
from variant_kernels.plans.depth_schedule import DepthSchedule, select_layers
from variant_kernels.plans.scale_layout import ScaleLayout

__version__ = "0.1.0"

__all__ = [
    "CachePlan",
    "DepthSchedule",
    "KVLifetime",
    "KVStep",
    "PagedKVCache",
    "ScaleLayout",
    "VARiantAttention",
    "adaln_modulate",
    "append_paged_kv",
    "available_backends",
    "block_causal_attention",
    "explain",
    "gated_residual_adaln",
    "paged_attention",
    "patch",
    "qk_norm",
    "qk_norm_append_paged_kv",
    "sample_tokens",
    "select_layers",
    "use_backend",
]
