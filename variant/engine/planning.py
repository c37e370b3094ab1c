"""The K/V memory of every depth and bridge.

Needs no weights and no torch: a dtype may be a torch dtype or its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.parameter_count import var_parameters, vqvae_parameters
from variant_kernels.arguments import shown
from variant_kernels.plans.cache_plan import CachePlan, item_bytes
from variant_kernels.plans.depth_schedule import DEPTH_CHAIN, DepthSchedule

KV8_NAME = "float8_e4m3fn"


@dataclass(frozen=True)
class PlanRow:
    """Cache of one depth and bridge, in bytes for the whole batch.

    paper_measured: the paper's scheme as it measured it, float32 K and 16-bit V.
    paper_same: the paper's scheme with K and V in the dtype of the products.  exact: the plan in
    that dtype, in whole pages.  ours: the plan in the dtype that K and V are kept in: the same, or
    8 bits with their scales.  merged_zone: :func:`merged_zone_bytes`.
    """

    depth: int
    bridge: int
    tokens: int
    paper_measured: int
    paper_same: int
    exact: int
    ours: int
    merged_zone: int = 0

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


def kv_dtype_name(op: str, kv_dtype: object) -> str | None:
    """The name of the dtype that ``kv_dtype`` asks for; None for None, which is exact K and V.

    Args:
        kv_dtype: None, "fp8" or torch.float8_e4m3fn.
    Raises:
        ValueError: anything else.
    """
    if kv_dtype is None:
        return None
    text = kv_dtype if isinstance(kv_dtype, str) else ""
    if type(kv_dtype).__name__ == "dtype":
        text = str(kv_dtype)
    if text in ("fp8", f"torch.{KV8_NAME}"):
        return KV8_NAME
    raise ValueError(
        f'{op}: kv_dtype must be None (exact: the dtype of the products), "fp8" or '
        f"torch.{KV8_NAME}; got {shown(kv_dtype)}"
    )


def plan_row(
    config: VARConfig,
    depth: int,
    bridge: int,
    batch: int,
    dtype: object,
    *,
    page_size: int = 16,
    guidance: bool = True,
    kv_dtype: object = None,
) -> PlanRow:
    """The plan of one depth and bridge beside the paper's scheme.

    Args:
        dtype: of the products; a torch dtype or its name.
        kv_dtype: as :class:`variant.Engine` takes it.
    Raises:
        ValueError: an unknown kv_dtype.  TypeError: an unknown dtype.
    """
    row = schedule_row(
        config,
        schedule_of(config, depth, bridge),
        batch,
        dtype,
        page_size=page_size,
        guidance=guidance,
        kv_dtype=kv_dtype,
        op="plan_row",
    )
    return replace(
        row, depth=depth, bridge=bridge, merged_zone=merged_zone_bytes(config, depth, dtype)
    )


def schedule_row(
    config: VARConfig,
    schedule: DepthSchedule,
    batch: int,
    dtype: object,
    *,
    page_size: int = 16,
    guidance: bool = True,
    kv_dtype: object = None,
    op: str = "schedule_row",
) -> PlanRow:
    """The plan of any schedule; arguments and errors of :func:`plan_row`.

    Its depth is that of the last scale, its bridge the number of first scales with every layer.
    """
    cache_dtype = kv_dtype_name(op, kv_dtype) or dtype
    plan = CachePlan(config.layout, schedule, page_size)
    heads, head_dim, width = config.num_heads, config.head_dim, item_bytes(dtype)
    zones = [depth for depth, layers in config.subnets.items() if layers in schedule.layers]
    return PlanRow(
        depth=schedule.depths[-1],
        bridge=schedule.depths.count(config.depth),
        tokens=plan.peak_page_tokens,
        paper_measured=plan.paper_bytes(batch, heads, head_dim, guidance=guidance),
        paper_same=plan.paper_bytes(
            batch, heads, head_dim, k_bytes=width, v_bytes=width, guidance=guidance
        ),
        exact=plan.peak_bytes(batch, heads, head_dim, dtype, guidance),
        ours=plan.peak_bytes(batch, heads, head_dim, cache_dtype, guidance),
        merged_zone=sum(merged_zone_bytes(config, depth, dtype) for depth in zones),
    )


def merged_zone_bytes(config: VARConfig, depth: int, dtype: object) -> int:
    """Bytes of a subnet's linear layers with their low-rank additions merged, in ``dtype``.

    The engine merges them at the first use of the depth. Other zone weights are parameters and
    used as they are.
    """
    if config.zone_weights != "lora" or depth not in config.subnets:
        return 0
    hidden = round(config.embed_dim * config.mlp_ratio)
    weights = 4 * config.embed_dim**2 + 2 * config.embed_dim * hidden
    return depth * weights * item_bytes(dtype)


def weight_bytes(var: VARConfig, vae: VQVAEConfig, dtype: object) -> int:
    """Bytes of the transformer in ``dtype`` and of the VQ-VAE in float32."""
    return var_parameters(var) * item_bytes(dtype) + 4 * vqvae_parameters(vae)
