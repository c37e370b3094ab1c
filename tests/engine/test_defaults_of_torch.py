"""The default device and dtype of torch are for tensors of the caller; results do not change."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_models import small_model
from torch.utils._device import _device_constructors

from variant import VARiant
from variant.files import read_safetensors, save_safetensors
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

ROOT = Path(__file__).parents[2]
MAKERS = {function.__name__ for function in _device_constructors()}


def without_device(tree):
    """The calls that make a tensor on the default device, but those of modules' constructors, which
    call torch's: parameters belong where the caller wants them."""
    for node in ast.iter_child_nodes(tree):
        is_constructor = isinstance(node, ast.FunctionDef) and node.name == "__init__"
        if is_constructor and "super().__init__(" in ast.unparse(node):
            continue
        yield from without_device(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in MAKERS:
            is_torchs = ast.unparse(node.func).startswith("torch.")
            if is_torchs and not {"device", None} & {word.arg for word in node.keywords}:
                yield f"{ast.unparse(node)} (line {node.lineno})"


@pytest.mark.parametrize("package", ["variant", "variant_kernels"])
def test_every_new_tensor_names_its_device(package):
    texts = {path: path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}
    assert texts
    found = {
        str(path.relative_to(ROOT)): calls
        for path, text in texts.items()
        if any(f"torch.{maker}(" in text for maker in MAKERS)
        and (calls := list(without_device(ast.parse(text))))
    }
    assert found == {}


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


@DEFAULTS
def test_hooks_are_compared(dtype, device):
    model = small_model()
    expected = model.generate([1, 2], seed=3).tokens
    model.var.blocks[0].register_forward_hook(lambda *_: None)
    with defaults(dtype, device):
        assert torch.equal(model.generate([1, 2], seed=3).tokens, expected)


@DEFAULTS
@pytest.mark.parametrize("key", ["var.head.bias", "vae.quantize.ema_vocab_hit_SV"])
def test_missing_weights_are_initialised_on_the_cpu(dtype, device, key, tmp_path):
    model, path = small_model(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    tensors = read_safetensors(path)
    save_safetensors(path, {k: v for k, v in tensors.items() if k != key})
    with defaults(dtype, device), pytest.warns(UserWarning, match=f"missing .*{key[4:]}"):
        loaded = VARiant.from_pretrained(tmp_path, strict=False)
    value = loaded.state_dict()[key]
    assert (value.dtype, value.device.type) == (torch.float32, "cpu")


@DEFAULTS
def test_statistics_of_other_scales_start_at_zero_on_the_cpu(dtype, device, tmp_path):
    model, path, key = (
        small_model(),
        tmp_path / "model.safetensors",
        "vae.quantize.ema_vocab_hit_SV",
    )
    model.save_pretrained(tmp_path)
    tensors = read_safetensors(path)
    save_safetensors(path, tensors | {key: tensors[key][:1].clone()})
    with defaults(dtype, device):
        value = VARiant.from_pretrained(tmp_path).state_dict()[key]
    assert (value.dtype, value.device.type, float(value.sum())) == (torch.float32, "cpu", 0)
