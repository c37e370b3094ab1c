"""Memory of a generation: bytes per image, free bytes, and the batch size that fits."""

from __future__ import annotations

from pathlib import Path

import torch

from variant.engine.kernels import Launchers
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant_kernels import CachePlan
from variant_kernels.arguments import integer

# The rest stays free for the allocator's rounding, other processes and the operating system.
USABLE_SHARE = 0.8
# In a snapshot of torch's allocator, the pool of memory that no graph owns.
ORDINARY_POOL = (0, 0)


def free_bytes(device: torch.device) -> int:
    """Bytes that a large allocation may take on ``device``.

    On a GPU: the bytes that the driver reports as free plus those that torch's allocator caches,
    without those that it caches in the pools of CUDA graphs: only graphs can use them.
    On the CPU: MemAvailable, limited by the control groups of this process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + cached - idle_pool_bytes(device)) * USABLE_SHARE)
    return int(min(_available(), _group_limit()) * USABLE_SHARE)


def idle_pool_bytes(device: torch.device, pool: tuple[int, int] | None = None) -> int:
    """Bytes that torch caches in the pool of CUDA graphs, or in all such pools; no tensor has them.

    Args:
        device: a GPU.
        pool: as ``torch.cuda.graph_pool_handle`` gave it; None is all pools but the ordinary one.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    idle = 0
    for segment in torch.cuda.memory_snapshot():
        owner = tuple(segment["segment_pool_id"])
        if segment["device"] == index and (owner == pool if pool else owner != ORDINARY_POOL):
            idle += segment["total_size"] - segment["allocated_size"]
    return idle


def check_fits(where: str, what: str, num_bytes: int, device: torch.device) -> None:
    """Refuses weights before they are built, where the device has no memory for them.

    Args:
        where: names the recipe or file in the message.  what: names the tensors.
    Raises:
        UserError: they need more than :func:`free_bytes`.
    """
    free = free_bytes(device)
    if num_bytes > free:
        raise UserError(
            f"{where}: {what} need {num_bytes / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are "
            f"free on {device}; use a smaller model or a machine with more memory"
        )


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _group_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that this process's control groups (version 2) still allow; inf without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    # "0::/a/b" is the version 2 line; every parent group may set a limit of its own.
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [root.joinpath(*own.split("/")[:n]) for n in range(len(own.split("/")) + 1)]
    return min((_free_in_group(folder) for folder in folders), default=float("inf"))


def _free_in_group(folder: Path) -> float:
    """Bytes that one group still allows; reclaimable file cache counts as free."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("slab_reclaimable", 0))
    return max(int(limit) - used + reclaimable, 0)


def image_bytes(
    var: VARConfig,
    vae: VQVAEConfig,
    plan: CachePlan,
    dtype: torch.dtype,
    launchers: Launchers,
    *,
    guidance: bool,
    packed: bool,
    extra_logit_bytes: int = 0,
) -> int:
    """Bytes that one more image in a batch needs: its K/V pages and the largest temporary tensors.

    Args:
        var, vae: sizes of the two models.
        plan: of the schedule that runs.
        dtype: of the matrix products.
        launchers: give the dtype of K and V, and whether attention stores scores.
        guidance: an unconditional sequence runs beside each conditional one.
        packed: the decoder is packed and decodes one image at a time.
        extra_logit_bytes: :func:`variant.engine.drawing.extra_logit_bytes`.
    """
    item, layout = dtype.itemsize, var.layout
    num_sequences = 2 if guidance else 1
    kv = plan.peak_bytes(1, var.num_heads, var.head_dim, launchers.pages_dtype, guidance)
    tokens = max(layout.tokens) * num_sequences
    hidden = round(var.embed_dim * var.mlp_ratio)
    # A layer: the residual stream before and after (float32), the packed projection, q, k, the
    # output of attention, the two hidden tensors of the MLP. Or the logits, twice in float32.
    layer = tokens * (8 * var.embed_dim + (7 * var.embed_dim + 2 * hidden) * item)
    if launchers.attention_dtype != dtype:  # q, k, v, the normalised q and the output, cast
        layer += 5 * tokens * var.embed_dim * launchers.attention_dtype.itemsize
    logits = tokens * var.vocab_size * (item + 8)
    logits += max(layout.tokens) * var.vocab_size * extra_logit_bytes
    if launchers.stores_scores:  # twice, in float32
        layer += 4 * num_sequences * layout.total * 2 * var.embed_dim
        layer += 8 * var.num_heads * tokens * layout.total
    return kv + max(layer, logits, 0 if packed else _decoded_image_bytes(vae))


def decoder_bytes(vae: VQVAEConfig, *, packed: bool) -> int:
    """Bytes that decoding needs at any batch size: a packed decoder decodes one image at a time."""
    return _decoded_image_bytes(vae) if packed else 0


def _decoded_image_bytes(vae: VQVAEConfig) -> int:
    """Six float32 feature maps at the resolution of the image."""
    return vae.image_size**2 * vae.ch * 4 * 6


def largest_batch(count: int, max_batch: int | None) -> int:
    """Images per batch where memory sets no limit: at most ``count`` and ``max_batch``.

    Raises:
        TypeError, ValueError: max_batch is not None or a positive integer.
    """
    limit = count if max_batch is None else integer("generate", "max_batch", max_batch, 1)
    return min(count, limit)


def batch_size(
    count: int, max_batch: int | None, *, per_image: int, fixed: int, available: int
) -> int:
    """Images per batch: at most ``count`` and ``max_batch``, within the available bytes.

    Args:
        count: images of the request.
        max_batch: the caller's limit; None is no limit.
        per_image: :func:`image_bytes`.  fixed: :func:`decoder_bytes`.
        available: :func:`free_bytes`.
    Raises:
        TypeError, ValueError: max_batch is not a positive integer.
        MemoryError: one image, or ``max_batch`` images where that is given, do not fit.
    """
    limit = largest_batch(count, max_batch)
    largest = (available - fixed) // per_image
    required = 1 if max_batch is None else limit
    if largest < required:
        raise MemoryError(
            f"generate: {required} image(s) at once need "
            f"{(per_image * required + fixed) / 2**20:.0f} MiB, "
            f"but {available / 2**20:.0f} MiB are free; use a smaller depth, bridge or max_batch"
        )
    return min(limit, largest)
