"""``VARiant``: a VAR and its VQ-VAE, one set of weights that runs at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from variant.checkpoints.locate import check_path, fetched, locate
from variant.checkpoints.model_card import TAGS, model_card
from variant.checkpoints.model_folder import load_model, save_model
from variant.checkpoints.original_var import load_original
from variant.engine.engine import Engine, check_engine_dtype, check_pair
from variant.engine.generation import Generation, OnScale
from variant.engine.kv_dtype import KVDtype
from variant.models.placement import WEIGHT_DTYPES, check_device, check_dtype
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels.arguments import instance
from variant_kernels.dispatch.request import dtype_name

Value = TypeVar("Value")


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

    ``push_to_hub(repo_id)`` is that of ``huggingface_hub.PyTorchModelHubMixin``.

    Args:
        var, vae: models with the same codebook and layout; their weights are shared, not copied.
    Raises:
        TypeError: one of the two is of another class.
        ValueError: the codebooks or layouts of the two differ.
    """

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        super().__init__()
        check_pair(var, vae)
        self.var = var
        self.vae = vae
        self.extra: dict[str, Any] = {}
        self._engines: dict[torch.dtype, Engine] = {}

    def engine(self, dtype: torch.dtype | str | None = None) -> Engine:
        """The engine of a dtype (itself or its name), built once; None is that of the weights."""
        dtype = check_engine_dtype("VARiant", dtype, self.var)
        if dtype not in self._engines:
            self._engines[dtype] = Engine(self.var, self.vae, dtype=dtype)
        return self._engines[dtype]

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
        dtype: torch.dtype | str | None = None,
        max_batch: int | None = None,
        on_scale: OnScale | None = None,
        kv_dtype: KVDtype = None,
        image_dtype: torch.dtype | str = torch.float32,
    ) -> Generation:
        """Generates one image per label.

        Args:
            labels: classes in [0, num_classes): a number, a list, or a (B,) integer tensor.
            depth: number of layers in the flexible zone, or a list of layers; None runs all layers.
            bridge: number of first scales that run all layers; None is the config's bridge.
            cfg: classifier-free guidance, in [0, 10000]. Its weight rises linearly from 0 at the
                first scale to ``cfg`` at the last; 0 turns guidance off and halves the work.
            top_k: sample from the k most probable tokens; 0 keeps all.
            top_p: sample from the most probable tokens of this total probability; 0 keeps all.
            seed: in [0, 2^63); None draws one from torch's default generator. A seed and an image
                id give the same tokens in any batch, except where two candidates are so close that
                the last bits of a matrix product decide, which may depend on the batch size.
            image_ids: (B,) integers that select the random numbers of each image; None is 0..B-1.
            generator: draws as ``torch.multinomial`` does, like the original code; excludes seed.
                The draws depend on the batch size, so give ``max_batch`` too.
            dtype: of weights, K/V and matrix products: float32, bfloat16 or float16, or its name;
                None is the dtype of the weights.
            max_batch: images per batch; None is as many as fit into free memory by the cache plan.
            on_scale: called as ``on_scale(k, partial)`` after scale k of each batch, with a
                :class:`variant.PartialResult`. It may return a shallower depth for the scales that
                follow. Scales before ``bridge`` run all layers: a depth returned earlier is
                postponed to scale ``bridge``.
            kv_dtype: "fp8" stores K and V in 8 bits; None is exact: ``dtype``.
            image_dtype: float32, or uint8: pixels rounded to 0..255, a quarter of the memory.
        Returns:
            :class:`variant.Generation`: ``images`` (B, 3, H, W) float32 in [0, 1], ``tokens``
            (B, L) int64 and ``stats``, a :class:`variant.Stats`; tensors are on the device of the
            weights. ``pil()`` gives a list of PIL images.
        Raises:
            ValueError: an argument out of range, or a backend that cannot run this call.
            MemoryError: not even one image fits, or ``max_batch`` images do not.
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
            image_dtype=image_dtype,
        )

    def generate_batches(
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
        dtype: torch.dtype | str | None = None,
        max_batch: int | None = None,
        on_scale: OnScale | None = None,
        kv_dtype: KVDtype = None,
        image_dtype: torch.dtype | str = torch.float32,
    ) -> Iterator[Generation]:
        """Generates one image per label and hands out each batch as soon as it is made.

        ::

            for batch in model.generate_batches(range(1000), max_batch=50, image_dtype="uint8"):
                for image_id, image in zip(batch.image_ids.tolist(), batch.pil()):
                    image.save(f"{image_id:05d}.png")

        No batch is kept: 50,000 images need the memory of one batch. Together the batches equal the
        result of :meth:`generate` with the same arguments; image ids run on from batch to batch.
        Arguments are checked, and the batch size is chosen, before the first batch. A loop may
        end early. Weights that change between two batches count from the second on.

        Args:
            labels and the others: as in :meth:`generate`.
        Returns:
            An iterator of :class:`variant.Generation`, one per batch, in the order of the labels.
        Raises:
            ValueError, TypeError, MemoryError: as :meth:`generate`, at the call.
        """
        return self.engine(dtype).generate_batches(
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
            image_dtype=image_dtype,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # dtype and device in place of model_kwargs
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | str | None = None,
        map_location: torch.device | str | int | None = None,
        strict: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A model folder, a repository of the Hugging Face Hub, or "digits" from this package.

        Args:
            name: an existing path is preferred to a Hub id of the same spelling.
            dtype: of the transformer's weights, itself or its name; None or "auto" keeps that of
                the file.
            device: of both models; None is the CPU.
            torch_dtype, map_location: other names of dtype and device.
            strict: False lets weights be missing (they are initialised) or unexpected, and warns.
            subfolder: of the folder or repository, in which the model lies.
            revision, token, cache_dir, force_download, local_files_only: as in the Hub's mixin;
                for a Hub id only.
        Returns:
            The model in eval mode.
        Raises:
            TypeError, ValueError: an argument of a wrong type or value, a device that is not
                there, or two names of one argument with different values.
            UserError: there is no such model, or a file is damaged or of another format.
        """
        op = "from_pretrained"
        place = _one_of(
            op,
            ("device", check_device(op, device)),
            ("map_location", check_device(op, map_location, name="map_location")),
        )
        cast_to = _one_of(
            op,
            ("dtype", check_dtype(op, dtype, dtypes=WEIGHT_DTYPES)),
            ("torch_dtype", check_dtype(op, torch_dtype, name="torch_dtype", dtypes=WEIGHT_DTYPES)),
        )
        folder = locate(
            check_path(op, "name", name),
            instance(op, "subfolder", "" if subfolder is None else subfolder, str),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        strict = instance(op, "strict", strict, bool)
        var, vae, config = load_model(folder, cast_to, place, strict=strict)
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

        :meth:`from_pretrained` reads them. A README.md that this method did not write is kept.

        Args:
            extra: further keys of config.json, e.g. how the model was trained; plain values.
            config: the same; the Hub's mixin uses this name.
            repo_id: of the Hub; None is the name of the folder.
            push_to_hub: upload the folder too; other keywords are those of :meth:`push_to_hub`.
            model_card_kwargs: ``model_id``, the name of the model in the card.
        Returns:
            The URL of the commit on the Hub, or None if nothing was uploaded.
        Raises:
            TypeError, ValueError: extra holds what config.json cannot; nothing is written, and the
                model keeps the entries that it had.
            UserError: the folder cannot be written.
        """
        op = "save_pretrained"
        check_path(op, "folder", folder)
        merged = dict(self.extra)
        for name, entries in (("config", config), ("extra", extra)):
            merged |= instance(op, name, {} if entries is None else entries, Mapping)
        model_id = dict(model_card_kwargs or {}).get("model_id") or repo_id
        save_model(folder, self.var, self.vae, merged, model_id)
        self.extra = merged  # after success: a refused save must not spoil later ones
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(folder).resolve().name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload weights, config and card to the Hub; options as in the Hub's mixin.

        Returns:
            The URL of the commit.
        """
        options["model_card_kwargs"] = {
            "model_id": repo_id,
            **(options.get("model_card_kwargs") or {}),
        }
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *_: Any, model_id: str = "this model", **__: Any) -> ModelCard:
        """The card that :meth:`save_pretrained` writes."""
        dtype = dtype_name(self.var.head.weight.dtype)
        training = self.extra.get("training")
        return ModelCard(model_card(self.var.config, self.vae.config, model_id, dtype, training))

    @classmethod
    def from_var_checkpoint(
        cls,
        var_path: str | os.PathLike[str],
        vae_path: str | os.PathLike[str],
        *,
        weights: str | None = None,
        num_heads: int | None = None,
        patch_nums: Sequence[int] | None = None,
        norm_eps: float | None = None,
        cond_drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        quant_resi: float | None = None,
        using_znorm: bool | None = None,
        beta: float | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
    ) -> Self:
        """A model from files of the original repository; sizes are read from tensor shapes.

        Each file is a ``.pth`` state dict (loaded with ``weights_only=True``, which runs no code),
        a checkpoint of a trainer with the state dict under any name and prefix, a ``.safetensors``
        file or the index of its shards, or the output of ``save_pretrained`` of the original's Hub
        class: a folder, or its Hub id.

        The settings below are in no tensor. Those that the files hold (config.json, the ``args`` of
        a trainer checkpoint) are used; the others are arguments, and what is not given is assumed
        as the original's default, with one warning that names it.

        Args:
            weights: of a file with several state dicts: "model", "ema", or the name of an entry,
                such as "trainer/var_ema"; None is the plain model, with a warning.
            num_heads: in no tensor only without ``attn_l2_norm``; else one per 64 channels.
            patch_nums: sides of the token maps, in no tensor only without ``lvl_1L``.
            norm_eps: epsilon of the layer normalisations; else 1e-6.
            cond_drop_rate, drop_path_rate: of training; else 0.1 and 0.
            quant_resi: weight of the VQ-VAE's residual convolutions; else 0.5.
            using_znorm: nearest codes by cosine; else False.
            beta: weight of the VQ-VAE's commitment loss; else 0.25.
            dtype: of the transformer's weights, itself or its name; None keeps that of the file.
            device: of both models; None is the CPU.
        Returns:
            The model in eval mode.
        Raises:
            TypeError, ValueError: an argument of a wrong type or value, or a device that is not
                there.
            UserError: a file is missing, damaged or of another format, or contradicts a setting.
        """
        op = "from_var_checkpoint"
        dtype = check_dtype(op, dtype, dtypes=WEIGHT_DTYPES)
        device = check_device(op, device)
        files = [
            fetched(check_path(op, name, path))
            for name, path in (("var_path", var_path), ("vae_path", vae_path))
        ]
        models = load_original(
            *files,
            num_heads,
            dtype,
            device,
            weights=weights,
            patch_nums=patch_nums,
            norm_eps=norm_eps,
            cond_drop_rate=cond_drop_rate,
            drop_path_rate=drop_path_rate,
            quant_resi=quant_resi,
            using_znorm=using_znorm,
            beta=beta,
        )
        return cls(*models).eval()


def _one_of(
    op: str, one: tuple[str, Value | None], other: tuple[str, Value | None]
) -> Value | None:
    """The value of an argument that has two names.  Raises: ValueError, if both differ."""
    if one[1] is not None and other[1] is not None and one[1] != other[1]:
        raise ValueError(
            f"{op}: {other[0]} is another name of {one[0]}; got {other[1]} and {one[1]}, give one"
        )
    return other[1] if one[1] is None else one[1]
