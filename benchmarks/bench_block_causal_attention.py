"""block_causal_attention: a whole multi-scale sequence, forward, and forward with backward."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import (
    REPOSITORIES,
    Case,
    Check,
    Comparison,
    backends,
    missing_module,
    near,
    replay,
    split,
)
from variant.bench.interleaved import Call
from variant.models.presets import PATCH_NUMS_256, PATCH_NUMS_512
from variant_kernels import ScaleLayout, block_causal_attention, qk_norm
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.ops.block_causal_attention import (
    block_causal_attention_op,
    block_causal_attention_qk_norm_op,
    dense_mask,
)
from variant_kernels.ops.qk_norm import MAX_LOG_SCALE

OP = "block_causal_attention"
# (q, k, v, and scale_mul in a case with qk_norm) -> the output, in the layout of q.
Attend = Callable[..., Tensor]
HEADS = 16
SHORT = (1, 2, 3, 4, 5, 6)
# Scales of a 1024x1024 image, as HMAR (arXiv 2506.04421) measures its kernel: 9451 tokens.
PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
# The plain-torch reference holds several copies of all scores in float32.
MOST_SCORE_BYTES = 2**30
# two-ops: qk_norm, then the op without it; in cases with qk_norm only.
IMPLEMENTATIONS = (
    "triton", "cuda", "flex", "cpu", "op", "two-ops", "reference", "sdpa-dense-mask",
    "flex-compiled", "flex-flash", "hmar",
)  # fmt: skip
CASES = [
    Case(
        f"L{length}-batch{batch}-{norm}{dtype}-{direction}",
        dtype,
        {
            "patch_nums": patch_nums,
            "batch": batch,
            "backward": direction != "forward",
            "qk_norm": bool(norm),
        },
        quick=length == 91,
    )
    for norm in ("", "qk_norm-")
    for length, batch, patch_nums in (
        (91, 1, SHORT),
        (680, 4, PATCH_NUMS_256),
        (2240, 1, PATCH_NUMS_512),
    )
    for dtype in ("float32", "bfloat16")
    for direction in ("forward", "forward+backward")
]
# Sizes that fill a GPU come first: the time may end before the cases do. HMAR's kernel needs
# float16.
CASES[:0] = [
    Case(
        f"L{length}-batch{batch}-heads{heads}-head_dim{head_dim}-{norm}{dtype}-{direction}",
        dtype,
        {
            "patch_nums": patch_nums,
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "backward": direction != "forward",
            "qk_norm": bool(norm),
        },
        devices=("cuda",),
    )
    for length, batch, patch_nums, heads, head_dim, dtypes, norm in (
        # The heads of VAR-d30.
        (680, 64, PATCH_NUMS_256, 30, 64, ("bfloat16", "float16"), ""),
        (2240, 16, PATCH_NUMS_512, 30, 64, ("bfloat16", "float16"), ""),
        (680, 64, PATCH_NUMS_256, 30, 64, ("bfloat16",), "qk_norm-"),
        (2240, 16, PATCH_NUMS_512, 30, 64, ("bfloat16",), "qk_norm-"),
        (680, 32, PATCH_NUMS_256, 16, 128, ("bfloat16",), ""),
        (2240, 8, PATCH_NUMS_512, 16, 128, ("bfloat16",), ""),
        (9451, 2, PATCH_NUMS_1024, 16, 64, ("float16",), ""),
    )
    for dtype in dtypes
    for direction in ("forward", "forward+backward")
]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case.

    qkv_BLHD: strided views of one packed projection, as our ops take them.  qkv_BHLD: contiguous
    copies, as SDPA takes them.  scale_mul_1H11: for qk_norm; None in a case without it.  bias_LL:
    0 where a key is visible, else -inf.  backward: whether gradients are part of the work.
    """

    layout: ScaleLayout
    qkv_BLHD: list[Tensor]
    qkv_BHLD: list[Tensor]
    grad_BLHD: Tensor
    grad_BHLD: Tensor
    scale_mul_1H11: Tensor | None
    bias_LL: Tensor
    backward: bool

    @property
    def scale_mul(self) -> list[Tensor]:
        """The last argument of ``attend`` in a case with qk_norm."""
        return [] if self.scale_mul_1H11 is None else [self.scale_mul_1H11]

    def packed(self, attend: Attend) -> Call:
        """A call of ``attend`` on (B, L, H, D)."""
        return functools.partial(
            self.run, attend, [*self.qkv_BLHD, *self.scale_mul], self.grad_BLHD
        )

    def contiguous(self, attend: Attend) -> Call:
        """A call of ``attend`` on (B, H, L, D)."""
        return functools.partial(
            self.run, attend, [*self.qkv_BHLD, *self.scale_mul], self.grad_BHLD
        )

    def run(self, attend: Attend, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """The output, and with backward the gradients of all inputs."""
        out = attend(*inputs)
        return (out, *torch.autograd.grad(out, inputs, grad)) if self.backward else (out,)


def build(case: Case, device: str, quick: bool) -> Comparison:
    """Our ops read packed projections; SDPA reads contiguous heads and VAR's additive mask."""
    inputs = _inputs(case, device)
    on_backends = _backends(inputs, device, quick)
    calls, missing = split({
        **on_backends,
        "op": inputs.packed(functools.partial(_attend, layout=inputs.layout)),
        "sdpa-dense-mask": inputs.contiguous(functools.partial(_dense, bias_LL=inputs.bias_LL)),
        "two-ops": _two_ops_call(inputs),
        "flex-compiled": _flex_call(inputs, device, quick),
        "flex-flash": _flex_call(inputs, device, quick, backend="FLASH"),
        "hmar": _hmar_call(inputs, device),
    })  # fmt: skip
    ours = (*on_backends.keys() - {"reference"}, "op", "two-ops")
    layout, backward = inputs.layout, inputs.backward
    batch, length, heads, head_dim = inputs.grad_BLHD.shape
    pairs = sum(n * layout.visible(k) for k, n in enumerate(layout.tokens))
    return Comparison(
        shape={"batch": batch, "tokens": length, "heads": heads, "head_dim": head_dim,
               "visible": round(pairs / length**2, 3)},
        # Two products forward, five backward (the scores once more).
        flop=(14 if backward else 4) * batch * heads * head_dim * pairs,
        # Forward: q, k, v, out.  Backward: these again, grad_out, three gradients.
        moved=(12 if backward else 4) * inputs.grad_BLHD.nbytes,
        calls=calls,
        missing=missing,
        peer="sdpa-dense-mask",
        ours=ours,
        check=_check(inputs, ours),
        gradient=backward,
    )  # fmt: skip


def _inputs(case: Case, device: str) -> Inputs:
    layout = ScaleLayout.from_patch_nums(case.settings["patch_nums"])
    batch, backward = case.settings["batch"], case.settings["backward"]
    dtype, length = getattr(torch, case.dtype), layout.total
    heads, head_dim = case.settings.get("heads", HEADS), case.settings.get("head_dim", 64)
    packed_BL3HD = torch.randn(batch, length, 3, heads, head_dim, device=device).to(dtype)
    grad_BLHD = torch.randn(batch, length, heads, head_dim, device=device).to(dtype)
    bias_LL = torch.zeros(length, length, dtype=dtype, device=device)
    bias_LL = bias_LL.masked_fill(~dense_mask(layout.tokens, device), -torch.inf)
    scale_mul_1H11 = torch.linspace(0, 3, heads, device=device).view(1, heads, 1, 1)
    qkv_BLHD = [x.detach().requires_grad_(backward) for x in packed_BL3HD.unbind(2)]
    return Inputs(
        layout=layout,
        qkv_BLHD=qkv_BLHD,
        qkv_BHLD=[
            x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in qkv_BLHD
        ],
        grad_BLHD=grad_BLHD,
        grad_BHLD=grad_BLHD.transpose(1, 2).contiguous(),
        scale_mul_1H11=(
            scale_mul_1H11.requires_grad_(backward) if case.settings["qk_norm"] else None
        ),
        bias_LL=bias_LL,
        backward=backward,
    )


def _check(inputs: Inputs, ours: Sequence[str]) -> Check:
    """Against torch's attention in float64, for the first and the last sequence."""
    # Of a long sequence the scores take 11 GB in float64: one is enough.
    some = [0, -1] if len(inputs.grad_BHLD) > 1 and inputs.layout.total < 4096 else [0]

    def dense_in(dtype: torch.dtype) -> list[Tensor]:
        qkv_BHLD = [
            x[some].detach().to(dtype).requires_grad_(inputs.backward) for x in inputs.qkv_BHLD
        ]
        attend = functools.partial(_dense, bias_LL=inputs.bias_LL.to(dtype))
        grad_BHLD = inputs.grad_BHLD[some].to(dtype)
        results = inputs.run(attend, qkv_BHLD + inputs.scale_mul, grad_BHLD)
        return [x.detach() for x in results[:4]]

    def pick(name: str, results: Sequence[Tensor]) -> list[Tensor]:
        # Not the gradient of scale_mul, a sum over all sequences.
        heads_second = name in ("sdpa-dense-mask", "flex-compiled", "flex-flash", "hmar")
        return [x[some] if heads_second else x[some].transpose(1, 2) for x in results[:4]]

    return near(
        dense_in(torch.float64),
        dense_in(inputs.grad_BLHD.dtype),
        ours=ours,
        times=(2.0, 3.0, 3.0, 3.0) if inputs.backward else (2.0,),
        pick=pick,
    )


# --- one builder for each implementation: its call, or the reason why it is missing -------------


def _backends(inputs: Inputs, device: str, quick: bool) -> dict[str, Call | str]:
    """Launchers; with backward the op on each backend."""
    normed = inputs.scale_mul_1H11 is not None
    impls = (block_causal_attention_qk_norm_op if normed else block_causal_attention_op).backends
    batch, length, heads, head_dim = inputs.grad_BLHD.shape
    score_bytes = 4 * batch * heads * length**2
    request = Request(device, (inputs.grad_BLHD.dtype,), head_dim)
    calls: dict[str, Call | str] = {}
    for name, impl, reason in backends(impls, request):
        if name == "reference" and device == "cuda" and score_bytes > MOST_SCORE_BYTES:
            reason = f"plain torch would hold {score_bytes / 2**20:.0f} MiB of scores"
        if name == "flex" and quick:
            reason = "compiling FlexAttention takes longer than a quick run"
        if reason is not None:
            calls[name] = reason
        elif inputs.backward:
            attend = functools.partial(_attend, layout=inputs.layout, backend=name)
            calls[name] = inputs.packed(attend)
        else:
            calls[name] = functools.partial(_launch, impl, inputs)
    return calls


def _launch(impl: Backend, inputs: Inputs) -> tuple[Tensor]:
    q_BLHD, k_BLHD, v_BLHD = inputs.qkv_BLHD
    normed = inputs.scale_mul_1H11 is not None
    extra = {"scale_mul_1H11": inputs.scale_mul_1H11} if normed else {}
    out_BLHD, _ = impl.forward(
        q_BLHD=q_BLHD,
        k_BLHD=k_BLHD,
        v_BLHD=v_BLHD,
        scale_lengths=inputs.layout.tokens,
        softmax_scale=1.0 if normed else q_BLHD.shape[-1] ** -0.5,
        **extra,
    )
    return (out_BLHD,)


def _attend(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11=None, **options):
    return block_causal_attention(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11=scale_mul_1H11, **options)


def _two_ops_call(inputs: Inputs) -> Call | str:
    if inputs.scale_mul_1H11 is None:
        return "this case has no qk_norm"
    return inputs.packed(functools.partial(_two_ops, layout=inputs.layout))


def _two_ops(q_BLHD, k_BLHD, v_BLHD, scale_mul_1H11, layout):
    q_BLHD, k_BLHD = qk_norm(q_BLHD, k_BLHD, scale_mul_1H11)
    return block_causal_attention(q_BLHD, k_BLHD, v_BLHD, layout, softmax_scale=1)


def _dense(q_BHLD, k_BHLD, v_BHLD, scale_mul_1H11=None, *, bias_LL):
    """Torch's attention, with qk_norm as VAR composes it: norms in float32 or wider."""
    scale = None
    if scale_mul_1H11 is not None:
        wide = torch.promote_types(q_BHLD.dtype, torch.float32)
        factor = scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        q_BHLD = (F.normalize(q_BHLD.to(wide), dim=-1) * factor).to(v_BHLD.dtype)
        k_BHLD = F.normalize(k_BHLD.to(wide), dim=-1).to(v_BHLD.dtype)
        scale = 1.0
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_LL, scale=scale)


def _flex_call(inputs: Inputs, device: str, quick: bool, backend: str = "TRITON") -> Call | str:
    """Compiled FlexAttention, by its Triton kernels or those of flash-attn 4 ("FLASH")."""
    if inputs.scale_mul_1H11 is not None:
        return "it has no qk_norm"
    if quick:
        return "compiling FlexAttention takes longer than a quick run"
    if device == "cpu" and inputs.backward:
        return "FlexAttention has no backward on a CPU"
    if device == "cuda" and (reason := missing_module("triton")) is not None:
        return reason
    if backend == "FLASH" and (reason := _no_flash(inputs, device)) is not None:
        return reason
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, length = inputs.layout, inputs.layout.total
    scales = [k for k, count in enumerate(layout.tokens) for _ in range(count)]
    scale_L = torch.tensor(scales, device=device)
    mask = create_block_mask(
        lambda b, h, q, kv: scale_L[q] >= scale_L[kv], None, None, length, length, device=device
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BACKEND": backend} if device == "cuda" else None
    attend = functools.partial(compiled, block_mask=mask, kernel_options=options)
    return inputs.contiguous(attend)


def _no_flash(inputs: Inputs, device: str) -> str | None:
    """Why FlexAttention's FLASH backend cannot run, or None."""
    if device != "cuda" or inputs.grad_BLHD.dtype == torch.float32:
        return "flash-attn 4 runs on a GPU in 16 bits only"
    if (reason := missing_module("flash-attn")) is not None:
        return reason
    if importlib.util.find_spec("flash_attn.cute") is None:
        return "flash-attn 4 (flash_attn.cute) is not installed"
    return None


def _hmar_call(inputs: Inputs, device: str) -> Call | str:
    """HMAR's Triton kernel."""
    head_dim = inputs.grad_BLHD.shape[-1]
    if inputs.scale_mul_1H11 is not None:
        return "it has no qk_norm"
    if "hmar" not in REPOSITORIES:
        return "no --hmar-repo (a clone of NVlabs/HMAR)"
    if device != "cuda" or inputs.grad_BLHD.dtype != torch.float16 or head_dim != 64:
        return "HMAR measures its kernel on a GPU, in float16, with heads of 64"
    if str(REPOSITORIES["hmar"]) not in sys.path:
        sys.path.append(str(REPOSITORIES["hmar"]))
    module = importlib.import_module("attn.block_sparse_attn_interface")
    attend = module.BlockSparseAttention(list(inputs.layout.tokens), "cuda", "block_causal")
    return inputs.contiguous(lambda q, k, v: attend(q, k, v, head_dim**-0.5))


@pytest.mark.benchmark(timer=replay)
def test_block_causal_attention(report_timing, device, case, implementation):
    report_timing(OP, case, device, implementation, build)
