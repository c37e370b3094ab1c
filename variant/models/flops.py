"""The work of a generation or a training step from sizes and schedule alone.

With guidance there are two sequences per image. FLOP counts a multiply-add as two.
"""

from __future__ import annotations

from dataclasses import dataclass

from variant.models.config import VARConfig
from variant_kernels import DepthSchedule


@dataclass(frozen=True)
class Linear:
    """One matrix product of a generation: (rows x inputs) by a layer's (outputs x inputs) weights.

    layer: index of the block, or -1.  name: the module inside it.
    """

    layer: int
    name: str
    rows: int
    inputs: int
    outputs: int

    @property
    def flop(self) -> int:
        """Operations of the product; the bias is not counted."""
        return 2 * self.rows * self.inputs * self.outputs


def linears(
    config: VARConfig, schedule: DepthSchedule, batch: int, *, guidance: bool = True
) -> list[Linear]:
    """Every matrix product with weights that a generation of ``batch`` images needs, in order.

    The class conditioning runs once per image. The unconditional half of the first scale's head
    does not run, because guidance is 0 there.
    """
    num_sequences, width = batch * (2 if guidance else 1), config.embed_dim
    hidden = round(width * config.mlp_ratio)
    products = []
    if config.shared_aln:
        products.append(Linear(-1, "shared_ada_lin", num_sequences, width, 6 * width))
    else:
        products += [
            Linear(layer, "ada_lin", num_sequences, width, 6 * width)
            for layer in range(config.depth)
            if schedule.last_scale(layer) >= 0
        ]
    products.append(Linear(-1, "head_nm", num_sequences, width, 2 * width))
    for scale, tokens in enumerate(config.layout.tokens):
        if scale:
            inputs = config.vae_channels
            products.append(Linear(-1, "word_embed", batch * tokens, inputs, width))
        for layer in schedule.active_layers(scale):
            products += [
                Linear(layer, "mat_qkv", num_sequences * tokens, width, 3 * width),
                Linear(layer, "proj", num_sequences * tokens, width, width),
                Linear(layer, "fc1", num_sequences * tokens, width, hidden),
                Linear(layer, "fc2", num_sequences * tokens, hidden, width),
            ]
        head_sequences = batch if scale == 0 else num_sequences
        products.append(Linear(-1, "head", head_sequences * tokens, width, config.vocab_size))
    return products


# Work that grows with the tokens; the conditioning is once per image.
PER_TOKEN = ("mat_qkv", "proj", "fc1", "fc2", "head")


def linear_flop(config: VARConfig, schedule: DepthSchedule, batch: int = 1) -> int:
    """FLOP of the blocks' linear layers and the head, guidance included."""
    return sum(x.flop for x in linears(config, schedule, batch) if x.name in PER_TOKEN)


def weight_bytes(config: VARConfig, schedule: DepthSchedule, item: int) -> int:
    """Bytes of the weights that a generation reads if every product reads its own once.

    This is a lower bound: scales run one after the other, and the weights of one scale do not fit
    into any cache. item: bytes of one weight.
    """
    return sum(item * x.inputs * x.outputs for x in linears(config, schedule, 1))


def ceiling(config: VARConfig, schedule: DepthSchedule) -> float:
    """Speed-up over full depth if linear work took all the time."""
    full = DepthSchedule.full(config.depth, schedule.num_scales)
    return linear_flop(config, full) / linear_flop(config, schedule)


def attention_flop(
    config: VARConfig, schedule: DepthSchedule, batch: int = 1, *, guidance: bool = True
) -> int:
    """FLOP of q k^T and p v over visible pairs."""
    layout = config.layout
    pairs = sum(
        len(schedule.active_layers(scale)) * tokens * layout.visible(scale)
        for scale, tokens in enumerate(layout.tokens)
    )
    return 4 * config.embed_dim * pairs * batch * (2 if guidance else 1)


def training_flop(config: VARConfig, schedule: DepthSchedule, batch: int = 1) -> int:
    """FLOP of the forward and backward pass of a training step, as MFU counts them.

    A product is two products of the same size in the backward pass, one for the gradient of each of
    its factors; the teacher's input has no gradient. Attention counts visible pairs. What is
    computed a second time in the backward pass does not count, nor do the VQ-VAE and the optimiser.
    """
    linear = sum(
        x.flop * (2 if x.name == "word_embed" else 3)
        for x in linears(config, schedule, batch, guidance=False)
    )
    return linear + 3 * attention_flop(config, schedule, batch, guidance=False)
