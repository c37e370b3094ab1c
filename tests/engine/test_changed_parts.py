"""Parts of a model that a user changed before or after an engine's first use."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from changed_parts import Wrapper, halved, owner_of, removed, replaced, wrapped
from small_models import small_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from variant.engine import cast_models, packed_layers
from variant.engine.engine import Engine
from variant.models.var import Block, SelfAttention
from variant_kernels.packed_linear import can_pack
from variant_kernels.products import product_dtype

BF16 = {"dtype": torch.bfloat16}
LABELS = [1, 2]
TOKENS = torch.randint(24, (1, 14), generator=torch.Generator().manual_seed(0))
# Modules whose weights every engine reads; then those of an engine that casts the projections.
READ = (
    "head",
    "head_nm",
    "word_embed",
    "blocks.1",
    "blocks.1.attn",
    "blocks.1.attn.mat_qkv",
    "blocks.1.attn.proj",
    "blocks.1.ffn",
    "blocks.1.ffn.fc1",
    "blocks.1.ffn.fc2",
)
CAST = ("head_nm.ada_lin", "head_nm.ada_lin.1", "blocks.1.ada_lin", "blocks.1.ada_lin.1")
CALLED = ("class_emb", "lvl_embed")


def gated_model():
    """With gates that are far from zero, so that each layer counts."""
    model = small_model()
    with torch.no_grad():
        for block in model.var.blocks:
            block.ada_lin[1].bias[:64] = 0.5
    return model


def casts(options):
    """Whether the engine has 16-bit copies of the weights; not where such products are emulated."""
    return product_dtype("cpu", options.get("dtype", torch.float32)) != torch.float32


def readable(path):
    return "var." + path.replace(".1", "[1]").replace("[1].", r"[1]\.").replace("[1]", r"\[1\]")


def used(model, options):
    model.generate(LABELS, seed=0, **options)
    return model


def images(model, **options):
    return model.generate(LABELS, seed=0, **options).images


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_a_wrapper_around_a_part_that_is_read_is_refused_by_name(is_used, options):
    for path in (*READ, *(CAST if casts(options) else ())):
        model = small_model()
        if is_used:
            used(model, options)
        wrapped(path)(model.var)
        where = readable(path)
        with pytest.raises(TypeError, match=rf"^\w+: {where} must be of type \w+; got Wrapper"):
            images(model, **options)
        with pytest.raises(TypeError, match=rf"^\w+: {where} must be of type"):
            Engine(model.var, model.vae, **options)


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_a_wrapper_around_a_part_that_is_called_counts(is_used, options):
    for path in (*CALLED, *(() if casts(options) else CAST)):
        model = gated_model()
        changed = copy.deepcopy(model)
        before = images(model, **options)
        with torch.no_grad():  # the same by weights
            owner, name = owner_of(changed.var, path)
            for weight in getattr(owner, name).parameters():
                weight.mul_(2)
        expected = images(changed, **options)
        if is_used:
            used(model, options)
        wrapped(path, 2.0)(model.var)
        result = images(model, **options)
        assert torch.allclose(result, expected, atol=1e-5), path
        assert not torch.equal(result, before), path


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (removed("head"), TypeError, r"var\.head must be of type Linear; it was removed"),
        (removed("pos_start"), TypeError, r"var\.pos_start must be a tensor of shape \(1, 1, 32"),
        (removed("class_emb"), TypeError, r"var\.class_emb must be of type Embedding; it was rem"),
        (removed("blocks.1.attn.proj"), TypeError, r"var\.blocks\[1\]\.attn\.proj must be of typ"),
        (removed("blocks.1.ada_lin"), TypeError, r"var\.blocks\[1\]\.ada_lin must be of type Seq"),
        (
            replaced("blocks.1.attn.proj.bias", lambda old: None),
            TypeError,
            r"var\.blocks\[1\]\.attn\.proj\.bias must be a tensor of shape \(32,\); it was removed",
        ),
        (
            replaced("blocks.1.attn.mat_qkv", lambda old: nn.Linear(32, 96)),
            ValueError,
            r"var\.blocks\[1\]\.attn\.mat_qkv\.bias must be None; got Parameter of shape \(96,\)",
        ),
        (
            replaced("head", lambda old: nn.Linear(32, 7)),
            ValueError,
            r"var\.head\.weight must have shape \(24, 32\); got \(7, 32\)",
        ),
        (
            replaced("class_emb"),
            ValueError,
            r"var\.class_emb must return \(4, 32\); got \(4,\)",
        ),
        (
            replaced("head_nm.ada_lin"),
            TypeError,
            r"var\.head_nm\.ada_lin must be of type Sequential; got Identity\. The call failed",
        ),
        (halved("blocks.1"), ValueError, r"the weights of var must be of one dtype; got 12 of flo"),
        (
            lambda var: var.blocks[1].to("meta") and None,
            ValueError,
            r"the weights .*(got 12 of meta \(var\.blocks\[1\]\)|var\.blocks\.1\.attn.* on .meta)",
        ),
        (
            lambda var: setattr(var.head, "forward", lambda h: 2 * h),
            TypeError,
            r"var\.head must be of type Linear; its forward was replaced on the instance",
        ),
        (
            lambda var: setattr(var.head, "__class__", Doubled),
            TypeError,
            r"var\.head must be of type Linear; got Doubled",
        ),
        (
            lambda var: setattr(var.blocks[1], "__class__", Skipped),
            TypeError,
            r"var\.blocks\[1\] must be of type Block; got Skipped",
        ),
    ],
)
def test_a_changed_part_of_the_transformer_is_named(is_used, change, error, message):
    model = used(small_model(), {}) if is_used else small_model()
    change(model.var)
    with pytest.raises(error, match=rf"^(Engine|VARiant): {message}") as caught:
        images(model)
    assert "\n" not in str(caught.value)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Skipped(Block):
    def compute(self, stream, *_):
        return stream


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (removed("quantize"), TypeError, r"vae\.quantize must be of type MultiScaleQuantizer; it"),
        (removed("quantize.quant_resi"), TypeError, r"vae\.quantize\.quant_resi must be of type"),
        (halved("quantize.embedding"), ValueError, r"the weights of vae must be of one dtype; got"),
        (removed("decoder.conv_out"), TypeError, r"vae\.decoder\.conv_out must be of type Conv2d"),
        (removed("post_quant_conv"), TypeError, r"vae\.post_quant_conv must be of type Conv2d; it"),
        (replaced("decoder"), TypeError, r"vae\.decoder must be of type Decoder; got Identity\."),
    ],
)
def test_a_changed_part_of_the_vqvae_is_named(options, is_used, change, error, message):
    model = used(small_model(), options) if is_used else small_model()
    change(model.vae)
    with pytest.raises(error, match=rf"^Engine: {message}"):
        images(model, **options)


def test_images_need_no_encoder():
    model = small_model()
    expected = images(model)
    for path in ("encoder", "quant_conv"):
        removed(path)(model.vae)
    assert torch.equal(images(model), expected)
    removed("quantize.embedding")(model.vae)
    with pytest.raises(TypeError, match=r"^Engine: vae\.quantize\.embedding must be of type"):
        images(model)


@pytest.mark.parametrize(
    ("options", "is_used"),
    [
        pytest.param({"pack": False}, False, id="own-new"),
        pytest.param({"pack": False}, True, id="own-used", marks=pytest.mark.nightly),
        pytest.param({}, False, id="packed-new", marks=pytest.mark.nightly),
        pytest.param({}, True, id="packed-used"),
        # A used engine of another dtype also had a copy of the part to forget.
        pytest.param(BF16, False, id="bf16-new", marks=pytest.mark.nightly),
        pytest.param(BF16, True, id="bf16-used"),
    ],
)
def test_another_part_of_the_decoder_runs(options, is_used):
    """In the place of a part that the packed decoder replaces by one of its own too."""
    for path in (
        "decoder.conv_in",
        "decoder.mid.block_1",
        "decoder.mid.block_1.conv1",
        "decoder.mid.block_1.norm2",
        "decoder.mid.attn_1",
        "decoder.mid.attn_1.proj_out",
        "decoder.up.1.upsample",
        "decoder.up.1.upsample.conv",
    ):
        for make in (Half, lambda old: nn.Identity(), subclassed, with_hook):
            model = small_model()
            engine = Engine(model.var, model.vae, **options)
            plain = model.vae.decode(TOKENS)
            if is_used:
                engine.decode(TOKENS)
            replaced(path, make)(model.vae)
            try:
                expected = model.vae.decode(TOKENS)
            except TypeError:  # a part without which the decoder does not run
                continue
            effect = float((expected - plain).abs().max()) if expected.shape == plain.shape else 9
            assert effect > 0, (path, make)
            found = engine.decode(TOKENS)
            bound = 0.03 if options == BF16 else 0.2 * effect
            assert float((found - expected).abs().max()) < bound, (path, make)


class Half(Wrapper):
    def __init__(self, inner):
        super().__init__(inner, 0.5)


def subclassed(old):
    """A subclass of the part's class with another forward."""
    kind = type(old)

    class Own(kind):
        def forward(self, x):
            return 0.5 * kind.forward(self, x)

    old.__class__ = Own
    return old


def with_hook(old):
    old.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return old


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def test_convolutions_with_other_settings_run_in_the_packed_decoder():
    for conv in (
        Standardised(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.Conv2d(32, 32, 1, groups=4),
    ):
        model = small_model()
        model.vae.decoder.up[1].upsample.conv = conv
        model.vae.decoder.mid.block_1.conv1 = copy.deepcopy(conv)
        packed = packed_layers.PackedDecoder(model.vae, torch.float32)
        features = torch.randn(2, 8, 3, 3)
        assert torch.allclose(packed(features), model.vae.decode_features(features), atol=1e-5)


def pad_in_circles(model):
    """As for pictures that continue at the opposite side."""
    for conv in model.vae.decoder.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"


def set_all(kind, name, value):
    def change(model):
        for part in (*model.var.modules(), *model.vae.decoder.modules()):
            if isinstance(part, kind):
                setattr(part, name, value)

    return change


SETTINGS = [
    pad_in_circles,
    set_all(nn.GroupNorm, "eps", 0.1),
    set_all(nn.GroupNorm, "num_groups", 16),
    set_all(SelfAttention, "softmax_scale", 0.1),
    set_all(SelfAttention, "attn_l2_norm", False),
]


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("change", SETTINGS)
def test_settings_of_parts_that_change_are_seen(change, options):
    model = gated_model()
    engine = Engine(model.var, model.vae, **options)

    def results():
        return engine.forced_logits(torch.tensor([1]), TOKENS), engine.decode(TOKENS)

    def expected():
        logits = model.var(torch.tensor([1]), model.vae.teacher_input(TOKENS))
        return logits.detach(), model.vae.decode(TOKENS)

    before = results(), expected()
    change(model)
    for found, own, old, old_own in zip(results(), expected(), *before, strict=True):
        effect = float((own - old_own).abs().max())
        bound = max(0.2 * effect, 2 * float((old - old_own).abs().max()))
        assert float((found - own).abs().max()) <= bound
    images = model.generate(LABELS, seed=0, **options).images  # of a new engine
    assert torch.equal(engine.generate(LABELS, seed=0).images, images)


class Counting(nn.Module):
    """A part with a setting, which counts its calls."""

    def __init__(self, inner, gain=1.5):
        super().__init__()
        self.inner, self.gain, self.calls = inner, gain, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.gain * self.inner(*arguments)


@pytest.mark.parametrize("options", [{}, {"pack": False}, BF16], ids=["own", "plain", "bf16"])
def test_a_counter_in_a_part_that_is_called_makes_no_new_weights(options):
    model = gated_model()
    called = ("var.class_emb", "var.lvl_embed", "vae.decoder.mid", "vae.encoder")
    for path in (*called, *(() if casts(options) else ("var.blocks.1.ada_lin",))):
        owner, name = owner_of(model, path)
        setattr(owner, name, Counting(getattr(owner, name)))
    engine = Engine(model.var, model.vae, **options)
    engine.generate(LABELS, seed=0)
    weights, calls = engine._weights(), model.var.class_emb.calls
    size = model.vae.config.image_size
    for path in (None, *called[:3]):
        if path is not None:
            model.get_submodule(path).gain = 0.5
        else:
            model.vae.encode(torch.zeros(1, 3, size, size))
        decode = path in (None, "vae.decoder.mid")
        found = [engine.generate(LABELS, seed=0, decode=decode) for _ in range(2)]
        twin = copy.deepcopy(model)
        expected = Engine(twin.var, twin.vae, **options).generate(LABELS, seed=0)
        assert all(torch.equal(result.tokens, expected.tokens) for result in found), path
        assert not decode or torch.equal(found[1].images, expected.images), path
        assert path is not None or engine._weights() is weights
    assert model.var.class_emb.calls > calls


def test_a_hook_that_counts_on_a_part_that_is_read_makes_no_new_weights():
    model = small_model()
    block = model.var.blocks[1]
    block.calls = 0
    block.register_forward_hook(lambda *_: setattr(block, "calls", block.calls + 1))
    engine = Engine(model.var, model.vae)
    weights, calls = engine._weights(), block.calls
    engine.generate(LABELS, seed=0)
    assert engine._weights() is weights
    assert block.calls == calls > 0


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_parameters_of_any_stride_give_the_same(options):
    model = gated_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    label, words = torch.tensor([1]), model.vae.teacher_input(TOKENS)

    def results():
        engine = Engine(model.var, model.vae, **options)
        own = model.var(label, words).detach(), model.vae.decode(TOKENS)
        return engine.forced_logits(label, TOKENS), engine.decode(TOKENS), *own

    expected = results()
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:  # between numbers that would be noticed
                apart = torch.stack((parameter.detach(), torch.full_like(parameter, 1e30)), -1)
                part._parameters[name] = nn.Parameter(apart[..., 0])
    for found, own in zip(results(), expected, strict=True):
        assert (found - own).abs().max() <= 1e-4 * own.abs().max()


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("part", ["var.head", "vae.decoder.conv_in"])
def test_a_tensor_in_the_place_of_a_parameter_that_changes_is_seen(part, options):
    model = small_model()
    engine, owner = Engine(model.var, model.vae, **options), model.get_submodule(part)
    own = owner.weight.detach()
    engine.generate(LABELS, seed=0)
    del owner.weight
    for change in ("put", "changed in place", "another"):
        if change == "changed in place":
            owner.weight.mul_(1.5)
        else:
            owner.weight = own.clone() if change == "put" else own * 2
        found = engine.generate(LABELS, seed=0)
        expected = Engine(model.var, model.vae, **options).generate(LABELS, seed=0)
        assert torch.equal(found.images, expected.images), change


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("path", ["blocks.1", "head_nm", "config"])
def test_a_setting_that_is_the_configs_is_refused_by_name(path, is_used):
    model = small_model()
    if is_used:
        images(model)
    if path == "config":
        model.var.config = dataclasses.replace(model.var.config, norm_eps=0.5)
        message = r"var\.blocks\[0\]\.norm_eps must be 0\.5, that of var\.config, .*; got 1e-06"
    else:
        model.var.get_submodule(path).norm_eps = 0.5
        message = rf"{readable(path)}\.norm_eps must be 1e-06, that of var\.config, .*; got 0\.5"
    with pytest.raises(ValueError, match=message):
        images(model)


class LabelAttention(nn.Module):
    """A part that the engine calls, with settings of its own."""

    def __init__(self, embedding):
        super().__init__()
        width = embedding.embedding_dim
        self.embedding, self.norm_eps = embedding, 0.5
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, labels):
        x_B1C = self.embedding(labels).unsqueeze(1)
        return x_B1C.add(self.attention(x_B1C, x_B1C, x_B1C)[0]).squeeze(1)


def test_settings_of_a_part_that_is_called_are_its_own():
    model = small_model()
    before = images(model)
    model.var.class_emb = LabelAttention(model.var.class_emb)
    model.var.num_heads = 7  # as the original code has it; nothing reads it
    assert not torch.equal(images(model), before)


@pytest.mark.parametrize(
    "value", [torch.full((2,), 0.5), np.array([0.5, 0.5])], ids=["torch", "np"]
)
def test_several_numbers_in_the_place_of_a_setting_are_seen(value):
    model = small_model()
    block = model.var.blocks[0]
    images(model)
    block.norm_eps, own = value, block.norm_eps
    for _ in range(2):
        with pytest.raises(ValueError, match=r"blocks\[0\]\.norm_eps must be 1e-06, that of var"):
            images(model)
    block.norm_eps = own
    images(model)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.full((2,), 0.5), "large"])
def test_a_softmax_scale_that_is_no_number_is_refused_by_name(value):
    """A tensor may be changed in place, which an engine would not see."""
    model = small_model(zone_weights="copies")
    images(model)
    for part, where in (
        (model.var.blocks[1].attn, r"blocks\[1\]"),
        (model.var.blocks[3].zones["2"].attn, r"blocks\[3\]\.zones\[2\]"),
    ):
        part.softmax_scale, own = value, part.softmax_scale
        for _ in range(2):
            message = rf"Engine: var\.{where}\.attn\.softmax_scale must be one number"
            with pytest.raises(TypeError, match=message):
                images(model)
        part.softmax_scale = own
    images(model)


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
def test_hooks_that_only_look_on_are_no_obstacle_and_others_are_refused(options):
    model = small_model()
    expected = images(model, **options)
    calls = []
    for path in ("blocks.1", "blocks.2.attn.proj", "head", "blocks.1.ada_lin.1"):
        part = model.var.get_submodule(path)
        part.register_forward_hook(lambda *_, path=path: calls.append(path))
    assert torch.equal(images(model, **options), expected)
    assert {"blocks.1", "head"} <= set(calls)
    for path in ("blocks.1", "blocks.2.attn.proj", "head", "head_nm", "word_embed"):
        part = model.var.get_submodule(path)
        handle = part.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(ValueError, match=r"^Engine: forward hooks must not change .*var\.blo"):
            images(model, **options)
        handle.remove()
    assert torch.equal(images(model, **options), expected)


COMPUTED = [
    lambda part: weight_norm(part),
    lambda part: parametrizations.weight_norm(part),
    lambda part: prune.l1_unstructured(part, "weight", 0.5),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("make", COMPUTED)
def test_weights_that_are_computed_follow_those_they_are_made_of(make, options):
    model = used(gated_model(), options)
    part = model.var.blocks[1].attn.proj
    make(part)
    images(model, **options)
    with torch.no_grad():
        next(weight for name, weight in part.named_parameters() if "bias" not in name).mul_(-3)
    found = images(model, **options)
    plain = gated_model()
    with torch.no_grad():
        model.var(torch.tensor([1]), torch.zeros(1, 13, 8))  # computes the weight
        plain.var.blocks[1].attn.proj.weight.copy_(part.weight)
    assert torch.allclose(found, images(plain, **options), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", [packed_layers.PackedDecoder, packed_layers.CastDecoder])
@pytest.mark.parametrize("make", COMPUTED)
def test_weights_of_the_decoder_may_be_computed(make, kind):
    vae, features = small_model().vae, torch.randn(2, 8, 3, 3)
    convs = [vae.decoder.conv_in, vae.decoder.mid.block_1.conv1, vae.decoder.up[1].upsample.conv]
    for conv in convs:
        make(conv)
        with torch.no_grad():
            next(weight for name, weight in conv.named_parameters() if "bias" not in name).mul_(-3)
    kept = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    # Before the first run: the weights that a hook will compute again need a gradient so far.
    bounds = {torch.float32: 1e-4, torch.bfloat16: 0.05}
    if kind is packed_layers.PackedDecoder:
        bounds = {d: bound for d, bound in bounds.items() if can_pack(features.device, d)}
    found = {dtype: kind(vae, dtype)(features) for dtype in bounds}
    expected = vae.decode_features(features)
    for dtype, bound in bounds.items():
        assert float((found[dtype] - expected).abs().max()) < bound
    assert all(torch.equal(kept[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_buffer_and_a_forward_of_the_decoder_that_change_are_seen():
    model = small_model()
    engine, decoder = Engine(model.var, model.vae), model.vae.decoder
    decoder.conv_in = Scaled(decoder.conv_in)
    norms = decoder.mid.block_1.norm1, decoder.mid.block_2.norm1
    norms[0].forward = torch.zeros_like

    def moved():
        del norms[0].forward
        norms[1].forward = torch.zeros_like

    for change in (lambda: decoder.conv_in.scale.mul_(-3), moved):
        before = engine.decode(TOKENS)
        change()
        expected = model.vae.decode(TOKENS)
        assert not torch.allclose(expected, before, atol=0.05)
        assert torch.allclose(engine.decode(TOKENS), expected, atol=1e-3)


class Scaled(Wrapper):
    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.inner(x) * self.scale


def test_hooks_on_zone_weights_are_compared_too():
    for options in ({"zone_weights": "copies"}, {"zone_weights": "lora", "lora_rank": 2}):
        model = small_model(**options)
        zone = model.var.blocks[3].zones["2"]
        part = zone.lora["proj"] if len(zone.lora) else zone.attn.proj
        if len(zone.lora):
            nn.init.normal_(part.lora_B)
        calls = []
        part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        expected = model.generate(LABELS, seed=0, depth=2).images
        assert calls
        handle = part.register_forward_hook(lambda module, inputs, output: 3 * output)
        with pytest.raises(ValueError, match=r"^Engine: forward hooks must not .*zones\.2\."):
            model.generate(LABELS, seed=0, depth=2)
        handle.remove()
        assert torch.equal(model.generate(LABELS, seed=0, depth=2).images, expected)


def test_hooks_that_only_look_on_are_no_obstacle_to_weights_that_diverged():
    model = small_model()
    with torch.no_grad():
        model.var.blocks[1].ffn.fc1.weight[0, 0] = float("nan")
    model.var.head.register_forward_hook(lambda *_: None)
    Engine(model.var, model.vae)
    model.var.head.register_forward_hook(lambda module, inputs, output: (output,))
    with pytest.raises(ValueError, match=r"^Engine: forward hooks must not change .* var\.head"):
        Engine(model.var, model.vae)


def test_parts_are_compared_again_only_where_more_than_values_changed(monkeypatch):
    checked, check = [], cast_models.check_engine_parts
    monkeypatch.setattr(
        cast_models, "check_engine_parts", lambda *args: (checked.append(1), check(*args))
    )
    model = used(small_model(), {})
    assert len(checked) == 1
    with torch.no_grad():
        model.var.head.weight.mul_(2)
    images(model)
    assert len(checked) == 1
    model.var.head.register_forward_hook(lambda *_: None)
    images(model)
    assert len(checked) == 2
    with torch.no_grad():
        model.var.head.weight.mul_(2)
    images(model)
    assert len(checked) == 3
    model.var.head.weight.data = torch.zeros(7, 32)
    with pytest.raises(ValueError, match=r"^Engine: var\.head\.weight must have shape \(24, 32\)"):
        images(model)


class Stop(RuntimeError):
    pass


def test_errors_of_the_callers_own_are_raised_as_they_are():
    """Also in a model with other parts that run."""
    model = small_model()
    wrapped("class_emb", 1.0)(model.var)
    wrapped("decoder.conv_in", 1.0)(model.vae)
    engine = Engine(model.var, model.vae)
    with pytest.raises(ValueError, match=r"^forced_logits: labels must be in \[0, 5\)"):
        engine.forced_logits(torch.tensor([77]), TOKENS)
    with pytest.raises(ValueError, match=r"^decode: tokens_BL must be \(B, 14\); got"):
        engine.decode(TOKENS[:, 1:])

    def on_scale(k, partial):
        if k == 1:
            partial.images()
            raise Stop("mine")

    with pytest.raises(Stop, match=r"^mine$"):
        engine.generate(LABELS, seed=0, on_scale=on_scale)
    with pytest.raises(ValueError, match=r"^generate: on_scale after scale 0: depth must"):
        engine.generate(LABELS, seed=0, on_scale=lambda k, partial: 99)
    del model.vae.decoder.conv_in  # no error of the caller's
    with pytest.raises(TypeError, match=r"^Engine: vae\.decoder\.conv_in must be of type Conv2d"):
        engine.generate(LABELS, seed=0, on_scale=on_scale)


def test_a_parameter_that_views_the_memory_of_the_old_one_is_seen():
    model = used(gated_model(), {})
    weight = model.var.blocks[1].attn.proj.weight
    model.var.blocks[1].attn.proj.weight = nn.Parameter(weight.detach().t())
    found = images(model)
    assert torch.equal(found, images(copy.deepcopy(model)))
    assert not torch.equal(found, images(gated_model()))


@pytest.mark.parametrize("options", [{}, BF16])
def test_a_step_of_a_fused_optimiser_is_seen(options):
    model = used(gated_model(), options)
    weights = [p for p in model.parameters() if p.ndim == 2]
    optimiser = torch.optim.AdamW(weights, lr=0.1, fused=True)  # torch counts no new version
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    found = images(model, **options)
    assert torch.equal(found, images(copy.deepcopy(model), **options))
    assert not torch.equal(found, images(gated_model(), **options))


@pytest.mark.parametrize("options", [{}, BF16])
@torch.inference_mode()
def test_weights_of_inference_mode_that_change_are_seen(options):
    model, other = used(gated_model(), options), small_model(seed=5)
    assert model.var.head.weight.is_inference()
    model.var.load_state_dict(other.var.state_dict())
    found = model.engine(**options).forced_logits(torch.tensor([1]), TOKENS)
    fresh = Engine(other.var, model.vae, **options)
    assert torch.equal(found, fresh.forced_logits(torch.tensor([1]), TOKENS))


@pytest.mark.parametrize("options", [{}, BF16])
def test_new_weights_at_the_address_of_the_old_ones_are_seen(options):
    model = gated_model()
    weight = model.var.blocks[1].attn.proj.weight
    memory = weight.detach().numpy().copy()
    weight.data = torch.from_numpy(memory)
    used(model, options)
    weight.data = torch.empty(0)  # as it is freed to make room
    memory *= -3
    weight.data = torch.from_numpy(memory)
    found = images(model, **options)
    assert torch.equal(found, images(copy.deepcopy(model), **options))
    assert not torch.equal(found, images(gated_model(), **options))


def test_a_layer_in_anothers_place_may_be_of_torchs_class():
    model = small_model()
    expected = images(model)
    proj = model.var.blocks[1].attn.proj
    plain = nn.Linear(32, 32)
    plain.load_state_dict(proj.state_dict())
    model.var.blocks[1].attn.proj = plain
    assert torch.equal(images(model), expected)
    plain.forward = torch.compile(plain.forward, backend="eager")
    assert torch.equal(images(model), expected)


def test_a_compiled_part_is_refused_with_the_remedy():
    model = used(small_model(), {})
    model.var.blocks[1] = torch.compile(model.var.blocks[1], backend="eager")
    with pytest.raises(TypeError, match=r"blocks\[1\] must be of type Block; it is compiled by"):
        images(model)


@pytest.mark.parametrize("name", ["var", "vae"])
def test_another_model_in_a_supernet_is_taken_or_refused(name):
    model, other = used(small_model(), {}), small_model(seed=1)
    setattr(model, name, getattr(other, name))
    expected = images(copy.deepcopy(model))
    assert torch.equal(images(model), expected)
    assert not torch.equal(expected, images(small_model()))
    setattr(model, name, nn.Identity())
    with pytest.raises(TypeError, match=rf"^VARiant: {name} must be of type \w+; got Identity"):
        images(model)
    delattr(model, name)
    with pytest.raises(TypeError, match=rf"^VARiant: {name} must be of type \w+; got None"):
        images(model)


@pytest.mark.parametrize(("name", "kind"), [("var", "VAR"), ("vae", "VQVAE")])
def test_another_model_in_an_engine_is_refused(name, kind):
    model = small_model()
    engine = Engine(model.var, model.vae)
    for other, came in ((nn.Identity(), "Identity"), (None, "None")):
        setattr(engine, name, other)
        with pytest.raises(TypeError, match=rf"^Engine: {name} must be of type {kind}; got {came}"):
            engine.generate(LABELS, seed=0)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_method_that_is_passed_by_is_refused_by_name(is_used):
    model = small_model()
    if is_used:
        used(model, {})
    attn = model.var.blocks[1].attn
    method = next(n for n, v in vars(type(attn)).items() if callable(v) and n[:2] != "__")
    setattr(attn, method, getattr(attn, method))
    with pytest.raises(TypeError, match=rf"attn must be of .*its {method} was replaced on"):
        images(model)
    delattr(attn, method)
    images(model)
    model.vae.decode = model.vae.decode
    with pytest.raises(TypeError, match=r"Engine: vae\.decode must be that of VQVAE, .* replaced"):
        images(model)
    del model.vae.decode
    images(model)


@pytest.mark.parametrize("options", [{}, BF16], ids=["own", "bf16"])
@pytest.mark.parametrize("is_used", [False, True])
def test_methods_of_the_vqvae_that_an_engine_calls_count(options, is_used):
    model = small_model()
    expected = images(model, **options)
    if not is_used:
        model = small_model()
    plain = model.vae.decode_features
    model.vae.decode_features = lambda f_hat_BCHW: plain(f_hat_BCHW) / 2
    torch.testing.assert_close(images(model, **options), expected / 2, rtol=0.02, atol=0.004)
    torch.testing.assert_close(
        model.engine(**options).decode(TOKENS), model.vae.decode(TOKENS), rtol=1e-4, atol=1e-4
    )

    class Darker(type(model.vae)):
        def decode_features(self, f_hat_BCHW):
            return super().decode_features(f_hat_BCHW) / 4

    del model.vae.decode_features
    model.vae.__class__ = Darker
    torch.testing.assert_close(images(model, **options), expected / 4, rtol=0.02, atol=0.004)
    model.vae.__class__ = Darker.__mro__[1]
    contribution = model.vae.quantize.contribution
    model.vae.quantize.contribution = lambda tokens_BN, k: 0 * contribution(tokens_BN, k)
    gray = model.vae.decode_features(model.vae.new_features(2))
    torch.testing.assert_close(images(model, **options), gray, rtol=0.02, atol=0.02)
