"""Models of the engine benchmark: from a folder, shipped with the package, or a preset."""

from __future__ import annotations

from pathlib import Path

import torch

from variant.checkpoints.config_file import configs_in
from variant.checkpoints.locate import locate
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.presets import VAR_PRESETS, vqvae_of
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant


def is_preset(name: str) -> bool:
    """Whether the name is a preset without weights. A folder of that name takes precedence."""
    return name in VAR_PRESETS and not Path(name).exists()


def configs(name: str) -> tuple[VARConfig, VQVAEConfig]:
    """Sizes of a model by name; no weights are read."""
    if is_preset(name):
        return VAR_PRESETS[name], vqvae_of(VAR_PRESETS[name])
    return configs_in(locate(name))


def build(name: str, device: str = "cpu") -> tuple[VAR, VQVAE]:
    """A model by name, float32, on ``device``.

    Presets get random weights whose logits differ between tokens.
    """
    if not is_preset(name):
        model = VARiant.from_pretrained(name)
        var, vae = model.var.float(), model.vae.float()
    else:
        torch.manual_seed(0)
        config, vae_config = configs(name)
        # Created on the device: drawing two billion weights on a CPU takes half a minute.
        with torch.device(device):
            var, vae = VAR(config), VQVAE(vae_config)
        with torch.no_grad():
            var.head.weight.mul_(100)
    for module in (var, vae):
        module.to(device).eval().requires_grad_(False)
    return var, vae
