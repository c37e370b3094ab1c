"""Weights and images that depend on a seed and on nothing else: no library's random generator.

The expected values of other programs are made from them, in other environments.
"""

import hashlib

import numpy as np
import torch


def noise(seed, *shape):
    """Uniform in [0, 1), float64, by the mixing function of SplitMix64."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(1_000_003)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) / 2**53).reshape(shape)


def fill(network, seed=1):
    """Give every weight of a network a seeded value at which activations keep their scale."""
    state = network.state_dict()
    for place, (name, tensor) in enumerate(sorted(state.items())):
        if not tensor.is_floating_point():
            continue
        values = noise(seed * 10_000 + place, *tensor.shape)
        if name.endswith("running_var"):
            values = 0.5 + values
        elif name.endswith(("_embed", "_token")):  # of a transformer: added to its input
            values = values - 0.5
        elif tensor.dim() > 1:
            fan_in = tensor[0].numel()
            # The classes of a random network differ little: the last layer's weights are larger.
            scale = 20.0 if name.startswith("fc.") else 1.0
            values = (2 * values - 1) * scale * (6 / fan_in) ** 0.5
        elif name.endswith(("weight", "gamma")):  # of a norm or of a layer scale
            values = 0.75 + 0.5 * values
        else:
            values = 0.2 * (values - 0.5)
        state[name] = torch.from_numpy(values).to(tensor.dtype)
    network.load_state_dict(state)
    return network


def layout_sha256(network):
    """Of the names and shapes of a network's weights."""
    rows = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def images(seed, count, height, width):
    """uint8 (N, 3, Y, X): a smooth pattern of its own for each image, and noise."""
    phase = noise(seed, count, 3, 4) * 6.283
    y, x = np.linspace(0, 6, height)[:, None], np.linspace(0, 6, width)
    waves = [
        np.sin((1 + k) * y + phase[..., k, None, None])
        * np.cos((2 - k) * x + phase[..., k + 2, None, None])
        for k in range(2)
    ]
    contrast = 20 + 60 * noise(seed + 1, count, 1, 1, 1)
    pixels = 128 + contrast * (waves[0] + 0.5 * waves[1])
    pixels = pixels + 30 * (noise(seed + 2, count, 3, height, width) - 0.5)
    return torch.from_numpy(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def feature_sets(rows, width, classes):
    """Features, other features and logits of generated images; both features of real ones."""
    generated = noise(900, rows, width) + noise(901, rows, 1)
    other = noise(902, rows, width) @ noise(903, width, width)
    logits = 6 * noise(904, rows, classes)
    real = 0.7 * noise(905, rows + 40, width) + 1.5 * noise(906, rows + 40, 1)
    other_real = noise(907, rows + 40, width) @ noise(908, width, width)
    return generated, other, logits, real, other_real
