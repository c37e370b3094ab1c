"""Models of other codebases with random weights, for ``benchmarks.dropin``: Infinity.

The transformer is imported from a checkout. This module replaces what the checkout needs and a CPU
machine lacks: flash-attn (by cross-attention in plain torch), timm's DropPath and registry, and the
VAE (by a codebook of signs).

Axes: B images, L tokens of all scales, C codebook channels.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.dropin_case import DropinCase, foreign_modules


def build(family: str, repo: Path, small: bool) -> DropinCase:
    """The model of that family from its checkout, in float32 on the CPU.

    Args:
        small: a few narrow layers; else the width of the published 2B model and four layers.
    Raises:
        SystemExit: the family is not supported, or ``repo`` is no checkout of it.
    """
    if family != "infinity":
        raise SystemExit(f"dropin: family {family} is not supported")
    if not (repo / "infinity" / "models" / "infinity.py").is_file():
        raise SystemExit(f"dropin: {repo} is no checkout of Infinity: no infinity/models")
    return _infinity(repo, small)


# --- replacements -------------------------------------------------------------------------------


def flash_attn_func(q: Any, k: Any, v: Any, **_: Any) -> Any:
    """Raises if called: the model is built without flash-attn's self-attention."""
    raise RuntimeError("flash_attn_func: self-attention must not go through flash-attn here")


def varlen_attention(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """flash-attn's ``flash_attn_varlen_kvpacked_func``, one sequence at a time, in float32."""
    outputs = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        one = q[bounds_q[b] : bounds_q[b + 1]].float().transpose(0, 1)
        k, v = kv[bounds_k[b] : bounds_k[b + 1]].float().unbind(1)
        out = F.scaled_dot_product_attention(
            one, k.transpose(0, 1), v.transpose(0, 1), scale=softmax_scale
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


class DropPath(nn.Module):
    """Stochastic depth, for evaluation only: the identity."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop_prob > 0:
            raise RuntimeError("DropPath: the replacement is for evaluation only")
        return x


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


@contextlib.contextmanager
def _replacements() -> Iterator[None]:
    """Put the replacements into ``sys.modules``; restore it on exit."""
    timm_models = _module("timm.models", register_model=lambda function: function)
    replacements = {
        "flash_attn": _module(
            "flash_attn",
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_kvpacked_func=varlen_attention,
        ),
        "timm": _module("timm", models=timm_models),
        "timm.models": timm_models,
        "timm.models.layers": _module("timm.models.layers", DropPath=DropPath, drop_path=None),
        "timm.loss": _module("timm.loss", SoftTargetCrossEntropy=nn.Module),
        "pytz": _module("pytz"),
    }
    before = {name: sys.modules.get(name) for name in replacements}
    sys.modules.update(replacements)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the constructor prints its sizes
            yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _SignCodes(nn.Module):
    """Replaces Infinity's bitwise VAE: a bit is decoded as +1 or -1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed_dim, self.vocab_size = channels, 2**channels
        lfq = types.SimpleNamespace(mask=None, indices_to_codes=self._codes)
        self.quantizer = types.SimpleNamespace(lfq=lfq, z_interplote_up="trilinear")

    @staticmethod
    def _codes(bits: Tensor, label_type: str) -> Tensor:
        """(B, 1, h, w, d) bits to (B, d, 1, h, w)."""
        return (2 * bits.float() - 1).permute(0, 4, 1, 2, 3) / bits.shape[-1] ** 0.5


# --- Infinity -----------------------------------------------------------------------------------


def _infinity(repo: Path, small: bool) -> DropinCase:
    depth, heads, head_dim, text = (4, 2, 32, 256) if small else (4, 16, 128, 2048)
    channels, width, batch = 16, heads * head_dim, 1
    torch.manual_seed(0)
    with _replacements(), foreign_modules(repo, "infinity") as load:
        package = load("infinity.models.infinity")
        resolutions = load("infinity.utils.dynamic_resolution")
        vae = _SignCodes(channels)
        model = package.Infinity(
            vae_local=vae,
            text_channels=text,
            text_maxlen=8,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            shared_aln=True,
            head_aln=True,
            cond_drop_rate=0.0,
            cross_attn_layer_scale=0.1,
            cos_attn=True,
            fused_norm=True,
            block_chunks=2,
            add_lvl_embeding_only_first_block=1,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
            pn="0.06M",
            inference_mode=True,
        ).eval()
    scales = resolutions.dynamic_resolution_h_w[1.0]["0.06M"]["scales"]
    if small:
        scales = scales[:6]
    scales = [(1, h, w) for _, h, w in scales]
    _randomise(model)
    _add_rotations(model, scales)
    generator = torch.Generator().manual_seed(1)
    text_rows = torch.randn(5, text, generator=generator)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    total = sum(t * h * w for t, h, w in scales)
    teacher = torch.randn(batch, total - 1, channels, generator=generator)

    def condition() -> tuple[Tensor, list[int], Tensor, int]:
        return text_rows.clone(), [5], lengths, 5

    # Infinity's fused norm is recompiled for every number of tokens, which takes minutes on a CPU.
    eager = torch.compiler.set_stance("force_eager")

    @eager
    def run(seed: int, greedy: bool) -> Tensor:
        options = {
            "scale_schedule": scales,
            "label_B_or_BLT": condition(),
            "g_seed": seed,
            "cfg_list": [3.0] * len(scales),
            "tau_list": [1.0] * len(scales),
            "top_k": 1 if greedy else 0,
            "cfg_insertion_layer": [0],
            "returns_vemb": 1,
            "vae_type": 1,
            "inference_mode": True,
        }
        all_bits: list[Tensor] = []

        def codes(bits: Tensor, label_type: str) -> Tensor:
            all_bits.append(bits.flatten(1))
            return _SignCodes._codes(bits, label_type)

        vae.quantizer.lfq.indices_to_codes = codes
        model.autoregressive_infer_cfg(vae=vae, **options)
        return torch.cat(all_bits, dim=1)

    def logits() -> Tensor:
        outputs: list[Tensor] = []
        hook = model.head.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
        try:
            run(0, True)
        finally:
            hook.remove()
        return torch.cat(outputs, dim=1)

    @eager
    def loss() -> Tensor:
        return model(condition(), teacher, scales).square().mean()

    return DropinCase(
        model, run, logits, loss, tuple(t * h * w for t, h, w in scales), layers=depth
    )


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Fill weights so that outputs differ between tokens: gates and head are not near zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            continue
        if name.endswith("ca.mat_q.weight"):
            # Cross-attention rounds its queries to bfloat16 even in float32: a difference of 1e-7
            # may change the rounding and grow to 3e-4. Queries equal to the bias are not affected.
            parameter.zero_()
        elif parameter.dim() >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif not name.endswith("norm.weight"):
            parameter.normal_(std=0.1)


def _add_rotations(model: Any, scales: list[tuple[int, int, int]]) -> None:
    """Add the rotations of a prefix of the model's scales: a prefix of its rotations."""
    grid, name = model.rope2d_freqs_grid, str(tuple(scales))
    if name not in grid:
        longer = next(key for key in grid if key.startswith(name[:-1]))
        grid[name] = grid[longer]
