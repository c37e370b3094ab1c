"""Infinity (FoundationVision/Infinity): ``patch`` for its text-to-image transformer.

As in VAR, the model's own loop switches caching on in every layer, runs one scale after another and
switches caching off. The differences: after the L2 norm, q and k are rotated by their position in
the token map; the scales are an argument of each generation; and blocks have cross-attention to the
text, which the patch does not change.

Axes: B sequences, T tokens of this call, C width, H heads, D width of one head, F = D/2 pairs, 3
queries, keys and values, 2 cosines and sines, L tokens of all scales.
"""

from __future__ import annotations

import ast
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from variant_kernels.attention import can_attend, is_scale_bound
from variant_kernels.integrations.alterations import readable
from variant_kernels.integrations.base import ClassSwap, ModelFamily, Patched, require
from variant_kernels.integrations.rope import rotate_pairs
from variant_kernels.integrations.runtime import PatchError, Runtime
from variant_kernels.integrations.var import (
    PatchedAttention,
    cast_once,
    require_arguments,
    require_known_parts,
    shape_of,
)
from variant_kernels.integrations.var_generation import Layers, VARRuntime
from variant_kernels.masks import block_causal_layout
from variant_kernels.ops.append_paged_kv import append_paged_kv
from variant_kernels.ops.qk_norm import qk_norm
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.wording import counted

# (frames, height, width) of each scale.
Scales = list[tuple[int, int, int]]


def layout_of_scales(scale_schedule: Scales) -> ScaleLayout:
    """Tokens per scale; the frames of a clip are stacked vertically."""
    return ScaleLayout(tuple((int(t) * int(h), int(w)) for t, h, w in scale_schedule))


class InfinityRuntime(VARRuntime):
    """:class:`VARRuntime` with a layout per generation."""

    def __init__(self, layout: ScaleLayout, layers: Layers) -> None:
        super().__init__(layout, layers)
        self.num_scales = None

    def use(self, scale_schedule: Scales | None) -> None:
        """Set the scales of the current generation; only its first call has an effect.

        Raises:
            PatchError: there are none.
        """
        if self.seen == 0:
            if scale_schedule is None:
                raise PatchError(
                    "patch: while Infinity generates, blocks must get scale_schedule; other ways "
                    "to generate need unpatch()"
                )
            self.layout = layout_of_scales(scale_schedule)


class InfinityAttention(PatchedAttention):
    """``SelfAttention`` with L2 norm, rotation and pages; the cache stores rotated keys."""

    attn_drop = 0.0
    cos_attn: bool

    @property
    def attn_l2_norm(self) -> bool:  # type: ignore[override]  # the original calls it cos_attn
        """Whether q and k have unit length."""
        return self.cos_attn

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Any = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None,
        scale_ind: int = 0,
    ) -> Tensor:
        bias = attn_bias_or_two_vector
        masked = isinstance(bias, Tensor)
        # Training with the flash-attention fork or flex attention runs the original code.
        kernels = attn_fn is None and (masked if not self.caching else bias is None)
        if not kernels or rope2d_freqs_grid is None:
            return self._original(x, bias, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)
        cos_sin_2TF = cos_sin(rope2d_freqs_grid, scale_schedule, scale_ind, x)
        qkv_BT3HD = self._project(x)
        if self.caching:
            out_BTHD = self._attend_pages(qkv_BT3HD, cos_sin_2TF)
        else:
            q_BTHD, k_BTHD, v_BTHD = self._rotated(qkv_BT3HD, cos_sin_2TF)
            layout = block_causal_layout(bias)
            block_causal = layout is not None and layout.total == x.shape[1]
            attend = self._attend if block_causal else self._torch_attention
            out_BTHD = attend(q_BTHD, k_BTHD, v_BTHD, bias)
        return self.proj_drop(self.proj(out_BTHD.flatten(2)))

    def _original(self, *arguments: Any) -> Tensor:
        if self.caching:
            raise PatchError(
                "patch: while Infinity generates, attention must have no mask, no attn_fn and a "
                "rotation (rope2d_freqs_grid); other ways to generate need unpatch()"
            )
        return self.patch_state.original.forward(self, *arguments)

    def _scale_mul(self) -> Tensor | None:
        # (1, 1, H, 1) or (1, H, 1, 1), depending on the attention kernel of the model.
        scale_mul = super()._scale_mul()
        return None if scale_mul is None else scale_mul.view(1, -1, 1, 1)

    def _rotated(self, qkv_BT3HD: Tensor, cos_sin_2TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in the projection's dtype; norm and rotation in float32, rounded once."""
        q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
        scale_mul = self._scale_mul()
        if scale_mul is not None:
            q_BTHD, k_BTHD = qk_norm(q_BTHD.float(), k_BTHD.float(), scale_mul.float())
        q_BTHD, k_BTHD = (rotate_pairs(x, cos_sin_2TF).to(v_BTHD.dtype) for x in (q_BTHD, k_BTHD))
        return q_BTHD, k_BTHD, v_BTHD

    def _attend_pages(self, qkv_BT3HD: Tensor, cos_sin_2TF: Tensor) -> Tensor:
        self._check_no_gradient(qkv_BT3HD)
        store = self._kv_store(qkv_BT3HD)
        step = store.open(qkv_BT3HD.shape[1])
        q_BTHD, k_BTHD, v_BTHD = self._rotated(qkv_BT3HD, cos_sin_2TF)
        append_paged_kv(k_BTHD, v_BTHD, store.k_pages, store.v_pages, step.slots_BT)
        out_BTHD = self._read_pages(q_BTHD, store, step)
        store.close()
        return out_BTHD


def cos_sin(grid: dict[str, Tensor], scale_schedule: Scales, scale: int, x: Tensor) -> Tensor:
    """Cosines and sines, (2, T, F), for T tokens from the first one of ``scale`` on.

    Raises:
        PatchError: the model has no angles for these scales, or too few.
    """
    name = str(tuple(scale_schedule))
    if name not in grid:
        raise PatchError(f"patch: Infinity has no rotation for the scales {name}")
    start = sum(t * h * w for t, h, w in scale_schedule[:scale])
    # (2, 1, 1, 1, L, F); stored on the device of the last use, as the original code does.
    grid[name] = grid[name].to(x.device)
    cos_sin_2TF = grid[name][:, 0, 0, 0, start : start + x.shape[1]]
    if cos_sin_2TF.shape[1] != x.shape[1]:
        raise PatchError(
            f"patch: Infinity has rotations for {counted(grid[name].shape[4], 'token')} of the "
            f"scales {name}; got {x.shape[1]} from {start}"
        )
    return cos_sin_2TF


class InfinityBlock(Patched, nn.Module):
    """``CrossAttnBlock``, skipped at scales where its layer is inactive."""

    patch_layer: int
    sa: Any

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        runtime: InfinityRuntime = self.patch_state.runtime
        if not self.sa.caching:
            runtime.check_thread(False)
        else:
            call_args = dict(zip(BLOCK_ARGUMENTS[1:], arguments, strict=False)) | options
            if self.patch_layer == 0:
                runtime.use(call_args.get("scale_schedule"))
            if runtime.tokens_for(self.patch_layer, x.shape[1]) == 0:
                return x
        return super().forward(x, *arguments, **options)


# --- the family -----------------------------------------------------------------------------------

ATTENTION_PARTS = (
    *("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "proj_drop", "kv_caching"),
    *("num_heads", "head_dim", "cos_attn", "scale", "using_flash"),
)
ATTENTION_ARGUMENTS = [
    *("x", "attn_bias_or_two_vector", "attn_fn", "scale_schedule"),
    *("rope2d_freqs_grid", "scale_ind"),
]
BLOCK_ARGUMENTS = [
    *("x", "cond_BD", "ca_kv", "attn_bias_or_two_vector", "attn_fn", "scale_schedule"),
    *("rope2d_freqs_grid", "scale_ind"),
]


class InfinityFamily(ModelFamily):
    """FoundationVision/Infinity, text to image."""

    name: ClassVar[str] = "Infinity"
    structure: ClassVar[str] = (
        "autoregressive_infer_cfg, rope2d_freqs_grid and unregistered_blocks with sa and ca"
    )

    def recognise(self, model: nn.Module) -> bool:
        blocks = getattr(model, "unregistered_blocks", None)
        parts = ("autoregressive_infer_cfg", "rope2d_freqs_grid", "head_nm")
        if not isinstance(blocks, list) or not blocks or not all(hasattr(model, p) for p in parts):
            return False
        return hasattr(blocks[0], "sa") and hasattr(blocks[0], "ca")

    def runtime(self, model: Any) -> InfinityRuntime:
        layers = Layers("unregistered_blocks", "sa", lambda: registered_blocks(model))
        return InfinityRuntime(layout_of_scales(first_scales(model)), layers)

    def module_names(self, model: Any) -> dict[int, str]:
        names = super().module_names(model)
        for index, block in enumerate(model.unregistered_blocks):
            for path, module in block.named_modules():
                dotted = f"unregistered_blocks.{index}.{path}".removesuffix(".")
                names[id(module)] = readable(dotted)
        return names

    def verify(self, model: Any) -> None:
        grid, flex = model.rope2d_freqs_grid, getattr(model, "use_flex_attn", None)
        self._require(
            isinstance(grid, dict) and len(grid) > 0,
            "rope2d_freqs_grid must be a dictionary of the rotations by scales",
            type(grid).__name__,
        )
        self._require(
            flex is False,
            "use_flex_attn must be False: flex attention pads the cached keys and values",
            flex,
        )
        run = [id(block) for block in registered_blocks(model)]
        for index, block in enumerate(model.unregistered_blocks):
            name = f"unregistered_blocks[{index}]"
            self._require(
                id(block) in run, f"{name} must be a module of the model", "another module"
            )
            require_arguments(self.name, block, name, BLOCK_ARGUMENTS)
            self._require(hasattr(block, "sa"), f"{name} must have sa", type(block).__name__)
            self._require_attention(block.sa, f"{name}.sa", model.C)
        self._require(
            run == list(dict.fromkeys(map(id, model.unregistered_blocks))),
            "unregistered_blocks must have the order of the modules",
            "another order",
        )
        width = model.unregistered_blocks[0].sa.head_dim // 2
        scales = str(tuple(first_scales(model)))
        rotations = grid[scales]
        total = layout_of_scales(first_scales(model)).total
        fits = (
            isinstance(rotations, Tensor)
            and rotations.dtype == torch.float32
            and rotations.dim() == 6
            and rotations.shape[:4] == (2, 1, 1, 1)
            and rotations.shape[4] >= total
            and rotations.shape[5] == width
        )
        self._require(
            fits,
            f"rope2d_freqs_grid[{scales!r}] must be float32 (2, 1, 1, 1, {total}, {width})",
            f"{rotations.dtype} {tuple(rotations.shape)}"
            if isinstance(rotations, Tensor)
            else type(rotations).__name__,
        )

    def _require(self, condition: bool, requirement: str, actual: Any) -> None:
        require(self.name, condition, requirement, actual)

    def _require_attention(self, attn: Any, name: str, width: int) -> None:
        missing = [part for part in ATTENTION_PARTS if not hasattr(attn, part)]
        self._require(not missing, f"{name} must have {missing}", f"a {type(attn).__name__}")
        require_arguments(self.name, attn, name, ATTENTION_ARGUMENTS)
        require_known_parts(self.name, attn, name)
        heads, head_dim = attn.num_heads, attn.head_dim
        self._require(
            heads * head_dim == width and can_attend(head_dim),
            f"{name} must have {width} channels and heads of a multiple of 8 from 16 to 256",
            f"{counted(heads, 'head')} of {head_dim}",
        )
        shapes = {
            "mat_qkv.weight": (attn.mat_qkv.weight, [(3 * width, width)]),
            "q_bias": (attn.q_bias, [(width,)]),
            "v_bias": (attn.v_bias, [(width,)]),
            "zero_k_bias": (attn.zero_k_bias, [(width,)]),
        }
        if attn.cos_attn:
            scale_mul = getattr(attn, "scale_mul_1H11", None)
            self._require(scale_mul is not None, f"{name} must have scale_mul_1H11", "none")
            shapes["scale_mul_1H11"] = scale_mul, [(1, 1, heads, 1), (1, heads, 1, 1)]
            bound = getattr(attn, "max_scale_mul", None)
            self._require(is_scale_bound(bound), f"{name}.max_scale_mul must be log 100", bound)
        for part, (tensor, allowed) in shapes.items():
            shape, expected = shape_of(tensor), " or ".join(map(str, allowed))
            self._require(shape in allowed, f"{name}.{part} must have shape {expected}", shape)

    def class_swaps(self, model: Any, runtime: Runtime) -> list[ClassSwap]:
        swaps = []
        for layer, block in enumerate(model.unregistered_blocks):
            attributes = {"patch_layer": layer}
            swaps.append(ClassSwap(block, InfinityBlock, attributes))
            swaps.append(ClassSwap(block.sa, InfinityAttention, {**attributes, "caching": False}))
            swaps += cast_once(block.sa.proj, block.ffn, block.ca)
        return swaps + cast_once(model.word_embed)

    def probe(self, model: Any) -> list[Tensor]:
        """Self-attention of every layer at the first two scales, on random input.

        Cross-attention is not patched, and its kernel runs on a GPU only.
        """
        layers, scales = [block.sa for block in model.unregistered_blocks], first_scales(model)
        modes = [(module, module.training) for sa in layers for module in sa.modules()]
        weight = layers[0].q_bias  # other weights may be quantised
        generator = torch.Generator().manual_seed(0)
        runtime = getattr(layers[0], "patch_state", None)
        outputs = []
        try:
            for module, _ in modes:
                module.training = False
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                for sa in layers:
                    sa.kv_caching(True)
                for k, (t, h, w) in enumerate(scales[:2]):
                    x = torch.randn(2, t * h * w, model.C, generator=generator, device="cpu")
                    x = x.to(weight.device, weight.dtype)
                    for layer, sa in enumerate(layers):
                        if runtime is not None and layer == 0:
                            runtime.runtime.use(scales)
                        if runtime is not None:
                            runtime.runtime.tokens_for(layer, x.shape[1])
                        x = sa(x, None, None, scales, model.rope2d_freqs_grid, k)
                        outputs.append(x)
        finally:
            for sa in layers:
                sa.kv_caching(False)
            for module, mode in modes:
                module.training = mode
        return outputs


def registered_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks in the order of the model's modules, in which they run."""
    return [module for module in model.modules() if hasattr(module, "sa")]


def first_scales(model: Any) -> Scales:
    """The scales of the first resolution for which the model has rotations."""
    return [tuple(scale) for scale in ast.literal_eval(next(iter(model.rope2d_freqs_grid)))]
