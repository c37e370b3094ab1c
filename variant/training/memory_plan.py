"""The memory of a training step on one GPU, and the fastest way that fits.

Plain Python on integers: no weights, no torch. The factors were measured as live bytes of tensors
during steps of small models; a test compares the plan with such measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.flops import attention_flop, training_flop
from variant.models.parameter_count import block_parameters, var_parameters, vqvae_parameters
from variant_kernels.plans.depth_schedule import DepthSchedule

Mode = Literal["single", "ddp", "fsdp2"]
Checkpointing = Literal["none", "attention", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "attention", "full")
# The same numbers as in token_loss.py and encode.py, which import torch.
CHUNK_LOGITS = 2**21
IMAGES_ENCODED = 16
# Share of a GPU's memory that tensors can use: the rest is for the CUDA context, for the buffers of
# collectives and for gaps between tensors.
USABLE = 0.94


@dataclass(frozen=True)
class TrainingRow:
    """One way to compute a step, and its memory in bytes on one GPU.

    mode: "single" process, "ddp" or "fsdp2".  parts: parts of a batch.  images: in each part.
    weights, gradients, optimizer, ema: float32; optimizer is AdamW's two moments.
    casts: weights in the dtype of the products: of all layers, or of those that FSDP2 gathers.
    activations: kept by the forward pass.  working: of the block whose backward pass runs.
    logits: of one chunk of tokens, and the sum of the head's gradient.
    encoder: the VQ-VAE while it encodes a part; not there when a run trains from tokens.
    work: arithmetic of a step over that of a step that recomputes nothing.
    """

    mode: Mode
    checkpointing: Checkpointing
    parts: int
    images: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    casts: int
    activations: int
    working: int
    logits: int
    encoder: int
    work: float

    @property
    def total(self) -> int:
        """The peak: the largest sum of what lives at once.

        Images are encoded before the transformer keeps anything of a part; the loss has its
        gradients before the backward pass of the blocks begins. The gradients of the only part of a
        batch grow while its activations are freed; DDP has memory for them in any case.
        """
        state = self.weights + self.optimizer + self.ema
        if self.mode == "ddp" or self.parts > 1:
            state += self.gradients
        # With full checkpointing no block keeps the casts of its weights for the backward pass.
        working = self.working + (0 if self.checkpointing == "full" else self.casts)
        last_blocks = self.activations + max(self.casts + self.logits, working)
        first_blocks = self.gradients + self.working
        return state + max(self.encoder, last_blocks, first_blocks)


def activation_bytes(config: VARConfig, width: int, checkpointing: Checkpointing) -> int:
    """Bytes that the forward pass keeps for the backward pass, per token, layer and channel.

    The residual stream is float32 and kept twice a block. Of ``width`` bytes are: the inputs of the
    two norms' branches and their outputs (4), queries, keys, values and the result of attention
    (4), and the hidden layer of the MLP (``mlp_ratio``). Its GELU is kept in float32 and computed
    again in 16 bits.
    """
    if checkpointing == "full":
        return 4
    attention = 0 if checkpointing == "attention" else 4
    hidden = config.mlp_ratio * (2 if width == 4 else 1)
    return 8 + round((4 + attention + hidden) * width)


def working_bytes(config: VARConfig, width: int, checkpointing: Checkpointing) -> int:
    """Bytes per token and channel of the block in work: its GELU and the gradients at it.

    A block that is computed again from its input keeps all of its inside, its GELU too.
    """
    gelu = round(2 * config.mlp_ratio * width)
    if checkpointing != "full":
        return gelu
    return 12 + gelu + 10 * width


def training_row(
    config: VARConfig,
    vae: VQVAEConfig,
    *,
    mode: Mode,
    gpus: int,
    parts: int,
    batch: int,
    width: int,
    checkpointing: Checkpointing,
    ema: bool = True,
) -> TrainingRow:
    """The memory of one way to compute a step.

    Args:
        batch: images of a step on all GPUs; ``gpus * parts`` divides it.
        width: bytes of an item of the matrix products: 2 or 4.
    """
    count, shards = var_parameters(config), gpus if mode == "fsdp2" else 1
    images = batch // (gpus * parts)
    tokens = images * config.layout.total
    channels = tokens * config.embed_dim
    # Beside the blocks: the embeddings' sum, the last norm and the gradient at the head.
    kept = config.depth * activation_bytes(config, width, checkpointing) + 4 + 2 * width
    # Of each norm a mean and a deviation, of attention the sum of exponentials of each head.
    statistics = 0 if checkpointing == "full" else config.depth * (16 + 4 * config.num_heads)
    gradients = 4 * count // shards
    if mode == "fsdp2":
        block = block_parameters(config)
        rest = count - config.depth * block
        # The next block is gathered while one runs; a gradient is reduced in float32.
        casts = block * (2 * width + width + 4) + 4 * rest
        # Until the last part every process adds up whole gradients of its own.
        gradients += 4 * count if parts > 1 else 0
    else:
        casts = width * count if width < 4 else 0
    chunk = min(tokens * config.vocab_size, CHUNK_LOGITS)
    return TrainingRow(
        mode=mode,
        checkpointing=checkpointing,
        parts=parts,
        images=images,
        weights=4 * count // shards,
        gradients=gradients,
        optimizer=8 * count // shards,
        ema=4 * count // shards if ema else 0,
        casts=casts,
        activations=channels * kept + tokens * statistics,
        working=channels * working_bytes(config, width, checkpointing),
        logits=chunk * (4 if width == 4 else 4 + width) + 4 * config.vocab_size * config.embed_dim,
        encoder=4 * vqvae_parameters(vae) + encoder_bytes(vae, min(images, IMAGES_ENCODED)),
        work=1 + recomputed_share(config, checkpointing),
    )


def encoder_bytes(vae: VQVAEConfig, images: int) -> int:
    """Bytes of the float32 maps of the encoder's highest resolution that live at once."""
    maps = 5 if vae.num_res_blocks > 1 else 4
    return 4 * maps * images * vae.ch * vae.image_size**2


def recomputed_share(config: VARConfig, checkpointing: Checkpointing) -> float:
    """Arithmetic of what is computed again, over that of a step."""
    if checkpointing == "none":
        return 0.0
    if checkpointing == "full":
        return 1 / 3  # a step is a forward pass, and a backward pass of twice its work
    schedule = DepthSchedule.full(config.depth, len(config.patch_nums))
    projections = config.depth * 2 * config.layout.total * 3 * config.embed_dim**2
    again = projections + attention_flop(config, schedule, guidance=False)
    return again / training_flop(config, schedule)


def training_rows(
    config: VARConfig,
    vae: VQVAEConfig,
    *,
    gpus: int,
    batch: int,
    width: int,
    memory: float | None = None,
    ema: bool = True,
) -> list[TrainingRow]:
    """A row for every mode and checkpointing, the fastest first.

    With ``memory``, bytes of a GPU, each has the fewest parts that fit; one that fits at no number
    of parts has single images. Without, each is there with 1, 4, 16 and 64 parts.
    """
    per_gpu = batch // gpus
    rows = []
    for mode in modes(gpus):
        for checkpointing in CHECKPOINTING:
            options = [
                training_row(
                    config,
                    vae,
                    mode=mode,
                    gpus=gpus,
                    parts=parts,
                    batch=batch,
                    width=width,
                    checkpointing=checkpointing,
                    ema=ema,
                )
                for parts in divisors(per_gpu)
            ]
            if memory is None:
                rows += [row for row in options if row.parts in (1, 4, 16, 64)]
            else:
                rows.append(next((row for row in options if fits(row, memory)), options[-1]))
    order = ("single", "ddp", "fsdp2")  # ddp gathers no weights
    return sorted(rows, key=lambda row: (row.work, row.parts, order.index(row.mode)))


def fastest(rows: list[TrainingRow], memory: float) -> TrainingRow | None:
    """The first of sorted rows that fits: least work, then fewest parts; None if none does."""
    return next((row for row in rows if fits(row, memory)), None)


def fits(row: TrainingRow, memory: float) -> bool:
    """Whether a step fits a GPU of ``memory`` bytes."""
    return row.total <= USABLE * memory


def modes(gpus: int) -> tuple[Mode, ...]:
    return ("single",) if gpus == 1 else ("ddp", "fsdp2")


def divisors(count: int) -> Iterator[int]:
    """Numbers of parts of a batch, ascending."""
    return (parts for parts in range(1, count + 1) if count % parts == 0)
