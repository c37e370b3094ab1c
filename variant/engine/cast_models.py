"""A VAR and its VQ-VAE with their weights in another dtype, cast again when they change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import nn

from variant.engine.cuda_graphs import GraphCache, Recorder
from variant.engine.graph_replay import GraphReplay
from variant.engine.page_tables import PageTableCache
from variant.engine.weights import EngineWeights, Version, WeightsVersion, check_engine_parts
from variant.models.config import check_pair_of_configs
from variant.models.parts import explained, head_weight
from variant.models.var import VAR
from variant.models.vqvae import ENCODER, VQVAE
from variant_kernels.arguments import instance
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.integrations.alterations import global_hooks
from variant_kernels.packed_linear import can_pack
from variant_kernels.products import has_products, product_dtype
from variant_kernels.tensors import Memory

F = TypeVar("F", bound=Callable[..., Any])


class CastModels:
    """Both models, their cast weights, and what was made from these: graphs and page tables.

    Args:
        var, vae: the models.
        dtype: of weights, K/V and matrix products; a CPU without native 16-bit products, and every
            CPU in float16, stores K/V in it and computes in float32.
        pack: on a CPU, keep a second copy of the weights in the layout of its matrix library.
    """

    def __init__(self, var: VAR, vae: VQVAE, dtype: torch.dtype, pack: bool) -> None:
        self.var, self.vae = var, vae
        self.dtype, self.pack = dtype, pack
        self._reset()
        if self.product_dtype != dtype:
            _warn_of_slowness(dtype, has_products(self.device, dtype))
        self._check_parts()
        self._checked = self._structure(self._version())

    def _reset(self) -> None:
        """Empties what is rebuilt on use and not pickled: cast weights, graphs, page tables."""
        self._lock = Lock()
        self._weights_version = WeightsVersion()
        self._checked: Version | None = None
        self._cast: tuple[Version, EngineWeights] | None = None
        self._cast_from: Memory | None = None
        self._graphs: tuple[EngineWeights, GraphReplay] | None = None
        self._page_tables = PageTableCache()

    def __getstate__(self) -> dict[str, object]:
        """Without the lock, cast weights and graphs, so that a used model can be pickled."""
        dropped = ("_lock", "_weights_version", "_checked", "_cast", "_cast_from", "_graphs")
        return {n: v for n, v in self.__dict__.items() if n not in (*dropped, "_page_tables")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def device(self) -> torch.device:
        """The device of the weights.

        Raises: ValueError, if it is "meta": nothing can be computed there.
        """
        device = head_weight("Engine", self.var).device
        if device.type == "meta":
            check_values("Engine", self.var, self.vae)
        return device

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of cast weights, activations and matrix products."""
        return product_dtype(self.device, self.dtype)

    @property
    def packed(self) -> bool:
        """Whether the weights are packed for the CPU's matrix library."""
        return self.pack and can_pack(self.device, self.product_dtype)

    @property
    def _recordings(self) -> GraphCache | None:
        """Those made with the weights of the last call."""
        return None if self._graphs is None else self._graphs[1].graphs

    def refresh(self) -> None:
        """Casts the weights again at the next call.

        Needed after a change that torch does not record: through ``.data``, by another process in
        shared memory, or by an optimizer's step in the replay of a CUDA graph.
        """
        with self._lock:
            self._cast = self._graphs = None

    def _check_parts(self) -> None:
        check_pair(self.var, self.vae, "Engine")  # other models may have taken their place
        check_values("Engine", self.var, self.vae)  # a copy from "meta" to the CPU does nothing
        with explained("Engine", self, ENCODER), torch.autocast(self.device.type, enabled=False):
            check_engine_parts(self.var, self.vae, self.product_dtype, self.packed)

    def _version(self) -> Version:
        """The version of the models' weights of now."""
        return self._weights_version(self.var, self.vae, self.product_dtype, self.packed)

    def _structure(self, version: Version) -> Version:
        return self._weights_version.structure(version)

    def _check_changed_parts(self, version: Version) -> None:
        """:meth:`_check_parts`, for VAR-d30 0.35 s on a CPU core, unless only values changed.

        Hooks are called at every change of a value: some make a weight of others.
        """
        structure = self._structure(version)
        if structure != self._checked or version.hooks:
            self._check_parts()

    def _weights(self) -> EngineWeights:
        """The weights in the engine's dtype, cast again if any changed since the last call."""
        instance("Engine", "vae", self.vae, VQVAE)
        version = self._version()
        with self._lock:
            self._follow_global_hooks(version)
            if self._cast is None or self._cast[0] != version or self._was_freed:
                # Free the old copies, and the graphs that read them, before new ones are allocated.
                self._cast = self._graphs = None
                self._check_changed_parts(version)
                with explained("Engine", self, ENCODER):
                    weights = EngineWeights(self.var, self.vae, self.product_dtype, self.packed)
                # Making them calls parts and hooks: a counter there is no setting that changed.
                version = version._replace(settings=self._weights_version.settings())
                self._cast, self._checked = (version, weights), self._structure(version)
                self._cast_from = self._weights_version.memory()
            elif self._graphs is not None and self._graphs[1].are_outdated:
                self._graphs = None
            return self._cast[1]

    def _follow_global_hooks(self, version: Version) -> None:
        """Check hooks that torch calls for every module, and keep the weights if they are the same.

        Counters of FLOPs add such hooks and remove them around one call.
        """
        if self._cast is None or self._was_freed:
            return
        known, weights = self._cast
        if known.global_hooks == version.global_hooks:
            return
        if known._replace(global_hooks=version.global_hooks) != version:
            return
        if version.global_hooks:
            self._check_parts()
        with torch.no_grad():  # the embeddings are the part that is called when weights are made
            position_1LC = self.var.position_embedding().float()
        if torch.equal(position_1LC, weights.position_1LC):
            self._cast = known._replace(global_hooks=version.global_hooks), weights

    def _presumed(self) -> tuple[EngineWeights, GraphReplay] | None:
        """Weights of the last call and their graphs, whether or not the model changed since.

        None where there are none, where the model was moved to another device, and where torch
        calls hooks for every module.
        """
        with self._lock:
            if self._cast is None or self._graphs is None or self._graphs[0] is not self._cast[1]:
                return None
            if global_hooks():
                return None
            weights, graphs = self._graphs
        return (weights, graphs) if weights.pos_start.device == self.device else None

    def _unchanged(self, weights: EngineWeights) -> bool:
        """Whether the model's weights are still those that ``weights`` were made from."""
        version = self._version()
        with self._lock:
            outdated = self._graphs is not None and self._graphs[1].are_outdated
            return self._cast == (version, weights) and not self._was_freed and not outdated

    @property
    def _was_freed(self) -> bool:
        """Whether a tensor that the weights were cast from is another one now."""
        return self._cast_from is None or self._cast_from.was_freed

    def _replay(self, recorder: Recorder) -> GraphReplay:
        # All tensors of both models, which keep their memory also if the models drop them.
        models = (self.var, self.vae)
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        kept = [tensor.detach() for tensor in tensors]
        return GraphReplay(recorder, kept, self._weights_version.called)


def check_pair(var: nn.Module | None, vae: nn.Module | None, op: str = "VARiant") -> None:
    """Raises: TypeError unless they are a VAR and a VQVAE; ValueError unless the two have one
    codebook and layout."""
    remedy = "variant.accelerate takes model objects of the original code"
    a = instance(op, "var", var, VAR, remedy).config
    b = instance(op, "vae", vae, VQVAE, remedy).config
    try:
        check_pair_of_configs(a, b)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def check_values(op: str, var: VAR, vae: VQVAE) -> None:
    """Raises: ValueError, naming the first weight on the meta device, which holds no values.

    The encoder's are not needed.
    """
    unused = tuple(f"vae.{part}." for part in ENCODER)
    for part, model in (("var", var), ("vae", vae)):
        for name, weight in model.named_parameters(part):
            if weight.is_meta and not name.startswith(unused):
                raise ValueError(
                    f'{op}: the weights must be on a device such as "cpu"; {name} is on "meta", '
                    "which holds no values"
                )


def without_graphs_if_full(method: F) -> F:
    """Runs a method without side effects; once more without recordings if memory ran out.

    Only graphs can use the memory that they hold.
    """

    @wraps(method)
    def run(self: CastModels, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except torch.OutOfMemoryError:
            recordings = self._recordings
            if not recordings:
                raise
        # Here the frame of the failed call is gone, and its tensors are freed.
        recordings.clear()
        return method(self, *args, **kwargs)

    return cast("F", run)


@cache
def _warn_of_slowness(dtype: torch.dtype, native: bool) -> None:
    """Once in a process: the caller asked for fewer bits to be faster, and is not."""
    name = dtype_name(dtype)
    reason = f"this processor has no native {name} products"
    if native:
        reason = f"the ops between the products have no {name} kernels on a CPU"
    text = (
        f"{reason}; weights and products are float32, K and V are stored in {name}. "
        "dtype=torch.float32 is at least as fast"
    )
    if has_products("cpu", torch.bfloat16):
        text += ", torch.bfloat16 faster"
    warnings.warn(f"Engine: {text}", stacklevel=4)
