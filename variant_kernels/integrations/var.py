"""The original VAR (FoundationVision/VAR): ``patch`` for its ``VAR`` and ``VARHF``.

The model's own loop generates: it switches caching on in every layer, runs one scale after another
through all layers, and switches caching off. The patched layers infer the scale from these calls.

Axes: B sequences, T tokens of this call, L tokens of all scales, C width, H heads, D width of one
head, 3 queries, keys and values, N modulation vectors of an adaptive layer norm, 6 those of a block
(gates, scales, shifts; each of attention, then of the MLP).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from variant_kernels.attention import AttentionForward, can_attend, is_scale_bound
from variant_kernels.integrations.alterations import (
    all_plain,
    is_altered,
    is_plain,
    none_altered,
)
from variant_kernels.integrations.base import ClassSwap, ModelFamily, Patched, require
from variant_kernels.integrations.cast_once import CastOnceLinear, autocast_dtype, without_autocast
from variant_kernels.integrations.runtime import PatchError, Runtime, can_cast_once
from variant_kernels.integrations.var_generation import LayerPages, Layers, VARRuntime, version_of
from variant_kernels.kv_cache import KVStore
from variant_kernels.masks import layout_of
from variant_kernels.ops.adaln import adaln_modulate, gated_residual_adaln
from variant_kernels.plans.scale_layout import ScaleLayout
from variant_kernels.untraced import untraced
from variant_kernels.wording import counted

Modulation = tuple[Tensor, ...]


class PatchedAttention(Patched, AttentionForward):
    """``SelfAttention`` on this package's kernels; while caching, all layers share one cache."""

    patch_layer: int

    @property
    def _prefix(self) -> str:
        return f"patch: {self.patch_state.name}."

    def kv_caching(self, enable: bool) -> None:
        self.patch_state.runtime.caching(self.patch_layer, enable)
        self.caching = enable

    def _project(self, x_BTC: Tensor) -> Tensor:
        dtype, runtime = autocast_dtype(x_BTC.device), self.patch_state.runtime
        once = self.caching and can_cast_once(self.mat_qkv)
        if not once or dtype is None or torch.is_grad_enabled():
            return super()._project(x_BTC)
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        return self._heads(runtime.linear(x_BTC, self.mat_qkv, bias, dtype))

    def _check_no_gradient(self, qkv_BT3HD: Tensor) -> None:
        if torch.is_grad_enabled() and qkv_BT3HD.requires_grad:
            raise PatchError(
                "patch: generation has no gradient; run it under torch.no_grad() or "
                "torch.inference_mode(), or unpatch() the model first"
            )

    def _kv_store(self, qkv_BT3HD: Tensor) -> KVStore:
        runtime: VARRuntime = self.patch_state.runtime
        return LayerPages(runtime, self.patch_layer, runtime.open_pages(qkv_BT3HD))


class PatchedBlock(Patched, nn.Module):
    """``AdaLNSelfAttn``, skipped at scales where its layer is inactive.

    The projection of the class condition is computed once per generation. The norm, the stochastic
    depth (the identity in generation) and mostly the projection are passed by; where one of them
    has hooks or was replaced, the original forward runs, around the patched attention.
    """

    patch_layer: int
    attn: Any
    ffn: nn.Module
    ln_wo_grad: nn.LayerNorm
    shared_aln: bool
    ada_gss: Tensor
    ada_lin: nn.Module

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        runtime: VARRuntime = self.patch_state.runtime
        if not self.attn.caching:
            runtime.check_thread(False)
            return self._original(x, cond_BD, attn_bias)
        tokens = x.shape[1]
        active = runtime.tokens_for(self.patch_layer, tokens)
        if active == 0:
            return x
        if active == tokens:
            return self._run(x, cond_BD, attn_bias)
        if attn_bias is not None:
            attn_bias = attn_bias[..., :active, :active]
        return torch.cat((self._run(x[:, :active], cond_BD, attn_bias), x[:, active:]), dim=1)

    def _original(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        return super().forward(x=x, cond_BD=cond_BD, attn_bias=attn_bias)

    def _run(self, x_BTC: Tensor, cond: Tensor, attn_bias: Tensor | None) -> Tensor:
        # In training there are dropout and stochastic depth.
        if (
            self.training
            or torch.is_grad_enabled()
            or not row_by_row(x_BTC, cond, 4 if self.shared_aln else 2)
            or not self._may_pass_by_parts()
        ):
            return self._original(x_BTC, cond, attn_bias)
        gate1, gate2, scale1, scale2, shift1, shift2 = self.patch_state.runtime.hoisted(
            id(self), cond, lambda: self._modulation(x_BTC, cond)
        )
        eps = self.ln_wo_grad.eps
        h_BTC = adaln_modulate(x_BTC, scale1, shift1, eps=eps)
        y_BTC = self.attn(h_BTC, attn_bias=attn_bias)
        x_BTC, h_BTC = gated_residual_adaln(x_BTC, y_BTC, gate1, scale2, shift2, eps=eps)
        return torch.addcmul(x_BTC, gate2.unsqueeze(1), self.ffn(h_BTC))

    @untraced
    def _may_pass_by_parts(self) -> bool:
        if not only_normalises(self.ln_wo_grad) or not self._modules.keys() <= BLOCK_PARTS:
            return False
        drop_path = self._modules.get("drop_path")
        if drop_path is not None and not (type(drop_path) is nn.Identity and is_plain(drop_path)):
            stochastic_depth = type(drop_path).__name__ == "DropPath" and not drop_path.training
            if not stochastic_depth or is_altered(drop_path):
                return False
        return self.shared_aln or all_plain(self.ada_lin)

    def _modulation(self, x_BTC: Tensor, cond: Tensor) -> Modulation:
        if self.shared_aln:
            modulation_B6C = (self.ada_gss + cond).flatten(0, 1)
        else:
            modulation_B6C = without_autocast(self.ada_lin, cond).unflatten(-1, (6, -1))
        return split_modulation(modulation_B6C, x_BTC)


class PatchedHeadNorm(Patched, nn.Module):
    """``AdaLNBeforeHead``; the projection of the class condition runs once per generation.

    The original forward runs where one of its parts has hooks or was replaced.
    """

    ln_wo_grad: nn.LayerNorm
    ada_lin: nn.Module

    def forward(self, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        runtime: VARRuntime = self.patch_state.runtime
        if (
            not runtime.generating
            or torch.is_grad_enabled()
            or not row_by_row(x_BLC, cond_BD, 2)
            or not self._may_pass_by_parts()
        ):
            return super().forward(x_BLC, cond_BD)
        scale, shift = runtime.hoisted(
            id(self),
            cond_BD,
            lambda: split_modulation(
                without_autocast(self.ada_lin, cond_BD).unflatten(-1, (2, -1)), x_BLC
            ),
        )
        return adaln_modulate(x_BLC, scale, shift, eps=self.ln_wo_grad.eps)

    @untraced
    def _may_pass_by_parts(self) -> bool:
        known = self._modules.keys() <= {"ln_wo_grad", "ada_lin"}
        return known and only_normalises(self.ln_wo_grad) and all_plain(self.ada_lin)


class PatchedSharedProjection(Patched, nn.Module):
    """``shared_ada_lin``, computed once per generation.

    It is computed at each call where it or a part has hooks, which may change it in place, and
    where somebody did change it in place.
    """

    def forward(self, cond_BD: Tensor) -> Tensor:
        runtime: VARRuntime = self.patch_state.runtime
        if (
            not runtime.generating
            or torch.is_grad_enabled()
            or is_altered(self)
            or not none_altered(self)
        ):
            return super().forward(cond_BD)
        shared_B16C, version = runtime.hoisted(
            id(self), cond_BD, lambda: with_version(self._original(cond_BD))
        )
        unchanged = version == version_of(shared_B16C)
        return shared_B16C if unchanged else self._original(cond_BD)

    def _original(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD)


def with_version(tensor: Tensor) -> tuple[Tensor, int | None]:
    """A tensor and the version that it has now."""
    return tensor, version_of(tensor)


def row_by_row(x_BTC: Tensor, cond: Tensor, axes: int) -> bool:
    """Whether the kernels take these tokens and their condition.

    The original forward also takes what torch broadcasts, as one condition for all rows, and tokens
    of any stride.

    Args:
        axes: of a condition that has one row for each row of tokens.
    """
    same = cond.ndim == axes and x_BTC.ndim == 3 and cond.shape[0] == x_BTC.shape[0]
    return same and x_BTC.stride(-1) == 1


def split_modulation(modulation_BNC: Tensor, x: Tensor) -> Modulation:
    """The modulation vectors, each (B, C), in the autocast dtype if there is one, else x's."""
    return modulation_BNC.to(autocast_dtype(x.device) or x.dtype).unbind(1)


# --- the family -----------------------------------------------------------------------------------

# The modules of a block that its forward calls; another one could change what it computes later.
BLOCK_PARTS = {"attn", "ffn", "ln_wo_grad", "drop_path", "ada_lin"}
ATTENTION_PARTS = ("mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "proj_drop", "kv_caching")


class VARFamily(ModelFamily):
    """FoundationVision/VAR."""

    attention: ClassVar[type[Patched]] = PatchedAttention
    name = "VAR"
    structure = (
        "autoregressive_infer_cfg, patch_nums, head_nm and blocks whose attn has "
        + ", ".join(ATTENTION_PARTS)
    )

    def recognise(self, model: nn.Module) -> bool:
        blocks = getattr(model, "blocks", None)
        parts = ("autoregressive_infer_cfg", "patch_nums", "head_nm")
        if not isinstance(blocks, nn.ModuleList) or not all(hasattr(model, p) for p in parts):
            return False
        attn = getattr(blocks[0], "attn", None) if len(blocks) else None
        return all(hasattr(attn, part) for part in ATTENTION_PARTS)

    def runtime(self, model: Any) -> VARRuntime:
        return VARRuntime(
            ScaleLayout.from_patch_nums(model.patch_nums),
            Layers("blocks", "attn", lambda: list(model.blocks)),
        )

    def verify(self, model: Any) -> None:
        self._require_layout(model)
        for index, block in enumerate(model.blocks):
            self._require_block(block, f"blocks[{index}]", model.C)
        norm = model.head_nm
        self._require(
            hasattr(norm, "ada_lin") and plain_norm(getattr(norm, "ln_wo_grad", None)),
            "head_nm must have ada_lin and a LayerNorm ln_wo_grad without weights",
            norm,
        )
        self._require_projection(norm.ada_lin, "head_nm.ada_lin")

    def _require(self, condition: bool, requirement: str, actual: Any) -> None:
        require(self.name, condition, requirement, actual)

    def _require_layout(self, model: Any) -> None:
        patch_nums, bias = model.patch_nums, getattr(model, "attn_bias_for_masking", None)
        sides = isinstance(patch_nums, tuple | list) and all(type(n) is int for n in patch_nums)
        self._require(sides, "patch_nums must be a tuple of integers", patch_nums)
        layout = ScaleLayout.from_patch_nums(patch_nums)
        mask_layout = layout_of(bias) if isinstance(bias, Tensor) and not bias.is_meta else None
        self._require(
            mask_layout is not None and mask_layout.tokens == layout.tokens,
            f"attn_bias_for_masking must be the block-causal mask of patch_nums {patch_nums}",
            "none" if bias is None else f"another {tuple(bias.shape)}",
        )

    def _require_block(self, block: Any, name: str, width: int) -> None:
        require_arguments(self.name, block, name, ["x", "cond_BD", "attn_bias"])
        missing = [p for p in ("attn", "ffn", "ln_wo_grad", "shared_aln") if not hasattr(block, p)]
        self._require(not missing, f"{name} must have {missing}", f"a {type(block).__name__}")
        self._require(
            plain_norm(block.ln_wo_grad),
            f"{name}.ln_wo_grad must be a LayerNorm without weights",
            block.ln_wo_grad,
        )
        fused = getattr(block, "fused_add_norm_fn", None)
        self._require(fused is None, f"{name}.fused_add_norm_fn must be None", fused)
        self._require_attention(block.attn, f"{name}.attn", width)
        if not block.shared_aln:
            self._require_projection(getattr(block, "ada_lin", None), f"{name}.ada_lin")

    def _require_projection(self, module: Any, name: str) -> None:
        """A module of torch's without weights projects nothing: it is in the place of another."""
        is_one = isinstance(module, nn.Module) and (
            not all_plain(module) or any(True for _ in module.parameters())
        )
        found = "none" if module is None else type(module).__name__
        self._require(is_one, f"{name} must be a projection with weights", found)

    def _require_attention(self, attn: Any, name: str, width: int) -> None:
        missing = [part for part in ATTENTION_PARTS if not hasattr(attn, part)]
        self._require(not missing, f"{name} must have {missing}", f"a {type(attn).__name__}")
        require_arguments(self.name, attn, name, ["x", "attn_bias"])
        require_known_parts(self.name, attn, name)
        heads, head_dim = attn.num_heads, attn.head_dim
        self._require(
            heads * head_dim == width and can_attend(head_dim),
            f"{name} must have {width} channels and heads of a multiple of 8 from 16 to 256",
            f"{counted(heads, 'head')} of {head_dim}",
        )
        shapes = {
            "mat_qkv.weight": (attn.mat_qkv.weight, (3 * width, width)),
            "q_bias": (attn.q_bias, (width,)),
            "v_bias": (attn.v_bias, (width,)),
            "zero_k_bias": (attn.zero_k_bias, (width,)),
        }
        if attn.attn_l2_norm:
            scale_mul = getattr(attn, "scale_mul_1H11", None)
            self._require(scale_mul is not None, f"{name} must have scale_mul_1H11", "none")
            shapes["scale_mul_1H11"] = scale_mul, (1, heads, 1, 1)
            bound = getattr(attn, "max_scale_mul", None)
            self._require(is_scale_bound(bound), f"{name}.max_scale_mul must be log 100", bound)
        for part, (tensor, expected) in shapes.items():
            shape = shape_of(tensor)
            self._require(shape == expected, f"{name}.{part} must have shape {expected}", shape)

    def class_swaps(self, model: Any, runtime: Runtime) -> list[ClassSwap]:
        swaps = [ClassSwap(model.head_nm, PatchedHeadNorm, needed=False)]
        if isinstance(model.shared_ada_lin, nn.Sequential):
            swaps.append(ClassSwap(model.shared_ada_lin, PatchedSharedProjection, needed=False))
        for layer, block in enumerate(model.blocks):
            attributes = {"patch_layer": layer}
            swaps.append(ClassSwap(block, PatchedBlock, attributes))
            swaps.append(
                ClassSwap(
                    block.attn, self.attention, {**attributes, "caching": False, "_pages": None}
                )
            )
            # Projections of the class condition run once per generation: no cast copy needed.
            swaps += cast_once(block.attn.proj, block.ffn)
        return swaps + cast_once(model.head, model.word_embed)

    def probe_inputs(self, model: Any) -> list[Tensor]:
        """The class condition (2, D) and the tokens (2, T, C) of the first two scales, random."""
        like = model.blocks[0].attn.q_bias  # other weights may be quantised
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, model.D), *((2, side * side, model.C) for side in model.patch_nums[:2])]
        return [
            torch.randn(shape, generator=generator, device="cpu").to(like.device, like.dtype)
            for shape in shapes
        ]

    def probe(self, model: Any) -> list[Tensor]:
        """The hidden states of the first two scales, on random input."""
        blocks = list(model.blocks)
        modes = [(module, module.training) for module in model.modules()]
        outputs = []
        try:
            for module, _ in modes:
                module.training = False
            cond, *inputs = self.probe_inputs(model)
            with torch.no_grad(), torch.autocast(cond.device.type, enabled=False):
                shared = model.shared_ada_lin(cond)
                for block in blocks:
                    block.attn.kv_caching(True)
                for x in inputs:
                    for block in blocks:
                        x = block(x=x, cond_BD=shared, attn_bias=None)
                    outputs.append(model.head_nm(x, cond))
        finally:
            for block in blocks:
                block.attn.kv_caching(False)
            for module, mode in modes:
                module.training = mode
        return outputs


def plain_norm(norm: Any) -> bool:
    """Whether this is a layer norm without weight and bias."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None


def only_normalises(norm: nn.Module) -> bool:
    """Whether a call of this module does what the kernels do: torch's norm without weights."""
    return type(norm) is nn.LayerNorm and is_plain(norm) and plain_norm(norm)


def require_arguments(family: str, module: nn.Module, name: str, expected: list[str]) -> None:
    """Check the arguments of a module's forward.

    Raises:
        PatchError: they differ; the module may be a wrapper.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    found = f"{names} of {type(module).__name__}"
    require(family, names == expected, f"{name}.forward must take {expected}", found)


def require_known_parts(family: str, attn: nn.Module, name: str) -> None:
    """Check that attention has no modules that the patched forward would pass by.

    Raises:
        PatchError: it has.
    """
    known = {"mat_qkv", "proj", "proj_drop", "parametrizations"}
    unknown = sorted(attn._modules.keys() - known)
    require(family, not unknown, f"{name} must have no other modules than {sorted(known)}", unknown)


def shape_of(value: object) -> tuple[int, ...] | str:
    """The shape of a tensor; the type of anything else, as a quantised layer's ``weight``."""
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def cast_once(*modules: nn.Module) -> list[ClassSwap]:
    """Swaps for the plain linear layers in these modules; subclasses, which may do more, stay."""
    linears = [m for root in modules for m in root.modules() if type(m) is nn.Linear]
    return [ClassSwap(m, CastOnceLinear, needed=False) for m in linears]
