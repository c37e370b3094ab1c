"""Kernels, schedules and caches for visual autoregressive models.

The names below are the public ones; ``python -m variant_kernels`` says what runs where.
"""

from __future__ import annotations

# In place of typing's, which type checkers read alike: see variant/__init__.py.
TYPE_CHECKING = False
if TYPE_CHECKING:
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

# Imported at first use: plans are arithmetic and must not wait for torch.
_MODULES = {
    "CachePlan": "plans.cache_plan",
    "DepthSchedule": "plans.depth_schedule",
    "KVLifetime": "plans.cache_plan",
    "KVStep": "kv_cache",
    "PagedKVCache": "kv_cache",
    "ScaleLayout": "plans.scale_layout",
    "VARiantAttention": "attention",
    "adaln_modulate": "ops.adaln",
    "append_paged_kv": "ops.append_paged_kv",
    "available_backends": "backends",
    "block_causal_attention": "ops.block_causal_attention",
    "explain": "backends",
    "gated_residual_adaln": "ops.adaln",
    "paged_attention": "ops.paged_attention",
    "patch": "integrations",
    "qk_norm": "ops.qk_norm",
    "qk_norm_append_paged_kv": "ops.qk_norm_append_paged_kv",
    "sample_tokens": "ops.sample_tokens",
    "select_layers": "plans.depth_schedule",
    "use_backend": "backends",
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'variant_kernels' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"variant_kernels.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
