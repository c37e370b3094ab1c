"""The weights of an engine: cast and packed once, shared with the model where no cast is needed.

Axes: B images, R sequences, T tokens, C width, H heads, L tokens of all scales, 6 the parts of a
modulation (gates, scales, shifts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant.engine.hooks import change_images, check_hooks
from variant.engine.packed_layers import CastBuffer, CastDecoder, Linear, PackedDecoder
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.parts import check_parts, has_method_of
from variant.models.var import VAR, Block, HeadNorm, SelfAttention, projection
from variant.models.vqvae import DECODER, ENCODER, VQVAE
from variant.models.zones import LINEARS, LayerView
from variant_kernels.arguments import typed
from variant_kernels.integrations.alterations import (
    global_hooks,
    is_equal,
    is_setting,
    readable,
)
from variant_kernels.tensors import Memory, version_of

# Tokens per call of the MLP on a CPU, so that its hidden tensor stays in the cache (4096 tokens,
# 1024 x 4096 x 1024, bfloat16: 167 ms in parts of 512 tokens, 181 ms at once).
MLP_TOKENS = 512
# Parts of the transformer that the engine calls.
CALLED = frozenset({"class_emb", "lvl_embed", "shared_ada_lin"})
# Of the config, in place of the parts' attributes of these names.
SETTINGS = ("norm_eps", "num_heads", "head_dim", "shared_aln")


class LayerWeights:
    """The weights of one layer; its linear layers are callables. Low-rank additions are merged."""

    def __init__(
        self, view: LayerView, dtype: torch.dtype, packed: bool, cast_buffer: CastBuffer
    ) -> None:
        attn = view.attn
        self.softmax_scale = attn.softmax_scale
        self.scale_mul_1H11 = attn.scale_mul_1H11.detach().float() if attn.attn_l2_norm else None
        self.qkv, self.proj, self.fc1, self.fc2 = (
            Linear(
                *view.linear(name),
                dtype,
                packed=packed,
                gelu=name == "fc1",
                cast_buffer=cast_buffer,
            )
            for name in LINEARS
        )

        # Of weights that no module of the model holds: packed, cast or merged ones.
        self.num_bytes = sum(
            linear.num_bytes
            for linear, name in zip((self.qkv, self.proj, self.fc1, self.fc2), LINEARS, strict=True)
            if not linear.shares(view.parameter(name))
        )

    def mlp(self, h_RTC: Tensor) -> Tensor:
        """(R, T, C) to (R, T, C)."""
        h_NC = h_RTC.flatten(0, 1)
        if h_NC.device.type != "cpu" or len(h_NC) <= MLP_TOKENS:
            return self.fc2(self.fc1(h_RTC))
        y_NC = torch.empty_like(h_NC)
        for part_NC, h_PC in zip(y_NC.split(MLP_TOKENS), h_NC.split(MLP_TOKENS), strict=True):
            part_NC.copy_(self.fc2(self.fc1(h_PC)))
        return y_NC.view_as(h_RTC)


class EngineWeights:
    """All weights that the step loop reads; embeddings stay float32, as the residual stream.

    Args:
        var, vae: the models.
        dtype: of the matrix products.
        packed: keep packed copies; :func:`variant_kernels.packed_linear.can_pack` must be true.
    """

    def __init__(self, var: VAR, vae: VQVAE, dtype: torch.dtype, packed: bool) -> None:
        self.packed, self.dtype = packed, dtype
        cast_buffer = CastBuffer(dtype)
        views = [LayerView(block, None) for block in var.layers()]
        self.layers = [LayerWeights(view, dtype, self.packed, cast_buffer) for view in views]
        self.head = _linear(var.head, dtype, self.packed, cast_buffer)
        self.position_1LC = var.position_embedding().detach().float()
        if self.position_1LC.shape != var.pos_1LC.shape:  # kernels rely on it
            raise ValueError(
                f"Engine: var.pos_1LC plus var.lvl_embed must be {tuple(var.pos_1LC.shape)}; got "
                f"{tuple(self.position_1LC.shape)}"
            )
        self.pos_start = var.pos_start.detach().float()
        self.word_embed = _linear(var.word_embed, torch.float32, False, None)
        self.modulations = Modulations(var, views, dtype, self.packed, cast_buffer)
        self.head_modulation = HeadModulation(var, dtype, self.packed, cast_buffer)
        self._var, self._vae = var, vae
        self._decoder: PackedDecoder | CastDecoder | None = None
        self._harmless_hooks: tuple[int, ...] = ()
        self._zones: dict[int, ZoneWeights] = {}
        self._zone_lock = Lock()

    def zone(self, depth: int) -> ZoneWeights:
        """The zone weights of a subnet: packed, cast and merged at the first use of its depth."""
        with self._zone_lock:
            if depth not in self._zones:
                self._zones[depth] = self._new_zone(depth)
            return self._zones[depth]

    def zone_bytes(self, depths: Collection[int]) -> int:
        """Bytes of the zone weights of some subnets that are not the model's own tensors."""
        return sum(self.zone(depth).num_bytes for depth in depths)

    @torch.no_grad()
    def _new_zone(self, depth: int) -> ZoneWeights:
        blocks, cast_buffer = self._var.layers(), CastBuffer(self.dtype)
        views = {
            layer: LayerView(blocks[layer], depth) for layer in self._var.config.subnets[depth]
        }
        options = self.dtype, self.packed, cast_buffer
        own = {i: LayerWeights(view, *options) for i, view in views.items() if view.has_linears}
        modulated = [view for view in views.values() if view.has_adaln]
        modulations = Modulations(self._var, modulated, *options) if modulated else None
        num_bytes = sum(layer.num_bytes for layer in own.values())
        return ZoneWeights(
            tuple(views),
            own or {layer: self.layers[layer] for layer in views},
            modulations,
            num_bytes + (0 if modulations is None else modulations.num_bytes),
        )

    @torch.no_grad()
    def decode(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, I, Y, X) float32 in [0, 1]."""
        copied = copies_decoder(self._vae, self.dtype, self.packed)
        if not copied or self._hooks_change_images():
            return self._vae.decode_features(f_hat_BCHW).float()
        if self._decoder is None:  # built at the first use: not every caller decodes
            kind = PackedDecoder if self.packed else CastDecoder
            self._decoder = kind(self._vae, self.dtype)
        return self._decoder(f_hat_BCHW)

    def _hooks_change_images(self) -> bool:
        """Whether torch's global hooks change what the VQ-VAE's decoder returns."""
        hooks = global_hooks()
        if self._harmless_hooks != hooks:
            if hooks and change_images(self._vae):
                return True
            self._harmless_hooks = hooks
        return False


_GET: Any = dict.get
# Members of modules and, of each, the name of one setting.
Settings = tuple[Sequence[Mapping[str, Any]], Sequence[str]]


class Version(NamedTuple):
    """What an engine made its weights from.

    modules, classes, forwards: of both models; forwards are those set on a module itself.
    members: numbers of the attributes of each part that is read, among which other methods may be.
    settings: numbers, texts and configs among these attributes: padding modes, softmax scales.
        Those of a part that the engine calls are its own, and a counter may be among them.
    hooks: ids of all forward hooks and forward pre-hooks of the modules.
    global_hooks: ids of those that torch calls for every module.
    tensors: of every parameter and buffer, and of tensors that a caller put in the place of one,
        the identity, address and version.
    """

    modules: tuple[nn.Module, ...]
    classes: tuple[type[nn.Module], ...]
    forwards: tuple[Any, ...]
    members: tuple[int, ...]
    settings: tuple[Any, ...]
    hooks: tuple[int, ...]
    global_hooks: tuple[int, ...]
    tensors: tuple[tuple[int, int, int], ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and is_equal(tuple(self), tuple(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class WeightsVersion:
    """Reads a :class:`Version`, which differs after any change but one in place by ``.data``.

    Walking over the modules of VAR-d30 takes 0.7 ms, during which a GPU would be idle.
    While every module has the same children as at the last walk, and as many attributes, and the
    same parts are called, its result is used again.
    """

    def __init__(self) -> None:
        self._modules: tuple[nn.Module, ...] = ()
        self._children: list[nn.Module | None] = []
        self._holders: Sequence[Mapping[str, Tensor | None]] = []
        self._hooks: Sequence[Mapping[int, Any]] = []
        self._members: Sequence[Mapping[str, Any]] = []
        self._read: Sequence[Mapping[str, Any]] = []  # those of parts that are read
        self._settings: Settings = ([], [])
        # Of parts that are called.
        self._called: Sequence[Mapping[str, Any]] = []
        self._called_settings: Settings = ([], [])
        self._names: tuple[frozenset[str], bool] | None = None
        # Tensors that are neither parameters nor buffers.
        self._plain: Sequence[tuple[Mapping[str, Any], str]] = []
        self._counts: list[int] = []

    def __call__(self, var: VAR, vae: VQVAE, dtype: torch.dtype, packed: bool) -> Version:
        """The version of now.

        Args:
            var, vae, dtype, packed: as of :class:`EngineWeights`.
        """
        try:
            names = called_parts(var, dtype, packed), copies_decoder(vae, dtype, packed)
        except AttributeError:  # a part was removed; the checks before new weights name it
            names = frozenset[str](), False
        counts = list(map(len, self._members))
        known = self._children, self._counts, self._names
        if known != ([var, vae, *_children(self._modules)], counts, names):
            self._modules = (*var.modules(), *vae.modules())
            holders = [(module._parameters, module._buffers) for module in self._modules]
            self._holders = list(chain.from_iterable(holders))
            self._members = [vars(module) for module in self._modules]
            read, called = _read_and_called(var, vae, *names)
            read_parts = [vars(module) for module in self._modules if id(module) in read]
            self._read = [vars(vae), *read_parts]  # it has a method that the engine passes by
            self._called = [vars(module) for module in self._modules if id(module) in called]
            configs = [
                (members, name)
                for members in self._members
                for name, value in members.items()
                if isinstance(value, VARConfig | VQVAEConfig)
            ]
            self._settings = _settings(read_parts, configs)
            self._called_settings = _settings(self._called)
            self._plain = [
                (members, name)
                for members in self._members
                for name, value in members.items()
                if isinstance(value, Tensor)
            ]
            self._counts, self._names = list(map(len, self._members)), names
            hooks = ("_forward_pre_hooks", "_forward_hooks")
            self._hooks = [members[name] for members in self._members for name in hooks]
            # Last: another thread takes the rest as it is where this is of now.
            self._children = [var, vae, *_children(self._modules)]
        return Version(
            self._modules,
            tuple(map(type, self._modules)),
            tuple([members.get("forward") for members in self._members]),
            tuple(map(len, self._read)),
            self.settings(),
            tuple(chain.from_iterable(self._hooks)),
            global_hooks(),
            # The identity, as another parameter may be a view of the same memory.
            tuple((id(t), t.data_ptr(), version_of(t)) for t in self._tensors()),
        )

    def settings(self) -> tuple[Any, ...]:
        """The settings of now of parts that are read, as known at the last version."""
        return tuple(map(_GET, *self._settings))

    def called(self) -> tuple[Any, ...]:
        """The settings of now of parts that are called, as known at the last version.

        They decide no weights. A CUDA graph has those with which it was recorded.
        """
        return *map(len, self._called), *map(_GET, *self._called_settings)

    def memory(self) -> Memory:
        """The memory of the tensors of the last version; where it was freed, they are others."""
        return Memory(self._tensors())

    def structure(self, version: Version) -> Version:
        """The last version without the values of tensors: what decides whether the parts fit."""
        kinds = tuple((id(t), t.shape, t.dtype, t.device) for t in self._tensors())
        return version._replace(tensors=kinds)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (t for holder in self._holders for t in holder.values() if t is not None)
        for members, name in self._plain:
            value = members.get(name)
            # Those that a hook makes of parameters are made anew at each call of the module.
            if isinstance(value, Tensor) and not members["_forward_pre_hooks"]:
                yield value


def _children(modules: Sequence[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]


def _settings(
    parts: Sequence[Mapping[str, Any]], more: Sequence[tuple[Mapping[str, Any], str]] = ()
) -> Settings:
    """Where the settings of some parts are, given by their members."""
    own = [(members, n) for members in parts for n, v in members.items() if is_setting(n, v)]
    found = [*more, *own]
    return [members for members, _ in found], [name for _, name in found]


def _read_and_called(
    var: VAR, vae: VQVAE, called_names: Collection[str], copied: bool
) -> tuple[set[int], set[int]]:
    """Ids of the modules whose settings decide the weights, and of the others that are called.

    Among the first is ``lvl_embed``, whose result is kept. The encoder is neither.
    """
    names = set(called_names) - {"lvl_embed"}
    paths = var.named_modules(remove_duplicate=False)
    read = {id(part) for path, part in paths if names.isdisjoint(path.split("."))}
    called, unused = {id(part) for part in (*var.modules(), *vae.modules())}, set[int]()
    for name, parts in ((DECODER, read), (ENCODER, unused)):
        for part in (vae._modules.get(n) for n in name):
            if part is not None and (copied or name is ENCODER):
                parts |= {id(inner) for inner in part.modules()}
    return read, called - read - unused


def check_engine_parts(var: VAR, vae: VQVAE, dtype: torch.dtype, packed: bool) -> None:
    """Check the parts of the transformer whose weights the engine reads without calling them.

    Parts that it calls may be of any class: embeddings, and projections that it does not cast.

    Raises:
        TypeError, ValueError: a part is missing, of another class, or of another shape, or has a
            hook that changes what it takes or returns; a setting of a part is not the config's; a
            method of the models that the engine does not call was replaced.
    """
    if not has_method_of(vae, VQVAE, "decode"):
        raise TypeError(
            "Engine: vae.decode must be that of VQVAE, as the engine does not call it; it was "
            "replaced or overridden. Replace decode_features instead, which the engine calls"
        )
    names = called_parts(var, dtype, packed)

    def is_called(path: str) -> bool:
        return not names.isdisjoint(path.split("."))

    check_parts("Engine", {"var": var}, is_called)
    _check_settings(var)
    check_hooks(var, is_called)


def _check_settings(var: VAR) -> None:
    """Raises: ValueError, if a part has a setting that the engine takes from the config."""
    config = var.config
    settings = {name: getattr(config, name) for name in SETTINGS}
    for path, part in var.named_modules():
        if not isinstance(part, Block | SelfAttention | HeadNorm):
            continue  # what the engine calls has settings of its own
        if isinstance(part, SelfAttention):
            _check_softmax_scale(path, part.softmax_scale)
        for name, found in vars(part).items():
            if name in settings and not is_equal(found, settings[name]):
                raise ValueError(
                    f"Engine: var.{readable(path)}.{name} must be {settings[name]}, that of "
                    f"var.config, which the engine reads; got {found}. Change both"
                )


def _check_softmax_scale(path: str, found: object) -> None:
    """Raises: TypeError, if it is a tensor: a change of its value in place would not be seen."""
    if isinstance(found, Tensor) or not isinstance(found, SupportsFloat):
        raise TypeError(
            f"Engine: var.{readable(path)}.softmax_scale must be one number, the factor on the "
            f"scores of all heads; got {typed(found)}. Give a float"
        )


def on_gpu(weight: Tensor) -> bool:
    """Whether a weight is on a GPU."""
    return weight.device.type != "cpu"


def casts_modulations(var: VAR, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the engine casts the adaLN projections to its dtype.

    On a GPU always: their cost is reading them, and they are a third of the model.
    """
    own = var.head.weight
    return (packed or on_gpu(own)) and dtype != own.dtype and not var.config.shared_aln


def called_parts(var: VAR, dtype: torch.dtype, packed: bool) -> frozenset[str]:
    """Names of parts of the transformer that the engine calls, and of which all below is called."""
    return CALLED if casts_modulations(var, dtype, packed) else CALLED | {"ada_lin"}


def copies_decoder(vae: VQVAE, dtype: torch.dtype, packed: bool) -> bool:
    """Whether the engine runs a packed or cast copy of the decoder, not the model's own."""
    own = vae.post_quant_conv.weight
    cast = on_gpu(own) and dtype not in (own.dtype, torch.float32)
    return (packed or cast) and has_method_of(vae, VQVAE, "decode_features")


def _linear(
    linear: nn.Linear, dtype: torch.dtype, packed: bool, cast_buffer: CastBuffer | None
) -> Linear:
    return Linear(linear.weight, linear.bias, dtype, packed=packed, cast_buffer=cast_buffer)


class Modulations:
    """The six modulation vectors per sequence of some layers.

    They depend on the class alone, so they are computed once per image and not once per scale.
    In a 16-bit engine the projections are cast, and on a CPU packed, like all other weights. In the
    weights' own dtype the model's modules are used: their weights, a third of the model, are read
    once per image only and are not worth a second copy.

    num_bytes: of the projections that are no modules of the model.
    """

    def __init__(
        self,
        var: VAR,
        views: Sequence[LayerView],
        dtype: torch.dtype,
        packed: bool,
        cast_buffer: CastBuffer,
    ) -> None:
        self._var, self._views, self._dtype = var, views, dtype
        self._linears: list[Linear] = []
        if casts_modulations(var, dtype, packed):
            modules = [projection(view.ada_lin) for view in views]
            self._linears = [_linear(module, dtype, packed, cast_buffer) for module in modules]
        self.num_bytes = sum(linear.num_bytes for linear in self._linears)

    def __call__(self, cond_RC: Tensor) -> list[tuple[Tensor, ...]]:
        """Each layer's six vectors, each (R, C) in the engine's dtype."""
        if self._linears:
            active_RC = F.silu(cond_RC).to(self._dtype)
            return [_vectors(linear(active_RC), active_RC) for linear in self._linears]
        shared = self._var.shared_condition(cond_RC)
        return [view.modulation(shared).to(self._dtype).unbind(1) for view in self._views]


class HeadModulation:
    """The two modulation vectors of the norm before the head; see :class:`Modulations`."""

    def __init__(self, var: VAR, dtype: torch.dtype, packed: bool, cast_buffer: CastBuffer) -> None:
        self._head_nm, self._dtype = var.head_nm, dtype
        self._linear: Linear | None = None
        if casts_modulations(var, dtype, packed):
            self._linear = _linear(projection(var.head_nm.ada_lin), dtype, packed, cast_buffer)

    def __call__(self, cond_RC: Tensor) -> tuple[Tensor, ...]:
        """Two vectors, each (R, C) in the engine's dtype."""
        if self._linear is None:
            return self._head_nm.modulation(cond_RC).to(self._dtype).unbind(1)
        active_RC = F.silu(cond_RC).to(self._dtype)
        return _vectors(self._linear(active_RC), active_RC)


def _vectors(packed: Tensor, like_RC: Tensor) -> tuple[Tensor, ...]:
    return packed.view(like_RC.shape[0], -1, like_RC.shape[1]).unbind(1)


@dataclass(frozen=True)
class ZoneWeights:
    """The weights that the engine uses for the flexible zone of one subnet.

    active: the subnet's layers.  layers: the weights of each.  modulations: of these layers, in
    this order; None where they are those of the full network.  num_bytes: of tensors that no module
    of the model holds: packed, cast or merged weights.
    """

    active: tuple[int, ...]
    layers: Mapping[int, LayerWeights]
    modulations: Modulations | None
    num_bytes: int
