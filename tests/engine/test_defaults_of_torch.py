"""The default device and dtype of torch are for tensors of the caller; results do not change."""

from contextlib import contextmanager

import pytest
import torch
from small_models import small_model

from variant import VARiant
from variant_kernels import (
    CachePlan,
    DepthSchedule,
    PagedKVCache,
    ScaleLayout,
    adaln_modulate,
    block_causal_attention,
    gated_residual_adaln,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)
from variant_kernels.masks import layout_of


@contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float32, "meta"), (torch.float64, "cpu"), (torch.bfloat16, "cpu")],
)


@DEFAULTS
def test_a_model_generates_the_same_tokens(dtype, device, tmp_path):
    model = small_model()
    expected = model.generate([1, 2], seed=3, log_probs=True)
    model.save_pretrained(tmp_path / "model")
    with defaults(dtype, device):
        for other in (model, VARiant.from_pretrained(tmp_path / "model")):
            result = other.generate([1, 2], seed=3, log_probs=True)
            forced = other.engine().forced_log_probs([1, 2], expected.tokens, cfg=1.5)
            edited = other.generate([1, 2], tokens=expected.tokens, mask=expected.tokens > -1)
    for one in (result, edited):
        assert torch.equal(one.tokens, expected.tokens)
        assert torch.equal(one.images, expected.images)
    assert torch.equal(forced, expected.log_probs)
    assert small_model().var.head.weight.device.type == "cpu"


@DEFAULTS
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ops_give_the_same_values(dtype, device, backend):
    layout = ScaleLayout.from_patch_nums((1, 2, 3))
    qkv = torch.randn(2, 14, 3, 2, 32)
    x, y, gate = torch.randn(2, 14, 64), torch.randn(2, 14, 64), torch.randn(2, 64)
    logits, scale = torch.randn(4, 5, 20), torch.zeros(1, 2, 1, 1)

    def values():
        q, k, v = (part.requires_grad_() for part in qkv.detach().clone().unbind(2))
        out = block_causal_attention(q, k, v, layout, backend=backend)
        out.sum().backward()
        cache = PagedKVCache(
            CachePlan(layout, DepthSchedule.full(1, 3)), 2, 2, 32, torch.float32, qkv.device
        )
        step = cache.open(0, 0)
        queries = qk_norm_append_paged_kv(
            qkv[:, :1], None, cache.k_pages, cache.v_pages, step.slots_BT, backend=backend
        )
        return [
            out.detach(), q.grad, queries, cache.k_pages.flatten(0, 1)[step.slots_BT.flatten()],
            adaln_modulate(x, gate, gate, backend=backend),
            *gated_residual_adaln(x, y, gate, gate, gate, backend=backend),
            *qk_norm(qkv[:, :, 0], qkv[:, :, 1], scale, backend=backend),
            sample_tokens(logits, guidance=1.0, top_k=3, top_p=0.9, seed=1, backend=backend),
        ]  # fmt: skip

    expected = values()
    with defaults(dtype, device):
        for value, right in zip(values(), expected, strict=True):
            assert value.dtype == right.dtype
            assert torch.equal(value, right)


@DEFAULTS
def test_a_mask_is_recognised(dtype, device):
    scale = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))
    mask = torch.zeros(14, 14).masked_fill(scale[:, None] < scale, -torch.inf)
    with defaults(dtype, device):
        assert layout_of(mask).total == 14
