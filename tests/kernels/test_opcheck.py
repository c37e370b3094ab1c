"""``torch.library.opcheck`` of every op, backward passes too; and autocast changes none of them."""

import pytest
import torch

from tests.kernels.compare import DEVICE, moved
from variant_kernels.ops import (
    adaln,
    append_paged_kv,
    block_causal_attention,
    group_norm,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)
from variant_kernels.ops.library import NAMESPACE

NATIVE = "cpu" if DEVICE == "cpu" else "triton"


def generator():
    return torch.Generator().manual_seed(11)


def calls():
    """The arguments of every op up to its backend, by name."""
    x, y, gate, scale, shift = moved(*adaln.sample_inputs(torch.float32, generator())[1])
    q, k, scale_mul = moved(*qk_norm.sample_inputs(torch.float32, generator())[1])
    *qkv, layout = block_causal_attention.sample_inputs(torch.float32, generator())[1]
    qkv = moved(*qkv)
    (head_scales,) = moved(torch.zeros(1, qkv[0].shape[2], 1, 1))
    lengths = layout.tokens, 0.2
    packed = moved(*qk_norm_append_paged_kv.sample_inputs(torch.float32, generator())[3])
    appended = moved(*append_paged_kv.sample_inputs(torch.float32, generator())[1])
    pages = moved(*paged_attention.sample_inputs(torch.float32, generator())[1])
    *feature_map, groups = group_norm.sample_inputs(torch.float32, generator())[1]
    (logits,) = moved(sample_tokens.sample_inputs(torch.float32, generator())[1][0])
    forwards = {
        "adaln_modulate": (x, scale, shift, 1e-6),
        "gated_residual_adaln": (x, y, gate, scale, shift, 1e-6),
        "qk_norm": (q, k, scale_mul),
        "block_causal_attention": (*qkv, *lengths),
        "block_causal_attention_qk_norm": (*qkv, head_scales, *lengths),
        "paged_attention": (*pages, 0.25),
        "append_paged_kv": tuple(appended),
        "qk_norm_append_paged_kv": tuple(packed),
        "group_norm_silu": (*moved(*feature_map), groups, 1e-6, True),
        "sample_tokens": (logits, 1.5, 5, 0.9, 3, None, 2, None),
    }
    mean, rstd = overload("adaln_modulate")(*forwards["adaln_modulate"], "reference")[1:]
    gated = overload("gated_residual_adaln")(*forwards["gated_residual_adaln"], "reference")
    out, lse = overload("block_causal_attention")(*qkv, *lengths, "reference")
    out_normed, lse_normed = overload("block_causal_attention_qk_norm")(
        *qkv, head_scales, *lengths, "reference"
    )
    backwards = {
        "adaln_modulate_backward": (y.contiguous(), x, scale, mean, rstd),
        "gated_residual_adaln_backward": (
            *(x.contiguous(), y.contiguous(), gated[0], y, gate, scale, *gated[2:]),
        ),
        "qk_norm_backward": (q.contiguous(), k.contiguous(), q, k, scale_mul),
        "block_causal_attention_backward": (torch.ones_like(out), *qkv, out, lse, *lengths),
        "block_causal_attention_qk_norm_backward": (
            *(torch.ones_like(out), *qkv, head_scales, out_normed, lse_normed, *lengths),
        ),
    }
    return {**forwards, **backwards}


def overload(name):
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def defined():
    """The names of all ops in the library; derivative_free has no result and is no op of users."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    found = {name for space, _, name in names if space == NAMESPACE}
    return sorted(found - {"derivative_free"})


def test_every_op_has_a_case():
    assert sorted(calls()) == defined()
    assert len(defined()) == 15


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("name", defined())
def test_opcheck_passes(name, backend):
    """Of forward passes with inputs that require a gradient, where there is one."""
    arguments = calls()[name]
    if f"{name}_backward" in defined():
        arguments = tuple(
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments
        )
    torch.library.opcheck(overload(name), (*arguments, backend))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("name", defined())
def test_autocast_changes_nothing(name, backend):
    def results(*, autocast):
        arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in calls()[name]]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            returned = overload(name)(*arguments, backend)
        written = [x for x in arguments if isinstance(x, torch.Tensor)]
        return [*written, *(returned if isinstance(returned, tuple) else [returned])]

    for inside, outside in zip(results(autocast=True), results(autocast=False), strict=True):
        # Pages hold NaN where nothing may be read.
        torch.testing.assert_close(inside, outside, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("name", ["append_paged_kv", "qk_norm_append_paged_kv"])
def test_opcheck_of_8_bit_pages_passes(name, backend):
    arguments = list(calls()[name])
    shape = arguments[2].shape
    arguments[2:4] = (torch.zeros(shape, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    scales = torch.ones(2, *shape[:3], dtype=torch.uint8, device=DEVICE).unbind(0)
    torch.library.opcheck(
        overload(name),
        (*arguments, backend, *scales),
        # test_schema compares inputs by an operation that torch lacks for 8-bit floats.
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
