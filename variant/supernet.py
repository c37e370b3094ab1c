"""One set of weights that runs at any depth: what users hold in their hands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from variant.checkpoints.model_card import TAGS, model_card
from variant.checkpoints.model_folder import load_model, save_model
from variant.checkpoints.original_var import load_original
from variant.engine.engine import Engine, check_pair
from variant.engine.generation import Generation, OnScale
from variant.engine.kv_dtype import KVDtype
from variant.errors import UserError
from variant.models.var import VAR
from variant.models.vqvae import VQVAE

# What is read from a repository of the Hub; the last is of the original's older ones.
HUB_FILES = ["config.json", "model.safetensors", "pytorch_model.bin"]
ASSETS = Path(__file__).parent / "assets"


class VARiant(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="variant",
    tags=list(TAGS),
):
    """A depth supernet and its VQ-VAE: labels in, images out, at any depth.

    ::

        model = VARiant.from_pretrained("digits")
        result = model.generate([3, 1, 4], depth=2, seed=0)
        result.images, result.tokens, result.stats

    ``push_to_hub(repo_id)`` is the Hub's own (``huggingface_hub.PyTorchModelHubMixin``).

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
        kv_dtype: KVDtype = None,
    ) -> Generation:
        """Paint one image per label; see :meth:`variant.engine.Engine.generate`.

        ``dtype``: of weights, K/V and matrix products; None is the weights' own.
        ``kv_dtype``: "fp8" keeps K and V in 8 bits; None is exact.
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
            kv_dtype=kv_dtype,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # dtype and device in place of model_kwargs
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A model folder, a repository of the Hugging Face Hub, or "digits" from this package.

        Args:
            name: a path wins over a Hub id of the same spelling.
            dtype: of the transformer's weights; None keeps the file's.
            device: of both models; None is the CPU.
            revision, token, cache_dir, force_download, local_files_only: as the Hub's mixin takes
                them; for a Hub id only.
        Raises:
            UserError: nothing of that name, or a damaged or foreign file.
        """
        folder = locate(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        var, vae, config = load_model(folder, dtype, device)
        model = cls(var, vae).eval()
        model.extra = {k: v for k, v in config.items() if k not in ("format", "var", "vae")}
        return model

    def save_pretrained(  # type: ignore[override]  # extra in place of config
        self,
        folder: str | os.PathLike[str],
        extra: Mapping[str, Any] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``.

        :meth:`from_pretrained` reads them. A README.md of somebody else's stays as it is.

        Args:
            extra: further keys of config.json, e.g. how the model was trained; plain values.
            config: the same, under the name that the Hub's mixin gives it.
            repo_id: on the Hub; None is the folder's name.
            push_to_hub: upload the folder too; the other keywords go to :meth:`push_to_hub`.
            model_card_kwargs: ``model_id``, how the card calls the model.
        Returns:
            The commit's address on the Hub if it was pushed.
        Raises:
            UserError: the folder cannot be written.
        """
        self.extra = {**self.extra, **(config or {}), **(extra or {})}
        model_id = dict(model_card_kwargs or {}).get("model_id") or repo_id
        save_model(folder, self.var, self.vae, self.extra, model_id)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(folder).resolve().name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload weights, config and card to the Hub; options as the Hub's mixin takes them.

        Returns:
            The commit's address.
        """
        options["model_card_kwargs"] = {
            "model_id": repo_id,
            **(options.get("model_card_kwargs") or {}),
        }
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *_: Any, model_id: str = "this model", **__: Any) -> ModelCard:
        """The card that :meth:`save_pretrained` writes."""
        dtype = str(self.var.head.weight.dtype).removeprefix("torch.")
        training = self.extra.get("training")
        return ModelCard(model_card(self.var.config, self.vae.config, model_id, dtype, training))

    @classmethod
    def from_var_checkpoint(
        cls,
        var_path: str | os.PathLike[str],
        vae_path: str | os.PathLike[str],
        *,
        num_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The original repository's files; sizes are read from the shapes.

        Each is a ``.pth`` state dict (loaded with ``weights_only=True``: no code in it can run), a
        trainer checkpoint that holds both models, a ``.safetensors`` file, or what
        ``save_pretrained`` of the original's Hub class wrote: a folder, or its Hub id.

        Args:
            num_heads: needed only for models without ``attn_l2_norm``, whose tensors do not tell;
                None assumes one per 64 channels and warns.
            dtype: of the transformer's weights; None keeps the file's.
            device: of both models; None is the CPU.
        Raises:
            UserError: a missing, damaged or foreign file.
        """
        var_file, vae_file = _fetched(var_path), _fetched(vae_path)
        return cls(*load_original(var_file, vae_file, num_heads, dtype, device)).eval()


def _fetched(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path, or what the Hub gives for an id that is none."""
    return locate(path) if _is_hub_id(path) and not Path(path).exists() else path


def _is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether it reads as owner/name; file names end in a suffix that says so."""
    text = os.fspath(name)
    named = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return named and not text.endswith((".pth", ".pt", ".bin", ".safetensors"))


def locate(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The folder of a model: a path, a model of this package, or a snapshot from the Hub.

    Args:
        hub_options: of ``huggingface_hub.snapshot_download``: revision, token and so on.
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
    if not _is_hub_id(name):
        raise UserError(
            f"{text}: no such model: neither a folder nor one of this package "
            f"({', '.join(packaged) or 'none'}) nor a Hub id (owner/name)"
        )
    # Imported here: it takes a second and most runs need no Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=HUB_FILES, **hub_options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{text}: neither a folder nor to be had from the Hub: {first}") from error
