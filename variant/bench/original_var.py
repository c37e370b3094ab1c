"""The original VAR code as a peer: its own classes, from a clone of its repository.

The user names the folder of a clone of FoundationVision/VAR. This module imports it unchanged,
gives it our weights and runs it as its own demo does.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from variant.bench.device import autocast as autocasting
from variant.errors import UserError
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR, derived_buffers
from variant.models.vqvae import VQVAE

# Sizes that are fixed in the original VQ-VAE.
FIXED = {"ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "in_channels": 3}


def check_clone(repo: Path) -> None:
    """Raises: UserError where the folder is no clone of FoundationVision/VAR."""
    for name in ("models/var.py", "models/vqvae.py", "dist.py"):
        if not (repo / name).is_file():
            raise UserError(
                f"{repo}: is no clone of FoundationVision/VAR: it has no {name}. Clone it and "
                "name the folder with --var-repo"
            )


def classes(repo: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(VAR, VQVAE) of the clone, which builds its tensors on ``device``.

    Raises:
        UserError: the folder is no clone of it, or its imports fail.
    """
    check_clone(repo)
    # Its modules have common names ("models", "dist"): sys.modules holds them only meanwhile.
    hidden = {name: sys.modules.pop(name) for name in _named(("models", "dist", "utils"))}
    sys.path.insert(0, str(repo.resolve()))
    try:
        setattr(importlib.import_module("dist"), "__device", device)
        models = importlib.import_module("models")
        return models.VAR, models.VQVAE
    except ImportError as error:
        raise UserError(f"{repo}: cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(repo.resolve()))
        for name in _named(("models", "dist", "utils")):
            del sys.modules[name]
        sys.modules.update(hidden)


def _named(tops: tuple[str, ...]) -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in tops]


def check_sizes(config: VQVAEConfig) -> None:
    """Raises: UserError where the original's VQ-VAE has other sizes than this model's."""
    for name, size in FIXED.items():
        if getattr(config, name) != size:
            raise UserError(
                f"--var-repo: the original VQ-VAE always has {name} {size}; this model has "
                f"{getattr(config, name)}. Leave --var-repo out to compare with the plain loop"
            )


@dataclass
class Original:
    """Both models of the original code, in eval mode, with float32 weights."""

    var: Any
    vae: Any
    device: str = "cpu"

    def generate(
        self, labels_B: Tensor, *, cfg: float, top_k: int, top_p: float, seed: int, autocast: bool
    ) -> Tensor:
        """The result of ``autoregressive_infer_cfg``, which includes the decoder.

        Args:
            autocast: run under 16-bit autocast, as the original's demo does.
        """
        with torch.inference_mode(), autocasting(self.device, autocast):
            return self.var.autoregressive_infer_cfg(
                len(labels_B), labels_B, g_seed=seed, cfg=cfg, top_k=top_k, top_p=top_p
            )

    @contextlib.contextmanager
    def without_decoder(self) -> Iterator[None]:
        """A context in which the decoder returns an empty image at once."""
        self.vae.fhat_to_img = lambda f_hat: f_hat.new_zeros(len(f_hat), 3, 1, 1)
        try:
            yield
        finally:
            del self.vae.fhat_to_img

    def decode(self, f_hat_BCHW: Tensor, *, autocast: bool) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of features."""
        with torch.inference_mode(), autocasting(self.device, autocast):
            return self.vae.fhat_to_img(f_hat_BCHW)

    def watched(
        self, labels_B: Tensor, *, cfg: float, top_k: int, top_p: float, seed: int, autocast: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and the last scale's logits (B, T, V) of one generation, read by hooks.

        The logits are those of the conditional rows, before guidance, in float32.
        """
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        hooks = (
            self.var.vae_quant_proxy[0].embedding.register_forward_hook(
                lambda module, inputs, out: tokens.append(inputs[0].clone())
            ),
            self.var.head.register_forward_hook(
                lambda module, inputs, out: logits.append(out[: len(labels_B)].float().clone())
            ),
        )
        try:
            with self.without_decoder():
                self.generate(
                    labels_B, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, autocast=autocast
                )
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(tokens, dim=1), logits[-1]


def load(
    repo: Path,
    config: VARConfig,
    vae_config: VQVAEConfig,
    weights: tuple[VAR, VQVAE] | None = None,
    device: str = "cpu",
) -> Original:
    """The original models of these sizes.

    Args:
        weights: our models, whose tensors the original shares; None keeps its random weights.
        device: "cpu" or "cuda"; for shared weights the device that they are on.
    Raises:
        UserError: the folder is no clone, the original cannot have these sizes, or the state dict
            does not fit.
    """
    check_sizes(vae_config)
    kind_of_var, kind_of_vae = classes(repo, device)
    with contextlib.redirect_stdout(io.StringIO()):  # the constructor prints its sizes
        vae: nn.Module = kind_of_vae(
            vocab_size=vae_config.vocab_size,
            z_channels=vae_config.z_channels,
            ch=vae_config.ch,
            beta=vae_config.beta,
            using_znorm=vae_config.using_znorm,
            quant_conv_ks=vae_config.quant_conv_ks,
            quant_resi=vae_config.quant_resi,
            share_quant_resi=vae_config.share_quant_resi,
            v_patch_nums=vae_config.patch_nums,
        )
        var: nn.Module = kind_of_var(
            vae_local=vae,
            num_classes=config.num_classes,
            depth=config.depth,
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            norm_eps=config.norm_eps,
            shared_aln=config.shared_aln,
            attn_l2_norm=config.attn_l2_norm,
            patch_nums=config.patch_nums,
        )
    if weights is not None:
        own, own_vae = weights
        state = {**own.float().state_dict(), **derived_buffers(own.layout)}
        try:
            var.load_state_dict(state, strict=True, assign=True)
            vae.load_state_dict(own_vae.float().state_dict(), strict=True, assign=True)
        except RuntimeError as error:
            raise UserError(f"{repo}: does not take this model's weights: {error}") from error
    for module in (var, vae):
        module.to(device).eval().requires_grad_(False)
    return Original(var, vae, device)
