"""``VARiantAttention`` beside a layer built like the original's ``SelfAttention``."""

import copy
import inspect
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from lookalike_var import LookalikeVAR, SelfAttention, lookalike
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import variant_kernels.masks as masks
from tests.forked_program import run_forked
from variant_kernels import ScaleLayout, VARiantAttention
from variant_kernels.kv_cache import GrowingPages

SIDES = (1, 2, 3, 4)
LAYOUT = ScaleLayout.from_patch_nums(SIDES)


def causal(layout=LAYOUT, dtype=torch.float32):
    scale_L = torch.repeat_interleave(torch.arange(layout.num_scales), torch.tensor(layout.tokens))
    hidden_LL = scale_L.unsqueeze(1) < scale_L
    return torch.zeros(1, 1, layout.total, layout.total, dtype=dtype).masked_fill(
        hidden_LL, -torch.inf
    )


def pair(l2=True, dtype=torch.float32, **options):
    """The look-alike layer and ours with its weights."""
    torch.manual_seed(0)
    theirs = SelfAttention(0, 64, 2, attn_l2_norm=l2, **options)
    for bias in (theirs.q_bias, theirs.v_bias):
        nn.init.normal_(bias)
    ours = VARiantAttention(0, 64, 2, attn_l2_norm=l2, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def close(ours, expected, factor=1.0):
    error = (ours.float() - expected.float()).abs().max()
    assert error <= factor * (1e-5 if ours.dtype == torch.float32 else 0.03) * expected.abs().max()


def test_constructor_takes_what_the_original_takes():
    expected = ["block_idx", "embed_dim", "num_heads", "attn_drop", "proj_drop", "attn_l2_norm"]
    names = list(inspect.signature(VARiantAttention).parameters)
    assert names == [*expected, "flash_if_available"]
    assert VARiantAttention(0, 64, 2, 0.0, 0.1, True).proj_drop.p == 0.1
    with pytest.raises(ValueError, match="multiple of 8"):
        VARiantAttention(0, 24, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l2", [True, False])
def test_training_pass_and_gradients_match(l2, dtype):
    theirs, ours = pair(l2, dtype)
    x = torch.randn(2, LAYOUT.total, 64, dtype=dtype)
    bias, grads = causal(dtype=dtype), []
    for layer in (theirs, ours):
        out = layer(x, attn_bias=bias)
        out.float().square().sum().backward()
        grads.append((out.detach(), {n: p.grad for n, p in layer.named_parameters()}))
    close(grads[1][0], grads[0][0])
    assert grads[1][1].keys() == grads[0][1].keys()
    for name, grad in grads[0][1].items():
        close(grads[1][1][name], grad, 10 if dtype == torch.float32 else 2)


def test_the_block_causal_mask_runs_the_kernel_and_others_do_not(monkeypatch):
    _, ours = pair()
    layouts = []
    real = inspect.getmodule(VARiantAttention).block_causal_attention

    def watched(q, k, v, layout, **options):
        layouts.append(layout.tokens)
        return real(q, k, v, layout, **options)

    monkeypatch.setattr(inspect.getmodule(VARiantAttention), "block_causal_attention", watched)
    x, bias = torch.randn(1, LAYOUT.total, 64), causal()
    ours(x, bias)
    assert layouts == [LAYOUT.tokens]
    ours(x[:, :14], bias[:, :, :14, :14])  # progressive training: a prefix
    assert layouts[1:] == [LAYOUT.tokens[:3]]
    bias[0, 0, 20, 25] = -1.0  # the same memory, changed
    ours(x, bias)
    ours(x, None)
    ours(x, nn.Parameter(causal()))
    assert len(layouts) == 2


def other_biases():
    random = torch.randn(1, 1, LAYOUT.total, LAYOUT.total)
    one_off = causal()
    one_off[0, 0, 3, 29] = 0
    hole = causal()
    hole[0, 0, 29, 3] = -torch.inf
    half = causal().clamp_min(-5)
    per_head = causal() + torch.randn(1, 2, 1, 1)
    return {
        "random": random,
        "one_off": one_off,
        "hole": hole,
        "finite": half,
        "per_head": per_head,
        "none": None,
        "boolean": torch.rand(LAYOUT.total, LAYOUT.total) > 0.3,
        "boolean_causal": causal() == 0,
        "causal_expanded": causal().expand(2, 2, -1, -1),
    }


@pytest.mark.parametrize("name", other_biases())
def test_any_bias_gives_what_torch_gives(name):
    theirs, ours = pair()
    torch.manual_seed(2)
    bias, x = other_biases()[name], torch.randn(2, LAYOUT.total, 64)
    if name == "boolean":
        bias.fill_diagonal_(True)
    close(ours(x, bias), theirs(x, bias))


def test_a_mask_is_looked_at_once_and_again_when_it_changes(monkeypatch):
    _, ours = pair()
    looks = []
    real = masks.layout_of
    monkeypatch.setattr(masks, "layout_of", lambda bias: looks.append(1) or real(bias))
    x, bias = torch.randn(1, LAYOUT.total, 64), causal()
    for _ in range(3):
        ours(x, bias[:, :, :30, :30].to(torch.float32))  # a new view every step, as VAR makes
    assert len(looks) == 1
    bias.mul_(1)
    ours(x, bias)
    assert len(looks) == 2
    for _ in range(masks.MAX_CACHED_LAYOUTS + 3):
        ours(x, causal())
    assert len(masks._cached_layouts) <= masks.MAX_CACHED_LAYOUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_changed_behind_torchs_back_is_noticed(dtype, inference, monkeypatch):
    looks, real = [], masks.layout_of
    monkeypatch.setattr(masks, "layout_of", lambda bias: looks.append(1) or real(bias))
    found = ScaleLayout(tuple((1, n) for n in LAYOUT.tokens))
    with torch.inference_mode(inference):
        bias = causal()
        bias = bias == 0 if dtype == torch.bool else bias.to(dtype)
        blocked = bias[0, 0, 0, 1].item()
        for _ in range(3):
            assert masks.block_causal_layout(bias) == found
        assert len(looks) == 1
        bias.data[0, 0, 0, 1] = True if dtype == torch.bool else 0
        assert masks.block_causal_layout(bias) is None
        bias[0, 0, 0, 1] = blocked
        assert masks.block_causal_layout(bias) == found
        # Through the memory that numpy and others share.
        bias.view(torch.uint8).numpy()[0, 0, 0, -1] ^= 1
        assert masks.block_causal_layout(bias) is None


def test_a_changed_mask_gives_the_originals_result():
    theirs, ours = pair()
    x, bias = torch.randn(1, LAYOUT.total, 64), causal()
    close(ours(x, bias), theirs(x, bias))
    bias.data[0, 0, 0, 1] = 0
    close(ours(x, bias), theirs(x, bias))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads must be an integer >= 1; got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an integer >= 1; got 2.0"),
        ({"embed_dim": "64"}, TypeError, "embed_dim must be an integer >= 1; got '64'"),
        ({"attn_drop": "meta"}, TypeError, r"attn_drop must be a finite number in \[0, 1\]"),
        ({"attn_drop": 1.5}, ValueError, r"attn_drop must be a finite number in \[0, 1\]; got 1.5"),
        ({"proj_drop": None}, TypeError, r"proj_drop must be a finite number in \[0, 1\]"),
        ({"attn_l2_norm": "no"}, TypeError, "attn_l2_norm must be of type bool"),
        ({"embed_dim": 20}, ValueError, "must be a multiple of 8 from 16 to 256; got 20 / 2"),
    ],
)
def test_wrong_arguments_of_the_module_are_named(arguments, error, message):
    with pytest.raises(error, match=f"VARiantAttention: .*{message}"):
        VARiantAttention(0, **{"embed_dim": 64, "num_heads": 2, **arguments})


def test_every_layout_is_found_in_its_mask():
    for tokens in ((1,), (7,), (1, 1, 1), (2, 5, 1), (1, 4, 9, 16)):
        layout = ScaleLayout(tuple((1, n) for n in tokens))
        assert masks.layout_of(causal(layout)) == layout
    assert masks.layout_of(torch.zeros(0, 0)) is None
    assert masks.layout_of(torch.zeros(3, 4)) is None
    assert masks.layout_of(torch.full((3, 3), -torch.inf)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l2", [True, False])
def test_caching_matches_concatenation(l2, dtype):
    theirs, ours = pair(l2, dtype)
    with torch.no_grad():
        for _ in range(2):
            for layer in (theirs, ours):
                layer.kv_caching(True)
            for tokens in (1, 4, 9, 16, 2, 40):
                x = torch.randn(2, tokens, 64, dtype=dtype)
                close(ours(x, None), theirs(x, None))
            for layer in (theirs, ours):
                layer.kv_caching(False)
            assert ours._pages is None


def test_a_shallow_copy_in_the_middle_of_caching_caches_apart():
    _, ours = pair()
    x, other = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours.kv_caching(True)
        ours(x, None)
        expected = [copy.deepcopy(ours)(y, None) for y in (x, other)]
        twin = copy.copy(ours)
        found = [twin(x, None), ours(other, None)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert twin.mat_qkv is ours.mat_qkv
    assert twin.caching


def test_a_mask_while_caching_matches():
    theirs, ours = pair()
    bias = causal()
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.kv_caching(True)
        x = torch.randn(2, 14, 64)
        close(ours(x, bias[:, :, :14, :14]), theirs(x, bias[:, :, :14, :14]))
        x, later = torch.randn(2, 16, 64), torch.randn(1, 1, 16, 30)
        close(ours(x, later), theirs(x, later))
        x = torch.randn(2, 3, 64)
        close(ours(x, None), theirs(x, None))


def test_caching_refuses_a_gradient_and_another_batch():
    _, ours = pair()
    ours.kv_caching(True)
    with pytest.raises(RuntimeError, match="no_grad"):
        ours(torch.randn(2, 1, 64), None)
    with torch.no_grad():
        ours(torch.randn(2, 1, 64), None)
        with pytest.raises(ValueError, match="2 rows"):
            ours(torch.randn(3, 4, 64), None)


@torch.no_grad()
def test_a_call_that_failed_leaves_the_cache_as_it_was():
    _, ours = pair()
    x, later = torch.randn(2, 1, 64), torch.randn(2, 4, 64)

    def in_16_bits(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(x, None)

    ours.kv_caching(True)
    in_16_bits(x)
    expected = in_16_bits(later)
    ours.kv_caching(True)
    ours.scale = math.nan
    with pytest.raises(ValueError, match=r"softmax_scale must be a finite number"):
        in_16_bits(torch.randn(3, 7, 64))
    ours.scale = 1
    in_16_bits(x)
    with pytest.raises(TypeError, match="the dtype of the cache"):
        ours(later, None)  # the pages have 16 bits
    assert torch.equal(in_16_bits(later), expected)


def test_pages_grow_without_losing_what_they_hold():
    qkv = torch.randn(3, 5, 3, 2, 16)
    pages, kept = GrowingPages(qkv, page_size=4), []
    for tokens in (5, 1, 30, 2):
        step = pages.open(tokens)
        k = torch.randn(3, tokens, 2, 16)
        kept.append(k)
        pages.k_pages.view(-1, 2, 16)[step.slots_BT] = k
        seen = pages.k_pages[step.page_table_BM.long()].flatten(1, 2)[:, : pages.tokens]
        assert torch.equal(seen, torch.cat(kept, 1))
        assert step.kv_lens_B.tolist() == [pages.tokens] * 3
        pages.close()
    assert len(pages.k_pages) <= 3 * 2 * 10


def test_dropout_of_attention_weights_is_that_of_torch():
    theirs, ours = pair(attn_drop=0.3)
    x, outputs = torch.randn(2, LAYOUT.total, 64), []
    for layer in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(layer.train()(x, causal()))
    close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], ours.eval()(x, causal()))
    ours.train().kv_caching(True)
    theirs.train().kv_caching(True)
    outputs.clear()
    with torch.no_grad():
        for layer in (theirs, ours):
            torch.manual_seed(3)
            outputs.append(layer(x, None))
    close(outputs[1], outputs[0])


def test_autocast_computes_in_16_bits():
    theirs, ours = pair()
    x = torch.randn(2, LAYOUT.total, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x, causal())
        assert out.dtype == torch.bfloat16
        close(out, theirs(x, causal(dtype=torch.bfloat16)))
        with torch.no_grad():
            ours.kv_caching(True)
            theirs.kv_caching(True)
            for tokens in (1, 4):
                step = torch.randn(2, tokens, 64)
                close(ours(step, None), theirs(step, None))
            assert ours._pages.k_pages.dtype == torch.bfloat16


def test_compiled_layer_gives_the_same_and_its_gradients():
    from torch._dynamo.utils import counters

    _, ours = pair()
    x, bias = torch.randn(2, LAYOUT.total, 64), causal()
    counters.clear()
    out = torch.compile(ours, backend="aot_eager")(x, bias)
    # Only the detection of the mask runs outside the graphs, also if this is its first call.
    (reason,) = counters["graph_break"]
    assert "_cached_layout" in reason
    out.sum().backward()
    grads = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    expected = ours(x, bias)
    expected.sum().backward()
    close(out, expected)
    for name, parameter in ours.named_parameters():
        close(grads[name], parameter.grad, 10)


def test_copies_pickles_and_moves():
    _, ours = pair()
    x = torch.randn(2, 4, 64)
    with torch.no_grad():
        expected = ours(x, None)
        ours.kv_caching(True)
        ours(torch.randn(2, 1, 64), None)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            close(other(x, None), copy.deepcopy(ours)(x, None))
            other.kv_caching(False)
            close(other(x, None), expected)
        ours.kv_caching(False)
        assert ours.to(torch.float64).to(torch.float32)(x, None).dtype == torch.float32
        assert ours.to(torch.bfloat16)(x.bfloat16(), None).dtype == torch.bfloat16


def test_it_replaces_the_class_in_a_model():
    model = lookalike()
    words = torch.randn(2, model.L - 1, model.Cvae)
    labels = torch.tensor([1, 2])
    tokens, _ = model.autoregressive_infer_cfg(2, labels, g_seed=1)
    logits = model(labels, words)
    replaced = lookalike(LookalikeVAR)
    for index, block in enumerate(replaced.blocks):
        block.attn = VARiantAttention(index, 64, 2, attn_l2_norm=True)
    replaced.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(replaced.autoregressive_infer_cfg(2, labels, g_seed=1)[0], tokens)
    close(replaced(labels, words), logits, 10)


def training_input():
    return torch.randn(2, LAYOUT.total, 64, generator=torch.Generator().manual_seed(1))


def test_two_processes_train_as_one(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths)}
    done = run_forked(here / "attention_ranks.py", tmp_path, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "grads.pt", weights_only=True)
    _, layer = pair()
    layer(training_input(), causal()).square().mean().backward()
    for name, parameter in layer.named_parameters():
        close(saved[name], parameter.grad, 10)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (None, None, TypeError, "x must be a torch.Tensor; got NoneType"),
        (torch.zeros(30, 64), None, ValueError, r"x must have 3 dimensions \(B, T, C\)"),
        (torch.zeros(1, 30, 32), None, ValueError, r"x must be \(1, 30, 64\) to match embed_dim"),
        (torch.zeros(1, 30, 64).double(), None, TypeError, "x must have the dtype of the weights"),
        (torch.zeros(1, 30, 64, device="meta"), None, ValueError, "x must be on the device of"),
        (None, causal().numpy(), TypeError, "attn_bias must be a torch.Tensor; got ndarray"),
        (None, causal().to_sparse(), TypeError, "attn_bias must be a dense tensor with strides"),
        (None, torch.ones(30, 30, dtype=torch.int64), TypeError, "attn_bias must be floating-"),
        (None, causal().to("meta"), ValueError, "attn_bias must be on the device of x"),
        (None, causal()[..., :29], ValueError, r"attn_bias must broadcast to .* got \(1, 1, 30, 2"),
        (None, causal().expand(3, -1, -1, -1), ValueError, "attn_bias must broadcast to"),
        (None, causal()[None], ValueError, "attn_bias must broadcast to"),
    ],
)
@torch.no_grad()
def test_wrong_inputs_are_refused_by_name_and_leave_the_cache(x, bias, error, message):
    _, ours = pair()
    good = torch.randn(2, 30, 64)
    if x is None and bias is not None:
        x = good
    for caching in (False, True):
        ours.kv_caching(caching)
        expected = ours(good, causal())
        ours.kv_caching(caching)
        with pytest.raises(error, match=f"^VARiantAttention: {message}") as raised:
            ours(x, bias)
        assert "\n" not in str(raised.value)
        assert torch.equal(ours(good, causal()), expected)


@pytest.mark.parametrize("caching", [False, True])
@torch.no_grad()
def test_it_runs_without_memory(caching):
    ours = VARiantAttention(0, 64, 2).to("meta")
    ours.kv_caching(caching)
    assert ours(torch.zeros(2, 30, 64, device="meta"), None).shape == (2, 30, 64)


def test_another_bound_of_the_scale_is_refused():
    ours = VARiantAttention(0, 64, 2, attn_l2_norm=True)
    ours(torch.zeros(1, 3, 64), None)
    ours.max_scale_mul = 3.0
    with pytest.raises(ValueError, match=r"VARiantAttention: max_scale_mul must .* got 3.0"):
        ours(torch.zeros(1, 3, 64), None)


def test_fake_and_meta_masks_have_no_values_to_look_at():
    layer, x, mask = VARiantAttention(0, 64, 2), torch.randn(2, LAYOUT.total, 64), causal()
    expected = layer(x, mask)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = layer(x, mask)
    meta = copy.deepcopy(layer).to("meta")(x.to("meta"), mask.to("meta"))
    assert fake.shape == meta.shape == expected.shape
    assert torch.equal(layer(x, mask), expected)  # nothing fake was remembered


@pytest.mark.nightly
def test_an_exported_layer_gives_the_same_values():
    layer, x, mask = VARiantAttention(0, 64, 2).eval(), torch.randn(2, LAYOUT.total, 64), causal()
    exported = torch.export.export(layer, (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), layer(x, mask))


def _transformed(module, x, mask):
    """What torch.func makes of the layer: gradients of each sample, rows of a Jacobian, ..."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def loss(weights, x):
        return func.functional_call(module, weights, (x, mask)).square().sum()

    def loss_of_a_new_mask(x):
        return module(x, mask.clone().masked_fill(mask < 0, -torch.inf)).square().sum()

    rows = torch.autograd.grad
    tokens = x.clone().requires_grad_()
    out_3 = module(tokens, mask)[0, 5, :3]
    return {
        "grad": func.grad(loss)(weights, x),
        "of each sample": func.vmap(func.grad(loss), in_dims=(None, 0))(weights, x.unsqueeze(1)),
        "jacrev": func.jacrev(lambda y: module(y, mask)[0, 5, :3])(x),
        "of a new mask": func.grad(loss_of_a_new_mask)(x),
        "of masks": func.vmap(lambda m: module(x, m))(torch.stack((mask, torch.zeros_like(mask)))),
        "by the mask": func.grad(lambda m: module(x, m).square().sum())(mask),
        "batched": rows(out_3, tokens, torch.eye(3), is_grads_batched=True),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_give_the_originals_values():
    theirs, ours = pair()
    x, mask = torch.randn(3, LAYOUT.total, 64), causal()
    expected = _transformed(theirs, x, mask)
    for name, found in _transformed(ours, x, mask).items():
        for own, other in zip(tree_leaves(found), tree_leaves(expected[name]), strict=True):
            assert (own - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1), name


def test_forward_mode_derivatives_by_the_mask_are_not_dropped():
    _, ours = pair()
    x, mask = torch.randn(1, LAYOUT.total, 64), causal()
    ours(x, mask)
    # The error is that of torch's attention, which runs for such a mask.
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        ours(x, forward_ad.make_dual(mask, torch.ones_like(mask)))


def test_a_graph_of_make_fx_holds_for_another_mask():
    _, ours = pair()
    x, mask = torch.randn(1, LAYOUT.total, 64), causal()
    ours.requires_grad_(False)
    graph = make_fx(lambda x, mask: ours(x, mask))(x, mask)
    for other in (mask, torch.zeros_like(mask)):
        close(graph(2 * x, other), ours(2 * x, other))


def test_another_dtype_while_caching_is_named():
    layer = VARiantAttention(0, 32, 2).eval()
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.kv_caching(True)
        layer(x, None)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=r"^VARiantAttention: x must .* float32.*; got bfloat16"),
        ):
            layer(x, None)
        layer.kv_caching(True)
        assert layer.bfloat16()(x.bfloat16(), None).dtype == torch.bfloat16


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("bias", [torch.arange(3.0), torch.tensor([True, False, True]),
                                  torch.tensor(0.5), torch.ones(3, 1)], ids=repr)  # fmt: skip
@torch.no_grad()
def test_a_bias_of_few_axes_is_broadcast(bias, caching):
    _, ours = pair()
    x = torch.randn(2, 3, 64)
    results = []
    for each in (bias, bias.broadcast_to(2, 2, 3, 3)):
        ours.kv_caching(caching)
        results.append(ours(x, each))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_torch_jit_holds_for_another_mask():
    _, ours = pair()
    x, mask = torch.randn(1, LAYOUT.total, 64), causal()
    ours.requires_grad_(False)
    trace = torch.jit.trace(ours, (x, mask))
    for other in (mask, torch.zeros_like(mask)):
        close(trace(2 * x, other), ours(2 * x, other))
