"""``VARiant``: a VAR and its VQ-VAE, one set of weights that runs at any depth."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NoReturn

import torch
from torch import Tensor

from variant.checkpoints.model_card import TAGS
from variant.engine.arguments import Labels
from variant.engine.cast_models import check_pair
from variant.engine.engine import Engine, check_engine_dtype
from variant.engine.generation import Generation, OnScale, PerScale
from variant.engine.kv_dtype import KVDtype
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.pretrained import PretrainedPair
from variant_kernels import DepthSchedule
from variant_kernels.untraced import untraced

# Of all models: one of its own would be copied and saved with a model.
_building = Lock()


def _new_lock() -> None:
    global _building
    _building = Lock()  # another thread, which this copy of the process lacks, may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class VARiant(PretrainedPair, library_name="variant", tags=list(TAGS)):
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
        super().__init__(var, vae)
        self._engines: dict[torch.dtype, Engine] = {}

    def forward(self, *arguments: object, **options: object) -> NoReturn:
        """Raises: NotImplementedError; generation is no single forward pass."""
        raise NotImplementedError(
            "VARiant: a call has no meaning; model.generate(labels) gives images, "
            "model.var(labels, teacher_input) logits"
        )

    @untraced
    def engine(self, dtype: torch.dtype | str | None = None) -> Engine:
        """The engine of a dtype (itself or its name), built once; None is that of the weights."""
        var, vae = self._modules.get("var"), self._modules.get("vae")
        check_pair(var, vae)  # another one may have taken a model's place
        dtype = check_engine_dtype("VARiant", dtype, self.var)
        return self._kept_engine(dtype, lambda: Engine(self.var, self.vae, dtype=dtype))

    def _kept_engine(self, dtype: torch.dtype, build: Callable[[], Engine]) -> Engine:
        """The engine of a dtype for the present models; of threads that need it first, one builds.

        Each of several would keep weights of its own: packed, cast or merged.
        """
        engine = self._engines.get(dtype)
        if not self._fits(engine):
            with _building:
                engine = self._engines.get(dtype)
                if not self._fits(engine):
                    engine = self._engines[dtype] = build()
        assert engine is not None
        return engine

    def _fits(self, engine: Engine | None) -> bool:
        return engine is not None and engine.var is self.var and engine.vae is self.vae

    @untraced
    def generate(
        self,
        labels: Labels,
        *,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
        cfg: PerScale = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        image_ids: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: PerScale = 1.0,
        more_smooth: bool = False,
        tokens: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        log_probs: bool = False,
        dtype: torch.dtype | str | None = None,
        max_batch: int | None = None,
        on_scale: OnScale | None = None,
        kv_dtype: KVDtype = None,
        image_dtype: torch.dtype | str = torch.float32,
    ) -> Generation:
        """Generates one image per label.

        Args:
            labels: classes, by number in [0, num_classes) or by name (``var.config.class_names``):
                one, a list, or a (B,) integer tensor. -1 and ``num_classes`` are no class.
            depth: number of layers in the flexible zone, or a list of layers; None runs all layers.
                A :class:`DepthSchedule`, e.g. of :func:`variant.load_schedule`, has the layers of
                every scale.
            bridge: number of first scales that run all layers; None is the config's bridge.
            cfg: classifier-free guidance, in [0, 10000]. Its weight rises linearly from 0 at the
                first scale to ``cfg`` at the last; 0 turns guidance off and halves the work. A
                list gives the weight of each scale.
            top_k: sample from the k most probable tokens; 0 keeps all.
            top_p: sample from the most probable tokens of this total probability; 0 keeps all.
            seed: in [0, 2^63); None draws one from torch's default generator. A seed and an image
                id give the same tokens in any float32 batch. In 16 bits most images of a batch of
                one differ from those of larger batches, because the matrix products add in another
                order (docs/reproducibility.md).
            image_ids: (B,) integers that select the random numbers of each image; None is 0..B-1.
            generator: draws as ``torch.multinomial`` does, like the original code; excludes seed.
                The draws depend on the batch size, so give ``max_batch`` too.
            temperature: in [0.0001, 10000], or one per scale: logits are divided by it before
                guidance and filters. Below 1 likely tokens become likelier.
            more_smooth: as in the original code, for looking at images: mixtures of codes (softmax
                of filtered logits with Gumbel noise) make the images in place of the drawn tokens,
                so that ``tokens`` do not decode to them.
            tokens, mask: edit images: ``tokens`` (B, L), or (L,) for all images, or a list of one
                (B, T) per scale, are given, e.g. by ``model.vae.encode``; ``mask`` says which stay
                (1, True) and which are drawn anew. It is of tokens, (B, L) or (L,); or a map of any
                size, (H, W) or (B, H, W), that is resized to every scale as in the original's
                zero-shot editing, where the first scale stays always.
            log_probs: return the log-probability of each token, drawn or kept, under the model:
                the log-softmax of the conditional logits, before guidance, temperature and
                filters. ``Engine.forced_log_probs`` gives it for given tokens. Not with
                ``more_smooth``.
            dtype: of weights, K/V and matrix products: float32, bfloat16 or float16, or its name;
                None is the dtype of the weights.
            max_batch: images per batch; None is as many as fit into free memory by the cache plan.
            on_scale: called as ``on_scale(k, partial)`` after scale k of each batch, with a
                :class:`variant.PartialResult`. It may return a shallower depth for the scales that
                follow. Scales before ``bridge`` run all layers: a depth returned earlier is
                postponed to scale ``bridge``, and ``stats.postponed`` lists the scale of the call.
            kv_dtype: "fp8" stores K and V in 8 bits; None is exact: ``dtype``.
            image_dtype: float32, or uint8: pixels rounded to 0..255, a quarter of the memory.
        Returns:
            :class:`variant.Generation`: ``images`` (B, 3, H, W) float32 in [0, 1], ``tokens``
            (B, L) int64 and ``stats``, a :class:`variant.Stats`; tensors are on the device of the
            weights. ``pil()`` gives a list of PIL images; ``labels``, ``image_ids`` and
            ``log_probs`` (B, L) float32 (or None) belong to them.
        Raises:
            TypeError: an argument of another type.
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
            temperature=temperature,
            more_smooth=more_smooth,
            tokens=tokens,
            mask=mask,
            log_probs=log_probs,
            max_batch=max_batch,
            on_scale=on_scale,
            kv_dtype=kv_dtype,
            image_dtype=image_dtype,
        )

    @untraced
    def generate_batches(
        self,
        labels: Labels,
        *,
        depth: int | Sequence[int] | DepthSchedule | None = None,
        bridge: int | None = None,
        cfg: PerScale = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int | None = None,
        image_ids: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: PerScale = 1.0,
        more_smooth: bool = False,
        tokens: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        log_probs: bool = False,
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
            temperature=temperature,
            more_smooth=more_smooth,
            tokens=tokens,
            mask=mask,
            log_probs=log_probs,
            max_batch=max_batch,
            on_scale=on_scale,
            kv_dtype=kv_dtype,
            image_dtype=image_dtype,
        )
