"""What a cache costs at every depth and bridge, and what fits a device: no weights needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from variant.engine.kv_dtype import KVDtype, check_kv_dtype
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import CachePlan, DepthSchedule
from variant_kernels.plans.depth_schedule import DEPTH_CHAIN


@dataclass(frozen=True)
class PlanRow:
    """Cache of one depth and bridge, in bytes for the whole batch.

    paper_measured: the paper's scheme as it measured it, float32 K and 16-bit V.
    paper_same: the paper's scheme with K and V in the dtype of the products.  exact: the plan in
    that dtype, in whole pages.  ours: the plan in the dtype that K and V are kept in: the same, or
    8 bits with their scales.
    """

    depth: int
    bridge: int
    tokens: int
    paper_measured: int
    paper_same: int
    exact: int
    ours: int

    @property
    def share(self) -> float:
        """Ours over the paper's scheme in the dtype of the products."""
        return self.ours / self.paper_same


def depths_of(config: VARConfig) -> tuple[int, ...]:
    """Full depth and every subnet: those of the config, or the paper's chain."""
    subnets = config.subnets or {d: () for d in DEPTH_CHAIN if d < config.depth}
    return (config.depth, *sorted(subnets, reverse=True))


def schedule_of(config: VARConfig, depth: int, bridge: int) -> DepthSchedule:
    """Schedule of a depth with the layers that the config records, where it does."""
    scales = len(config.patch_nums)
    if depth == config.depth:
        return DepthSchedule.full(config.depth, scales)
    return DepthSchedule(config.depth, scales, config.subnets.get(depth, depth), bridge)


def plan_row(
    config: VARConfig,
    depth: int,
    bridge: int,
    batch: int,
    dtype: torch.dtype,
    *,
    page_size: int = 16,
    guidance: bool = True,
    kv_dtype: KVDtype = None,
) -> PlanRow:
    """The plan of one depth and bridge beside the paper's scheme.

    Raises:
        ValueError: a kv_dtype that no engine takes.
    """
    kept = check_kv_dtype("plan_row", kv_dtype) or dtype
    plan = CachePlan(config.layout, schedule_of(config, depth, bridge), page_size)
    heads, head_dim, width = config.num_heads, config.head_dim, dtype.itemsize
    return PlanRow(
        depth=depth,
        bridge=bridge,
        tokens=plan.peak_page_tokens,
        paper_measured=plan.paper_bytes(batch, heads, head_dim, guidance=guidance),
        paper_same=plan.paper_bytes(
            batch, heads, head_dim, k_bytes=width, v_bytes=width, guidance=guidance
        ),
        exact=plan.peak_bytes(batch, heads, head_dim, dtype, guidance),
        ours=plan.peak_bytes(batch, heads, head_dim, kept, guidance),
    )


def weight_bytes(var: VARConfig, vae: VQVAEConfig, dtype: torch.dtype) -> int:
    """Bytes of the transformer in ``dtype`` and of the VQ-VAE in float32."""
    with torch.device("meta"):
        transformer, decoder = VAR(var), VQVAE(vae)
    count = sum(p.numel() for p in transformer.parameters())
    return count * dtype.itemsize + sum(4 * p.numel() for p in decoder.parameters())
