"""``patch`` and ``unpatch`` on models that other tools changed, before the patch or after it."""

import copy
import functools
import pickle

import lookalike_infinity
import lookalike_var
import pytest
import torch
from lookalike_var import LookalikeCoDe
from small_models import small_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from variant_kernels import patch
from variant_kernels.integrations import PatchError

LABELS = torch.tensor([1, 3])
TEXT = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def seeded(kind, **options):
    if kind == "Infinity":
        return lookalike_infinity.lookalike(**options)
    classes = {"VAR": lookalike_var.LookalikeVAR, "CoDe": LookalikeCoDe}
    return lookalike_var.lookalike(classes[kind], **options)


def paint(model, batch=2):
    if hasattr(model, "unregistered_blocks"):
        return model.autoregressive_infer_cfg(TEXT[:batch], lookalike_infinity.SQUARE, g_seed=5)
    return model.autoregressive_infer_cfg(batch, LABELS[:batch], g_seed=5, cfg=2.0, top_k=10)


def blocks_of(model):
    return getattr(model, "unregistered_blocks", None) or model.blocks


def attention_of(block):
    return block.sa if hasattr(block, "sa") else block.attn


def snapshot(model):
    """Class and members of every module; the hooks and children among them also by content."""
    containers = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
    return [
        (
            module,
            type(module),
            dict(vars(module)),
            {name: dict(vars(module)[name]) for name in containers},
        )
        for module in model.modules()
    ]


def assert_same(now, before):
    assert len(now) == len(before)
    for (module, kind, members, contents), old in zip(now, before, strict=True):
        assert module is old[0]
        assert kind is old[1]
        assert list(members) == list(old[2])
        assert all(members[name] is value for name, value in old[2].items())
        assert contents.keys() == old[3].keys()
        for name, content in contents.items():
            assert list(content.items()) == list(old[3][name].items())


def assert_refused(model, message):
    before = snapshot(model)
    with pytest.raises(PatchError, match=message) as caught:
        patch(model)
    assert "nothing has been changed" in str(caught.value)
    assert_same(snapshot(model), before)


def assert_right(model, tolerance=1e-4, batch=2, handle=None):
    """A patched model paints what it painted before, also again and with another batch."""
    expected = paint(model, batch)
    with patch(model) as handle:
        for _ in range(2):
            tokens, logits = paint(model, batch)
            assert torch.equal(tokens, expected[0])
            assert (logits - expected[1]).abs().max() < tolerance * expected[1].abs().max()
        paint(model, 1)
        assert handle.stats().kv_allocated_bytes > 0
    again = paint(model, batch)
    assert torch.equal(again[0], expected[0])


def passing_on(module, name="forward"):
    """A replacement on the instance that changes nothing, as libraries' hooks are made."""
    old = getattr(module, name)

    def replacement(*args, **options):
        return old(*args, **options)

    setattr(module, name, replacement)


FAMILIES = ["VAR", "CoDe", "Infinity"]
PARTS = {
    "VAR": "blocks[{}].attn",
    "CoDe": "blocks[{}].attn",
    "Infinity": "unregistered_blocks[{}].sa",
}


# --- changed before ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["block", "attention", "kv_caching"])
def test_a_method_replaced_on_the_instance_is_refused_by_name(family, part):
    model = seeded(family)
    where, block = PARTS[family].format(1), blocks_of(model)[1]
    if part == "block":
        passing_on(block)
        where = where.rpartition(".")[0] + ".forward"
    elif part == "attention":
        passing_on(attention_of(block))
        where += ".forward"
    else:
        passing_on(attention_of(block), "kv_caching")
        where += ".kv_caching"
    expected = paint(model)
    before = snapshot(model)
    with pytest.raises(PatchError) as caught:
        patch(model)
    assert f"{where} was replaced on the instance" in str(caught.value)
    assert "nothing has been changed" in str(caught.value)
    assert_same(snapshot(model), before)
    assert torch.equal(paint(model)[0], expected[0])


@pytest.mark.parametrize(
    "part",
    ["head_nm", "shared_ada_lin", "head", "blocks.1.ffn", "blocks.1.attn.proj", "blocks.1.ffn.fc1"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_part_replaced_on_the_instance_that_is_called_runs(part, autocast):
    model = seeded("VAR", shared_aln=True).requires_grad_(False)
    module = model.get_submodule(part)
    old = module.forward
    calls = []
    module.forward = lambda *args, **options: (calls.append(1), 1.5 * old(*args, **options))[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = paint(model)[1][:, :1]
        made = len(calls)
        with patch(model):
            calls.clear()
            ours = paint(model)[1][:, :1]
            assert len(calls) == made
    assert (ours - expected).abs().max() < (0.05 if autocast else 1e-4) * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("what", ["block", "attention", "kv_caching"])
def test_a_method_replaced_on_the_class_is_refused_by_name(family, wraps, what, monkeypatch):
    model = seeded(family)
    block = blocks_of(model)[0]
    kind = type(block if what == "block" else attention_of(block))
    name = "kv_caching" if what == "kv_caching" else "forward"
    old = getattr(kind, name)
    if wraps:
        replacement = functools.wraps(old)(lambda *args, **options: old(*args, **options))
    elif what == "kv_caching":

        def replacement(self, enable):
            old(self, enable)

    else:
        names = list(old.__code__.co_varnames[: old.__code__.co_argcount])
        scope = {"old": old}
        exec(f"def forward({', '.join(names)}): return old({', '.join(names)})", scope)
        replacement = scope["forward"]
    monkeypatch.setattr(kind, name, replacement)
    assert_refused(model, rf"{kind.__name__}\.{name} was replaced on the class of|must take")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subclass_that_overrides_the_forward_is_refused_by_name(family):
    model = seeded(family)
    seen = []
    attention = attention_of(blocks_of(model)[2])
    names = {
        "SelfAttention": "x, attn_bias"
        if family != "Infinity"
        else "x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, "
        "rope2d_freqs_grid=None, scale_ind=0"
    }["SelfAttention"]
    bare = ", ".join(n.split("=")[0] for n in names.split(", "))
    scope = {"Base": type(attention), "seen": seen}
    exec(
        f"class Recording(Base):\n def forward(self, {names}):\n  seen.append(1)\n"
        f"  return Base.forward(self, {bare})",
        scope,
    )
    attention.__class__ = scope["Recording"]
    assert_refused(model, r"\[2\]\.(sa|attn)\.forward is that of Recording, which overrides")


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_modules_are_refused_by_name(family):
    path = PARTS[family].format(1).rpartition(".")[0]

    def refused(change, message):
        model = seeded(family)
        change(model, blocks_of(model)[1])
        with pytest.raises(PatchError) as caught:
            patch(model)
        assert message in str(caught.value)
        assert "nothing has been changed" in str(caught.value)

    def attention_compiled(model, block):
        name = "sa" if family == "Infinity" else "attn"
        setattr(block, name, torch.compile(attention_of(block), backend="eager"))

    def ffn_compiled(model, block):
        block.ffn.forward = torch.compile(block.ffn.forward, backend="eager")

    attention = "sa" if family == "Infinity" else "attn"
    refused(lambda model, block: block.compile(), f"{path} is compiled by Module.compile()")
    refused(attention_compiled, f"{path}.{attention} is compiled by torch.compile")
    refused(ffn_compiled, f"{path}.ffn is compiled by torch.compile")


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_models_are_refused_and_the_model_in_them_is_named(family):
    model = seeded(family)
    for wrapped, attribute in (
        (torch.compile(model, backend="eager"), "_orig_mod"),
        (nn.DataParallel(model), "module"),
    ):
        with pytest.raises(PatchError, match=rf"wrapped in \w+; give model\.{attribute}"):
            patch(wrapped)
    patch(model).unpatch()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_or_attention_used_twice_is_refused_by_name(family):
    model = seeded(family)
    blocks = blocks_of(model)
    if family == "Infinity":
        blocks[1] = blocks[0]
        model.block_chunks[0].module[1] = blocks[0]
    else:
        blocks[1] = blocks[0]
    assert_refused(model, r"blocks\[\d\] is one module at layers 0 and 1")
    model = seeded(family)
    blocks = blocks_of(model)
    name = "sa" if family == "Infinity" else "attn"
    setattr(blocks[3], name, attention_of(blocks[0]))
    assert_refused(model, rf"blocks\[\d\].{name} is one module at layers 0 and 3")


def test_a_linear_layer_used_twice_runs():
    model = seeded("VAR").requires_grad_(False)
    model.blocks[2].ffn = model.blocks[1].ffn
    model.blocks[3].attn.proj = model.blocks[0].attn.proj
    assert_right(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["block", "attention"])
def test_a_checkpointing_wrapper_is_refused_by_name(family, part):
    model = seeded(family)
    blocks = blocks_of(model)
    if part == "attention":
        name = "sa" if family == "Infinity" else "attn"
        setattr(blocks[1], name, checkpoint_wrapper(attention_of(blocks[1])))
    elif family == "Infinity":
        blocks[1] = model.block_chunks[0].module[1] = checkpoint_wrapper(blocks[1])
    else:
        blocks[1] = checkpoint_wrapper(blocks[1])
    assert_refused(model, r"blocks\[1\].* of (a )?CheckpointWrapper")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_on_meta_are_refused_by_name(family):
    model = seeded(family).to("meta")
    assert_refused(model, r"is on the meta device; load the weights first")
    model = seeded(family)
    attention_of(blocks_of(model)[1]).q_bias = nn.Parameter(torch.empty(64, device="meta"))
    assert_refused(model, r"\[1\]\.(attn|sa)\.q_bias is on the meta device")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failing_probe_is_wrapped(family):
    model = seeded(family)
    handle = attention_of(blocks_of(model)[1]).register_forward_pre_hook(lambda *args: 1 / 0)
    assert_refused(model, "a short run of its layers failed: ZeroDivisionError: division by zero")
    handle.remove()
    patch(model).unpatch()
    model = seeded(family)
    attention_of(blocks_of(model)[1]).mat_qkv = nn.Identity()
    assert_refused(model, "its structure cannot be read: AttributeError: .*weight")


@pytest.mark.parametrize("part", ["head_nm.ada_lin", "blocks.1.ada_lin", "blocks.1.ada_lin.1"])
def test_a_projection_of_the_condition_without_weights_is_refused_by_name(part):
    model = seeded("VAR")
    model.set_submodule(part, nn.Identity())
    name = part.removesuffix(".1").replace(".1", r"\[1\]").replace(".ada", r"\.ada")
    assert_refused(model, rf"but {name} must be a projection with weights; found (Ident|Sequ)")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_with_modules_of_another_kind_is_refused(family):
    model = seeded(family)
    attention_of(blocks_of(model)[0]).adapter = nn.Linear(64, 64)
    assert_refused(model, r"must have no other modules than .*; found \['adapter'\]")


def test_a_block_with_another_module_keeps_its_own_forward():
    class Gated(nn.Module):
        """Computes nothing at first, and something once it has learned."""

        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.gate * x

    source = lookalike_var.Block.forward

    class Block(nn.Module):
        def forward(self, x, cond_BD, attn_bias):
            return self.extra(source(self, x, cond_BD, attn_bias))

    model = seeded("VAR").requires_grad_(False)
    for block in model.blocks:
        block.__class__ = Block
        block.extra = Gated().requires_grad_(False)
    with patch(model):
        for block in model.blocks:
            block.extra.gate.fill_(0.7)
        ours = paint(model)[1]
    expected = paint(model)[1]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def half(module, tensor):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(module, tensor, Half())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_parametrised_weights_run_right(family, autocast):
    model = seeded(family).requires_grad_(False)
    block = blocks_of(model)[1]
    attention = attention_of(block)
    parametrizations.weight_norm(attention.mat_qkv)
    half(attention.proj, "weight")
    half(attention, "q_bias")
    parametrizations.weight_norm(block.ffn.fc1)
    if family != "Infinity":
        half(block.ada_lin[1], "weight")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = paint(model)
        before = snapshot(model)
        handle = patch(model)
        assert type(attention).__name__ == "ParametrizedSelfAttention"
        ours = paint(model)
        handle.unpatch()
    tolerance = 0.05 if autocast else 1e-4
    first = expected[1][:, :1]
    assert (ours[1][:, :1] - first).abs().max() < tolerance * first.abs().max()
    if not autocast:
        assert torch.equal(ours[0], expected[0])
    assert_same(snapshot(model), before)


class Int8Linear(nn.Linear):
    """Weights in 8 bits, as quantisers make them."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) * 0.02, self.bias)


def test_subclasses_of_linear_run_by_their_own_forward():
    model = seeded("VAR").requires_grad_(False)
    for linear in (
        model.blocks[0].attn.proj,
        model.blocks[1].ffn.fc1,
        model.blocks[2].ada_lin[1],
        model.head_nm.ada_lin[1],
        model.head,
    ):
        linear.weight = nn.Parameter((linear.weight / 0.02).round().to(torch.int8), False)
        linear.__class__ = Int8Linear
    assert_right(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_forward_replaced_on_torchs_class_runs(family, monkeypatch):
    model = seeded(family).requires_grad_(False)
    old = nn.Linear.forward
    with torch.autocast("cpu", torch.bfloat16), patch(model):
        monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 1.5 * old(self, input))
        ours = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
        with patch(model):
            later = paint(model)[1][:, :1]
    for logits in (ours, later):
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# --- hooks ---------------------------------------------------------------------------------------

HOOKED = [
    "blocks.1",
    "blocks.1.attn",
    "blocks.1.attn.proj",
    "blocks.1.attn.proj_drop",
    "blocks.1.ffn",
    "blocks.1.ffn.act",
    "blocks.1.ffn.fc1",
    "blocks.1.ln_wo_grad",
    "blocks.1.drop_path",
    "blocks.1.ada_lin",
    "blocks.1.ada_lin.0",
    "blocks.1.ada_lin.1",
    "head_nm",
    "head_nm.ln_wo_grad",
    "head_nm.ada_lin",
    "head_nm.ada_lin.1",
    "shared_ada_lin",
    "shared_ada_lin.0",
    "shared_ada_lin.1",
    "head",
    "word_embed",
]


@pytest.mark.parametrize("family", ["VAR", "CoDe"])
@pytest.mark.parametrize("added", ["before", "after"])
@pytest.mark.parametrize("part", HOOKED)
def test_hooks_are_called_as_often_and_their_outputs_count(family, added, part):
    model = seeded(family, shared_aln=part.startswith("shared"))
    module, calls = model.get_submodule(part), []

    def pre(module, args, kwargs):
        calls.append("pre")

    def post(module, args, kwargs, output):
        calls.append("post")
        return output * 1.25

    def add():
        return [
            module.register_forward_pre_hook(pre, with_kwargs=True),
            module.register_forward_hook(post, with_kwargs=True),
        ]

    hooks = add()
    expected = paint(model)
    made = list(calls)
    if added == "after":
        [hook.remove() for hook in hooks]
    with patch(model):
        if added == "after":
            hooks = add()
        calls.clear()
        tokens, logits = paint(model)
        assert calls == made
        assert torch.equal(tokens, expected[0])
        assert (logits - expected[1]).abs().max() < 1e-4 * expected[1].abs().max()
        [hook.remove() for hook in hooks]
    assert made.count("pre") >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_all_modules_are_called_as_often(family):
    model, names = seeded(family), {}
    for name, module in model.named_modules():
        names[module] = name
    calls = []

    def count(module, args, output):
        if module in names:
            calls.append(names[module])

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        paint(model)
        expected = list(calls)
        with patch(model):
            calls.clear()
            paint(model)
            assert calls == expected
    finally:
        hook.remove()


@pytest.mark.parametrize("part", ["blocks.1.ln_wo_grad", "blocks.1.ada_lin", "blocks.1.attn"])
def test_backward_hooks_are_called_as_often(part):
    model, calls = seeded("VAR").train(), []
    model.get_submodule(part).register_full_backward_hook(lambda *args: calls.append(1))
    words = torch.randn(2, model.L - 1, model.Cvae)
    model(LABELS, words).sum().backward()
    made = len(calls)
    calls.clear()
    with patch(model):
        model(LABELS, words).sum().backward()
        assert len(calls) == made > 0


@pytest.mark.parametrize("part", ["ln_wo_grad", "drop_path", "ada_lin"])
def test_parts_replaced_after_the_patch_are_not_passed_by(part):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = seeded("VAR").requires_grad_(False)
    with patch(model):
        block = model.blocks[1]
        setattr(block, part, Doubled(getattr(block, part)))
        model.head_nm.ln_wo_grad.forward = lambda x: x
        ours = paint(model)[1]
    expected = paint(model)[1]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def affine_norm():
    norm = nn.LayerNorm(64, eps=1e-6)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("part", "make"),
    [
        ("ln_wo_grad", affine_norm),
        ("ln_wo_grad", nn.Identity),
        ("ln_wo_grad", lambda: nn.Linear(64, 64)),
        ("drop_path", nn.SiLU),
        ("drop_path", lambda: nn.Linear(64, 64)),
        ("drop_path", lambda: nn.Sequential(nn.Linear(64, 64))),
    ],
)
def test_another_module_of_torchs_in_the_place_of_a_part_runs(part, make, autocast):
    model = seeded("VAR").requires_grad_(False)
    before = paint(model)[1]
    with patch(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for owner in (*model.blocks, model.head_nm):
            if hasattr(owner, part):
                torch.manual_seed(0)
                setattr(owner, part, make())
        ours = paint(model)[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = paint(model)[1]
    largest = expected.abs().max()
    assert (before - expected).abs().max() > 0.1 * largest
    # Of the first scale: later ones depend on drawn tokens.
    assert (ours - expected)[:, 0].abs().max() < (0.02 if autocast else 1e-4) * largest


def test_weights_given_to_the_norm_while_patched_count():
    model = seeded("VAR").requires_grad_(False)
    with patch(model):
        for owner in (model.blocks[1], model.head_nm):
            owner.ln_wo_grad.weight = nn.Parameter(torch.arange(64.0) / 32, requires_grad=False)
        ours = paint(model)[1]
    expected = paint(model)[1]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


# --- changed while patched -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_keeps_parametrisations_that_came_after_the_patch(family):
    model = seeded(family).requires_grad_(False)
    block = blocks_of(model)[0]
    attention = attention_of(block)
    kinds = type(attention), type(attention.proj)
    handle = patch(model)
    parametrizations.weight_norm(attention.proj)
    half(attention, "q_bias")
    half(attention, "v_bias")
    ours = paint(model)
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)
    handle.unpatch()
    expected = paint(model)
    assert torch.equal(ours[0], expected[0])
    for other in (copied, copy.deepcopy(model)):
        assert torch.equal(paint(other)[0], expected[0])
        assert not any(hasattr(m, "patch_state") for m in other.modules())
    assert parametrize.is_parametrized(attention.proj, "weight")
    assert isinstance(attention, kinds[0])
    parametrize.remove_parametrizations(attention.proj, "weight")
    parametrize.remove_parametrizations(attention, "q_bias")
    parametrize.remove_parametrizations(attention, "v_bias")
    assert (type(attention), type(attention.proj)) == kinds
    assert torch.equal(paint(model)[0], expected[0])
    patch(model).unpatch()


@pytest.mark.parametrize("then", ["unpatch", "remove"])
def test_parametrisations_from_before_the_patch_can_be_changed_while_patched(then):
    model = seeded("VAR").requires_grad_(False)
    attention = model.blocks[0].attn
    kind = type(attention)
    half(attention, "q_bias")
    handle = patch(model)
    half(attention, "v_bias")
    ours = paint(model)
    if then == "remove":
        parametrize.remove_parametrizations(attention, "q_bias")
        parametrize.remove_parametrizations(attention, "v_bias")
        assert torch.equal(paint(model)[0], ours[0])
    handle.unpatch()
    assert torch.equal(paint(model)[0], ours[0])
    if then == "unpatch":
        parametrize.remove_parametrizations(attention, "q_bias")
        parametrize.remove_parametrizations(attention, "v_bias")
    assert type(attention) is kind
    assert torch.equal(paint(model)[0], ours[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["block", "attention", "proj", "kv_caching"])
def test_unpatch_refuses_where_a_method_was_replaced_since(family, part):
    model = seeded(family)
    expected = paint(model)
    handle = patch(model)
    block = blocks_of(model)[0]
    attention = attention_of(block)
    target = {"block": block, "proj": attention.proj}.get(part, attention)
    name = "kv_caching" if part == "kv_caching" else "forward"
    passing_on(target, name)
    assert torch.equal(paint(model)[0], expected[0])
    before = snapshot(model)
    with pytest.raises(PatchError, match=rf"\[0\].*{name} was replaced since patch; restore it"):
        handle.unpatch()
    assert_same(snapshot(model), before)
    assert handle.patched
    assert torch.equal(paint(model)[0], expected[0])
    delattr(target, name)
    handle.unpatch()
    assert torch.equal(paint(model)[0], expected[0])


def test_unpatch_refuses_where_its_own_class_was_changed():
    model = seeded("VAR")
    handle = patch(model)
    kind = type(model.blocks[0].attn)
    kind.forward = functools.partialmethod(kind.forward)
    with pytest.raises(PatchError, match=r"class of blocks\[0\].attn was changed.*forward"):
        handle.unpatch()
    del kind.forward
    handle.unpatch()


def test_unpatch_refuses_where_a_class_on_top_calls_super():
    model = seeded("VAR")
    handle = patch(model)
    block = model.blocks[0]

    class Recording(type(block)):
        def forward(self, x, cond_BD, attn_bias):
            return super().forward(x, cond_BD, attn_bias)

    patched, block.__class__ = type(block), Recording
    with pytest.raises(PatchError, match=r"blocks\[0\] was wrapped since patch: .*super\(\)"):
        handle.unpatch()
    block.__class__ = patched
    handle.unpatch()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["reordered", "deleted", "added", "replaced", "attention"])
def test_other_blocks_than_those_patched_are_refused_by_name(family, change):
    model = seeded(family)
    handle = patch(model)
    blocks = blocks_of(model)
    other = blocks_of(seeded(family, seed=1))[0]
    name = "sa" if family == "Infinity" else "attn"
    new = list(blocks)
    if change == "reordered":
        new[0], new[2] = new[2], new[0]
    elif change == "deleted":
        del new[1]
    elif change == "added":
        new.append(other)
    elif change == "replaced":
        new[1] = other
    else:
        setattr(new[1], name, attention_of(other))
    if family == "Infinity":
        model.unregistered_blocks[:] = new
        model.block_chunks = nn.ModuleList([lookalike_infinity.Chunk(new)])
    else:
        model.blocks = nn.ModuleList(new)
    where = {"reordered": r"\[0\]", "deleted": r"\[1\]|3 blocks", "added": r"\[4\]"}
    match = where.get(change, r"\[1\]") + ".*(is another module|blocks?, not the 4).*call unpatch"
    with pytest.raises(PatchError, match=match):
        paint(model)
    handle.unpatch()
    for block in new:
        attention_of(block).kv_caching(False)
    expected = paint(model)
    with patch(model):
        assert torch.equal(paint(model)[0], expected[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_without_a_tensor_as_weight_is_refused_by_name(family):
    """Quantised layers of torch have a method ``weight()``."""
    model = seeded(family)

    class Quantised(nn.Linear):
        def weight(self):
            raise NotImplementedError

    projection = attention_of(blocks_of(model)[1]).mat_qkv
    del projection._parameters["weight"]
    projection.__class__ = Quantised
    with pytest.raises(PatchError, match=r"mat_qkv\.weight must have shape .*; found a method"):
        patch(model)


# --- 16-bit copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_copy_per_module_and_none_of_weights_made_anew(family, keep):
    model = seeded(family).requires_grad_(False)
    blocks = blocks_of(model)
    parametrizations.weight_norm(attention_of(blocks[0]).mat_qkv)
    parametrizations.weight_norm(blocks[0].ffn.fc1)
    nn.utils.weight_norm(blocks[1].ffn.fc1)  # by a hook, as before parametrisations
    largest = []
    with patch(model, keep_copies=keep) as handle:
        runtime = handle._runtime
        blocks[-1].register_forward_hook(lambda *args: largest.append(len(runtime._copies)))
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(4):
                paint(model)
    linears = sum(type(m) is nn.Linear for block in blocks for m in block.modules())
    assert 0 < max(largest) <= linears + 2  # with the head and the word embedding
    kept = largest[len(largest) // 4 :]
    if keep:
        assert set(kept) == {max(largest)}


def test_functional_call_leaves_no_copies():
    model = seeded("VAR").requires_grad_(False)

    class Painting(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return paint(self.model)[1]

    painting = Painting()
    with patch(model, keep_copies=True) as handle, torch.autocast("cpu", torch.bfloat16):
        for factor in (1.0, 2.0, 3.0):
            weights = {n: p * factor for n, p in painting.named_parameters()}
            ours = torch.func.functional_call(painting, weights)[:, :1]
            assert not handle._runtime._copies
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.func.functional_call(painting, weights)[:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


def test_kept_copies_follow_new_values_behind_the_same_parameters():
    model = seeded("VAR").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), patch(model, keep_copies=True) as handle:
        paint(model)
        size = len(handle._runtime._copies)
        for parameter in model.parameters():
            parameter.data = parameter.data * -2
        ours = paint(model)[1][:, :1]
        assert len(handle._runtime._copies) == size
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


def test_kept_copies_follow_new_values_at_the_old_address():
    model = seeded("VAR").requires_grad_(False)
    weight = model.blocks[1].ffn.fc1.weight
    memory = weight.numpy().copy()
    weight.data = torch.from_numpy(memory)
    with torch.autocast("cpu", torch.bfloat16), patch(model, keep_copies=True):
        paint(model)
        weight.data = torch.empty(0)
        memory *= -3
        weight.data = torch.from_numpy(memory)
        ours = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


def test_kept_copies_follow_a_fused_optimiser():
    model = seeded("VAR").requires_grad_(False)
    weight = model.blocks[1].ffn.fc1.weight
    optimiser = torch.optim.SGD([weight], lr=1.0, fused=True)
    with torch.autocast("cpu", torch.bfloat16), patch(model, keep_copies=True):
        paint(model)
        weight.grad = 3 * weight
        optimiser.step()
        ours = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


def replica(module):
    """As DataParallel makes them: parameters are plain attributes."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.detach().clone())
    return made


# Infinity itself has no replicas: its list of blocks stays that of the model.
@pytest.mark.parametrize("family", ["VAR", "CoDe"])
def test_a_replica_of_data_parallel_paints_the_same(family):
    model = seeded(family).requires_grad_(False)
    expected = paint(model)
    with patch(model):
        for found in (paint(replica(model)), paint(model)):
            assert torch.equal(found[0], expected[0])
            assert (found[1] - expected[1]).abs().max() < 1e-4 * expected[1].abs().max()


@torch.inference_mode()
def test_no_copies_are_kept_of_weights_of_inference_mode():
    model = seeded("VAR")
    with torch.autocast("cpu", torch.bfloat16), patch(model, keep_copies=True):
        paint(model)
        for parameter in (model.blocks[1].ffn.fc1.weight, model.blocks[0].ada_lin[1].weight):
            parameter.mul_(-3)
        ours = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


# --- distributed ---------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_distributed_models(family, one_process):
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import distribute_tensor

    # DistributedDataParallel
    model = seeded(family)
    with pytest.raises(PatchError, match=r"DistributedDataParallel; give model\.module"):
        patch(nn.parallel.DistributedDataParallel(model))

    if family == "VAR":
        words = torch.randn(2, model.L - 1, model.Cvae)
        expected = model(LABELS, words)
        with patch(model):
            ours = nn.parallel.DistributedDataParallel(model)(LABELS, words)
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()

    # One parameter distributed by hand, as tensor parallelism does.
    attention = attention_of(blocks_of(model)[2])
    attention.q_bias = nn.Parameter(distribute_tensor(attention.q_bias.detach(), one_process))
    assert_refused(model, r"\[2\]\.(sa|attn)\.q_bias is a DTensor")

    # The whole model sharded before.
    model = seeded(family)
    for block in blocks_of(model):
        fully_shard(block, mesh=one_process)
    fully_shard(model, mesh=one_process)
    assert_refused(model, "sharded by fully_shard; patch the model before")

    # Blocks sharded after the patch.
    model = seeded(family)
    expected = paint(model)
    handle = patch(model)
    for block in blocks_of(model):
        fully_shard(block, mesh=one_process)
    assert torch.equal(paint(model)[0], expected[0])
    handle.unpatch()
    for block in blocks_of(model):
        assert isinstance(block, FSDPModule)
        assert not hasattr(type(block), "patch_state")
        block.reshard()
    assert torch.equal(paint(model)[0], expected[0])

    # The same blocks, patched while sharded.
    before = snapshot(model)
    handle = patch(model)
    assert all(isinstance(block, FSDPModule) for block in blocks_of(model))
    assert torch.equal(paint(model)[0], expected[0])
    handle.unpatch()
    assert [kind for _, kind, *_ in snapshot(model)] == [kind for _, kind, *_ in before]
    assert torch.equal(paint(model)[0], expected[0])


@pytest.mark.parametrize("reshard", [False, True])
def test_kept_copies_of_sharded_weights_follow_the_optimiser(reshard, one_process):
    from torch.distributed.fsdp import fully_shard

    model = seeded("VAR")
    with torch.autocast("cpu", torch.bfloat16), patch(model, keep_copies=True):
        for block in model.blocks:
            fully_shard(block, mesh=one_process, reshard_after_forward=reshard)
        paint(model)
        for block in model.blocks:
            block.reshard()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-2)
        ours = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


def test_every_family_that_patch_supports_is_tried_here():
    from variant_kernels.integrations import FAMILIES as KNOWN
    from variant_kernels.integrations.refused import RefusedFamily

    supported = [family.name for family in KNOWN if not isinstance(family, RefusedFamily)]
    assert sorted(supported) == sorted(FAMILIES)


@pytest.mark.parametrize("how", ["compile", pytest.param("wrapper", marks=pytest.mark.nightly)])
def test_a_block_compiled_after_the_patch_paints_the_same(how):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = seeded("VAR", depth=2)
    tokens, _ = paint(model)
    handle = patch(model)
    if how == "compile":
        model.blocks[0].attn.compile(backend=backend)
    else:
        model.blocks[1].ffn = torch.compile(model.blocks[1].ffn, backend=backend)
    assert torch.equal(paint(model)[0], tokens)
    compiled = len(graphs)
    assert compiled > 0
    assert torch.equal(paint(model)[0], tokens)
    assert len(graphs) == compiled, "a second generation compiles nothing"
    handle.unpatch()
    assert torch.equal(paint(model)[0], tokens)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["VAR", "CoDe", "Infinity"])
def test_reading_the_annotations_of_a_class_does_not_hinder_unpatch(kind):
    # The interpreter adds __annotations__ to a class where it is read (by torch.jit, for instance).
    model = seeded(kind)
    before, expected = snapshot(model), paint(model)
    handle = patch(model)
    for module in model.modules():
        assert isinstance(type(module).__annotations__, dict)
    handle.unpatch()
    assert_same(snapshot(model), before)
    assert torch.equal(paint(model)[0], expected[0])


def test_our_own_models_need_no_patch():
    model = small_model()
    for own in (model, model.var, model.vae):
        with pytest.raises(PatchError, match=r"runs these kernels already; .*generate\(labels\)"):
            patch(own)
