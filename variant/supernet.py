"""One set of weights that runs at any depth: what users hold in their hands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from variant.checkpoint import load_model, load_original, save_model
from variant.engine import Engine, check_pair
from variant.errors import UserError
from variant.sampling import Generation, OnScale
from variant.transformer import VAR
from variant.vqvae import VQVAE

ASSETS = Path(__file__).parent / "assets"


class VARiant(nn.Module):
    """A depth supernet and its VQ-VAE: labels in, images out, at any depth.

    ::

        model = VARiant.from_pretrained("digits")
        result = model.generate([3, 1, 4], depth=2, seed=0)
        result.images, result.tokens, result.stats

    Args:
        var, vae: models of one codebook and layout; their weights are shared, not copied.
    Raises:
        ValueError: the two do not fit each other.
    """

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        super().__init__()
        check_pair(var, vae)
        self.var = var
        self.vae = vae
        self.extra: dict[str, Any] = {}
        self._engines: dict[torch.dtype, Engine] = {}

    def engine(self, dtype: torch.dtype | None = None) -> Engine:
        """The engine of that dtype, built once; None is the weights' own."""
        wanted = dtype or self.var.head.weight.dtype
        if wanted not in self._engines:
            self._engines[wanted] = Engine(self.var, self.vae, dtype=wanted)
        return self._engines[wanted]

    def generate(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        depth: int | Sequence[int] | None = None,
        bridge: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        image_ids: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        max_batch: int | None = None,
        on_scale: OnScale | None = None,
    ) -> Generation:
        """Paint one image per label; see :meth:`variant.engine.Engine.generate`.

        ``dtype``: of weights, K/V and matrix products; None is the weights' own.
        """
        return self.engine(dtype).generate(
            labels,
            depth=depth,
            bridge=bridge,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            image_ids=image_ids,
            generator=generator,
            max_batch=max_batch,
            on_scale=on_scale,
        )

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> Self:
        """A model folder, a repository of the Hugging Face Hub, or "digits" from this package.

        Args:
            name: a path wins over a Hub id of the same spelling.
            dtype: of the transformer's weights; None keeps the file's.
        Raises:
            UserError: nothing of that name, or a damaged or foreign file.
        """
        folder = locate(name)
        var, vae, config = load_model(folder, dtype)
        model = cls(var, vae).eval()
        model.extra = {k: v for k, v in config.items() if k not in ("format", "var", "vae")}
        return model

    def save_pretrained(
        self, folder: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; what :meth:`from_pretrained` reads."""
        save_model(folder, self.var, self.vae, {**self.extra, **(extra or {})})

    @classmethod
    def from_var_checkpoint(
        cls,
        var_path: str | os.PathLike[str],
        vae_path: str | os.PathLike[str],
        *,
        num_heads: int | None = None,
    ) -> Self:
        """The original repository's ``.pth`` files; sizes are read from the shapes.

        Files are loaded with ``weights_only=True``: no code in them can run.

        Args:
            num_heads: needed only for models without ``attn_l2_norm``, whose tensors do not tell;
                None assumes one per 64 channels and warns.
        Raises:
            UserError: a missing, damaged or foreign file.
        """
        return cls(*load_original(var_path, vae_path, num_heads)).eval()


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, a model of this package, or a snapshot from the Hub.

    Raises:
        UserError: none of the three.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    packaged = sorted(
        folder.name for folder in ASSETS.iterdir() if (folder / "config.json").is_file()
    )
    if str(name) in packaged:
        return ASSETS / str(name)
    text = os.fspath(name)
    if path.exists():
        return path  # what is wrong with it is said by whoever reads it
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise UserError(
            f"{text}: no such model: neither a folder nor one of this package "
            f"({', '.join(packaged) or 'none'}) nor a Hub id (owner/name)"
        )
    # Imported here: it takes a second and most runs need no Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{text}: neither a folder nor to be had from the Hub: {first}") from error
