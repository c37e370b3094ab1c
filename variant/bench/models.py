"""Models of the engine benchmark: from a folder, shipped with the package, or a preset."""

from __future__ import annotations

import torch

from variant.checkpoints.named_configs import configs_of as configs
from variant.checkpoints.named_configs import is_preset
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant.torch_modes import modes_of_a_new_process


@modes_of_a_new_process()
def build(name: str, device: str = "cpu") -> tuple[VAR, VQVAE]:
    """A model by name, float32, on ``device``.

    Presets get random weights whose logits differ between tokens.
    """
    config, vae_config = configs(name)
    if not is_preset(name):
        model = VARiant.from_pretrained(name)
        var, vae = model.var.float(), model.vae.float()
    else:
        torch.manual_seed(0)
        # Created on the device: drawing two billion weights on a CPU takes half a minute.
        with torch.device(device):
            var, vae = VAR(config), VQVAE(vae_config)
        with torch.no_grad():
            var.head.weight.mul_(100)
    for module in (var, vae):
        module.to(device).eval().requires_grad_(False)
    return var, vae
