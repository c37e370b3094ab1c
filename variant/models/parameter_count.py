"""Numbers of parameters from configurations alone: planning needs no weights and no torch.

A test holds them to the modules of var.py and vqvae.py.
"""

from __future__ import annotations

from variant.models.config import VARConfig, VQVAEConfig


def var_parameters(config: VARConfig) -> int:
    """Parameters of the transformer ``VAR(config)``; buffers do not count."""
    width, layout = config.embed_dim, config.layout
    embeddings = (
        (layout.tokens[0] + layout.total + config.num_classes + 1 + layout.num_scales) * width
    ) + _linear(config.vae_channels, width)
    head = _linear(width, 2 * width) + _linear(width, config.vocab_size)
    shared = _linear(width, 6 * width) if config.shared_aln else 0
    zones = sum(zone_parameters(config, depth) for depth in config.subnets)
    return embeddings + shared + config.depth * block_parameters(config) + head + zones


def block_parameters(config: VARConfig) -> int:
    """Parameters of one of its blocks."""
    width = config.embed_dim
    attention = _linear(width, 3 * width, bias=False) + 2 * width + _linear(width, width)
    if config.attn_l2_norm:
        attention += config.num_heads
    hidden = round(width * config.mlp_ratio)
    mlp = _linear(width, hidden) + _linear(hidden, width)
    modulation = 6 * width if config.shared_aln else _linear(width, 6 * width)
    return attention + mlp + modulation


def zone_parameters(config: VARConfig, depth: int) -> int:
    """Parameters of the zone weights of one subnet."""
    if config.zone_weights == "shared":
        return 0
    width, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
    linears = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    layer = sum((i + o) * config.lora_rank for i, o in linears)
    if config.zone_adaln:
        layer += 6 * width if config.shared_aln else _linear(width, 6 * width)
    if config.zone_weights == "copies":
        # Weights of four linear layers; biases of q, v, proj, fc1 and fc2; a scale per head.
        layer += sum(i * o for i, o in linears) + 4 * width + hidden
        layer += config.num_heads if config.attn_l2_norm else 0
    return depth * layer


def vqvae_parameters(config: VQVAEConfig) -> int:
    """Parameters of ``VQVAE(config)``, encoder and decoder; buffers do not count."""
    channels, blocks = config.z_channels, config.num_res_blocks
    levels = [config.ch * multiple for multiple in config.ch_mult]
    lowest = levels[-1]
    middle = 2 * _residual_block(lowest, lowest) + _attention(lowest)
    # Encoder and decoder end in a group normalisation: a weight and a bias per channel.
    encoder = _conv(config.in_channels, config.ch) + middle + 2 * lowest + _conv(lowest, channels)
    for width_in, width in zip([config.ch, *levels], levels, strict=False):
        encoder += _residual_block(width_in, width) + (blocks - 1) * _residual_block(width, width)
    encoder += blocks * _attention(lowest)
    encoder += sum(_conv(width, width) for width in levels[:-1])  # to halve the resolution
    decoder = (
        _conv(channels, lowest) + middle + 2 * levels[0] + _conv(levels[0], config.in_channels)
    )
    for width_in, width in zip([lowest, *reversed(levels)], reversed(levels), strict=False):
        decoder += _residual_block(width_in, width) + blocks * _residual_block(width, width)
    decoder += (blocks + 1) * _attention(lowest)
    decoder += sum(_conv(width, width) for width in levels[1:])  # to double it
    residual_convs = config.share_quant_resi or config.layout.num_scales
    quantizer = config.vocab_size * channels
    if config.quant_resi:
        quantizer += residual_convs * _conv(channels, channels)
    return encoder + decoder + quantizer + 2 * _conv(channels, channels, config.quant_conv_ks)


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _conv(channels_in: int, channels_out: int, kernel: int = 3) -> int:
    return channels_in * channels_out * kernel**2 + channels_out


def _residual_block(channels_in: int, channels_out: int) -> int:
    convolutions = _conv(channels_in, channels_out) + _conv(channels_out, channels_out)
    shortcut = _conv(channels_in, channels_out, 1) if channels_in != channels_out else 0
    return 2 * channels_in + 2 * channels_out + convolutions + shortcut


def _attention(channels: int) -> int:
    return 2 * channels + _conv(channels, 3 * channels, 1) + _conv(channels, channels, 1)
