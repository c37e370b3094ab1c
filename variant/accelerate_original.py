"""``accelerate``: a model object of the original VAR code, run by our engine."""

from __future__ import annotations

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

    The weights are not copied and the two objects, patched or not, are not changed. The VARiant
    generates with their current weights, also after training or loading in place. Sizes are read
    from tensor shapes, other settings from the objects.

    Args:
        var: a ``VAR`` of the original repository (or of CoDe), on any device.
        vae: its ``VQVAE``.
    Returns:
        A model in eval mode, on the device of the weights.
    Raises:
        UserError: one of the two is not such a model; the message names what is missing.
    """
    attn = getattr(getattr(var, "blocks", [None])[0], "attn", None)
    norm = getattr(getattr(var, "head_nm", None), "ln_wo_grad", None)
    if attn is None or norm is None:
        raise UserError(
            f"accelerate: var must be a VAR of the original repository, with blocks[0].attn and "
            f"head_nm.ln_wo_grad; got {type(var).__name__}"
        )
    given: dict[str, Any] = {"num_heads": attn.num_heads, "norm_eps": norm.eps}
    for name in ("cond_drop_rate", "drop_path_rate", "patch_nums"):
        given[name] = getattr(var, name, None)
    state = var.state_dict()
    config = infer_var_config(state, "var", **given)
    quantizer = getattr(vae, "quantize", None)
    vae_config = infer_vqvae_config(
        vae.state_dict(),
        config.patch_nums,
        "vae",
        quant_resi=getattr(quantizer, "quant_resi_ratio", None),
        using_znorm=getattr(quantizer, "using_znorm", None),
        beta=getattr(quantizer, "beta", None),
    )
    return VARiant(
        build(VAR, config, state, "var"), build(VQVAE, vae_config, vae.state_dict(), "vae")
    ).eval()
