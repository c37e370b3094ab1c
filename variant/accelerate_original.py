"""A live model of the original VAR code, served by our engine: ``accelerate``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from variant.checkpoints.model_folder import build
from variant.checkpoints.original_var import infer_var_config, infer_vqvae_config
from variant.errors import UserError
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant


def accelerate(var: nn.Module, vae: nn.Module) -> VARiant:
    """A VARiant that shares the weights of an original VAR model and its VQ-VAE.

    Nothing is copied and nothing in the two objects is changed, patched or not; what is loaded into
    them or trained in place is what the VARiant generates with. Sizes are read from shapes, the
    rest from the objects.

    Args:
        var: of the original repository's ``VAR`` (or CoDe's), on any device.
        vae: its ``VQVAE``.
    Returns:
        In eval mode, on the weights' device.
    Raises:
        UserError: one of the two is not such a model; naming what is missing.
    """
    attn = getattr(getattr(var, "blocks", [None])[0], "attn", None)
    norm = getattr(getattr(var, "head_nm", None), "ln_wo_grad", None)
    if attn is None or norm is None:
        raise UserError(
            f"accelerate: var must be a VAR of the original repository, with blocks[0].attn and "
            f"head_nm.ln_wo_grad; got {type(var).__name__}"
        )
    state, known = var.state_dict(), infer_var_config(var.state_dict(), "var", attn.num_heads)
    options: dict[str, Any] = {"norm_eps": norm.eps}
    for name in ("cond_drop_rate", "drop_path_rate"):
        if hasattr(var, name):
            options[name] = getattr(var, name)
    config = replace(known, **options)
    quantizer = getattr(vae, "quantize", None)
    vae_config = infer_vqvae_config(vae.state_dict(), config.patch_nums, "vae")
    vae_config = replace(vae_config, using_znorm=bool(getattr(quantizer, "using_znorm", False)))
    return VARiant(
        build(VAR, config, state, "var"), build(VQVAE, vae_config, vae.state_dict(), "vae")
    ).eval()
