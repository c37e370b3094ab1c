"""``accelerate``: what the objects tell is used, what changes later is followed or refused."""

import copy
import functools
import math
import pickle

import pytest
import torch
from lookalike_var import LookalikeCoDe, LookalikeVAR, lookalike
from lookalike_vqvae import lookalike_vqvae
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

import variant
from variant import accelerate
from variant.errors import UserError
from variant.models.quantizer import MultiScaleQuantizer
from variant.models.vqvae import VQVAE
from variant_kernels import patch

LABELS = torch.tensor([1, 3])
TOKENS = torch.randint(24, (2, 14), generator=torch.Generator().manual_seed(0))


def pair(kind=LookalikeVAR, vae=None, **options):
    model = lookalike(kind, sides=(1, 2, 3), vocab=24, depth=3, **options)
    return model, lookalike_vqvae(**(vae or {}))


def words_of(vae):
    """The teacher's input of TOKENS, by the live quantiser."""
    quantize, f_hat, words = vae.quantize, 0, []
    parts = TOKENS.split([side * side for side in quantize.v_patch_nums], dim=1)
    for k, part in enumerate(parts[:-1]):
        f_hat = f_hat + quantize.contribution(part, k)
        side = quantize.v_patch_nums[k + 1]
        small = nn.functional.interpolate(f_hat, size=(side, side), mode="area")
        words.append(small.flatten(2).mT)
    return torch.cat(words, 1)


def assert_equal_now(model, vae, ours, tolerance=1e-5):
    with torch.no_grad():
        expected = model(LABELS, words_of(vae))
    logits = ours.engine().forced_logits(LABELS, TOKENS)
    assert (logits - expected).abs().max() <= 10 * tolerance * expected.abs().max()
    images = ours.engine().decode(TOKENS)
    assert (images - vae.decode(TOKENS)).abs().max() <= tolerance


# --- what the objects tell -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1, 2, 4])
@pytest.mark.parametrize("quant_resi", [0.5, 0.25, 1.0, 0, -0.5])
def test_the_quantisers_settings_are_those_of_the_object(quant_resi, share):
    znorm = quant_resi in (0.25, -0.5)
    settings = {
        "quant_resi": quant_resi,
        "share_quant_resi": share,
        "using_znorm": znorm,
        "beta": 0.7,
    }
    model, vae = pair(vae=settings)
    ours = accelerate(model, vae)
    assert_equal_now(model, vae, ours)
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(ours.vae.encode(images), vae.encode(images))
    config = ours.vae.config
    assert config.quant_resi == abs(quant_resi)
    assert (config.using_znorm, config.beta) == (znorm, 0.7)
    assert not any(parameter.requires_grad for parameter in ours.vae.parameters())
    assert all(parameter.requires_grad for parameter in ours.var.parameters())


def test_a_ratio_changed_on_the_convolutions_themselves_is_used():
    model, vae = pair()
    for conv in vae.quantize.quant_resi.qresi_ls:
        conv.resi_ratio = 0.125
    assert_equal_now(model, vae, accelerate(model, vae))
    vae.quantize.quant_resi.qresi_ls[0].resi_ratio = 0.5
    with pytest.raises(UserError, match=r"one quant_resi; got \[0.125, 0.5\]"):
        accelerate(model, vae)


def test_the_transformers_settings_are_those_of_the_object():
    model, vae = pair(LookalikeCoDe, shared_aln=True, attn_l2_norm=False, heads=4)
    for norm in (*(block.ln_wo_grad for block in model.blocks), model.head_nm.ln_wo_grad):
        norm.eps = 1e-2
    model.cond_drop_rate, model.drop_path_rate = 0.3, 0.2
    ours = accelerate(model, vae)
    config = ours.var.config
    assert (config.norm_eps, config.num_heads) == (1e-2, 4)
    assert (config.cond_drop_rate, config.drop_path_rate) == (0.3, 0.2)
    assert_equal_now(model, vae, ours)
    model.blocks[1].ln_wo_grad.eps = 1e-6
    with pytest.raises(UserError, match="one eps of the layer norms; got"):
        accelerate(model, vae)


@pytest.mark.parametrize(("heads", "width"), [(8, 64), (2, 40)])
def test_heads_that_the_kernels_lack_are_refused_in_plain_words(heads, width):
    model, vae = pair(heads=heads, width=width)
    with pytest.raises(UserError) as caught:
        accelerate(model, vae)
    text = str(caught.value)
    assert "heads of a multiple of 8 from 16 to 256" in text
    assert f"found {heads} heads of {width // heads}" in text
    assert "is not a VAR" not in text


def spoil_scale(model, vae):
    model.blocks[1].attn.scale = 0.3


def spoil_bound(model, vae):
    model.blocks[1].attn.max_scale_mul = 3.0


def spoil_activation(model, vae):
    model.blocks[1].ffn.act = nn.ReLU()


def spoil_instance(model, vae):
    old = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda *args, **options: 2 * old(*args, **options)


def spoil_hook(model, vae):
    model.blocks[1].ln_wo_grad.register_forward_hook(lambda module, args, output: 2 * output)


def spoil_head(model, vae):
    model.head.register_forward_hook(lambda module, args, output: 2 * output)


def spoil_embedding(model, vae):
    model.word_embed.forward = lambda x: nn.functional.linear(x, model.word_embed.weight)


def spoil_decoder(model, vae):
    vae.post_quant_conv.register_forward_hook(lambda module, args, output: 2 * output)


def spoil_norm(model, vae):
    next(m for m in vae.modules() if isinstance(m, nn.GroupNorm)).eps = 1e-3


def spoil_sides(model, vae):
    vae.quantize.v_patch_nums = (1, 2, 4)


def spoil_meta(model, vae):
    model.to("meta")


def spoil_meta_vae(model, vae):
    vae.decoder.conv_in.to("meta")


def spoil_weight(model, vae):
    parametrizations.weight_norm(model.blocks[1].attn.proj)


def spoil_compiled(model, vae):
    model.blocks[1].ffn = torch.compile(model.blocks[1].ffn, backend="eager")


def spoil_logits(model, vae):
    old = model.get_logits
    model.get_logits = lambda x, cond: old(x, cond) / 2


def spoil_subclass(model, vae):
    class Cooler(type(model)):
        def get_logits(self, x, cond_BD):
            return super().get_logits(x, cond_BD) / 2

    model.__class__ = Cooler


def spoil_pixels(model, vae):
    vae.fhat_to_img = lambda f_hat: -old(f_hat)
    old = type(vae).fhat_to_img.__get__(vae)


def spoil_next_input(model, vae):
    quantize, old = vae.quantize, vae.quantize.get_next_autoregressive_input
    quantize.get_next_autoregressive_input = lambda *args: old(*args)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_scale, "attn.scale must be 1; got 0.3"),
        (spoil_bound, r"blocks\[1\].attn.max_scale_mul must be log 100; found 3.0"),
        (spoil_activation, "var does not run as the original code does"),
        (spoil_instance, r"blocks\[1\].attn has hooks or another forward: .* a difference of"),
        (spoil_hook, r"blocks\[1\].ln_wo_grad has hooks or another forward"),
        (spoil_head, r"var does not run .*head has hooks"),
        (spoil_embedding, "word_embed has hooks or another forward"),
        (spoil_decoder, r"vae does not run .*post_quant_conv has hooks"),
        (spoil_norm, "group norms must have eps 1e-06; got 0.001"),
        (spoil_sides, r"the same patch_nums; got \(1, 2, 3\) and \(1, 2, 4\)"),
        (spoil_meta, r"var: pos_start is on the meta device; load the weights first"),
        (spoil_meta_vae, r"vae: decoder.conv_in.weight is on the meta device"),
        (spoil_weight, r"blocks\[1\].attn.proj has parametrizations; remove_parametrizations"),
        (spoil_compiled, r"blocks\[1\].ffn is compiled by torch.compile"),
        (spoil_logits, r"var\.get_logits was replaced on the instance"),
        (spoil_subclass, r"var\.get_logits is that of Cooler, which overrides that of Lookalike"),
        (spoil_pixels, r"vae\.fhat_to_img was replaced on the instance"),
        (spoil_next_input, r"vae\.quantize\.get_next_autoregressive_input was replaced"),
    ],
)
def test_what_the_engine_would_ignore_is_refused_by_name(spoil, message):
    model, vae = pair()
    spoil(model, vae)
    before = [(type(m), dict(vars(m))) for m in (*model.modules(), *vae.modules())]
    with pytest.raises(UserError, match=message) as caught:
        accelerate(model, vae)
    assert "\n" not in str(caught.value)
    after = [(type(m), dict(vars(m))) for m in (*model.modules(), *vae.modules())]
    for (kind, members), (old_kind, old) in zip(after, before, strict=True):
        assert kind is old_kind
        assert list(members) == list(old)
        assert all(members[name] is value for name, value in old.items())


def own_pair():
    """An original transformer beside a VQ-VAE of ours."""
    model, vae = pair()
    ours = VQVAE(accelerate(model, vae).vae.config)
    ours.load_state_dict(vae.state_dict(), strict=False)
    return model, ours


def replace(path, name):
    """Replaces a method on an instance by one that does the same."""

    def change(model, vae):
        module = {"var": model, "vae": vae}[path.split(".")[0]]
        for part in path.split(".")[1:]:
            module = getattr(module, part)
        setattr(module, name, functools.partial(getattr(module, name)))

    return change


class Darker(VQVAE):
    def decode_features(self, f_hat_BCHW):
        return super().decode_features(f_hat_BCHW) / 2


class Nearer(MultiScaleQuantizer):
    def nearest(self, vectors_RC):
        return super().nearest(vectors_RC) * 0


def swap_vae(model, vae):
    vae.__class__ = Darker


def swap_quantizer(model, vae):
    vae.quantize.__class__ = Nearer


OWN_METHODS = [
    (replace("vae", "decode"), r"vae\.decode was replaced on the instance.*del vae\.decode\)"),
    (replace("vae", "accumulate"), r"vae\.accumulate was replaced"),
    (replace("vae.quantize", "contribution"), r"vae\.quantize\.contribution was replaced"),
    (replace("vae.quantize", "_through_scale"), r"vae\.quantize\._through_scale was replaced"),
    (swap_vae, r"vae\.decode_features is that of Darker, which overrides that of VQVAE"),
    (swap_quantizer, r"vae\.quantize\.nearest is that of Nearer, which overrides"),
]


@pytest.mark.parametrize(("change", "message"), OWN_METHODS)
@pytest.mark.parametrize("before", [True, False])
def test_methods_of_our_own_vqvae_that_would_be_passed_by_are_refused(change, message, before):
    model, vae = own_pair()
    ours = None if before else accelerate(model, vae)
    change(model, vae)
    for _ in range(2):
        with pytest.raises(UserError, match=f"^accelerate: {message}"):
            (ours or accelerate(model, vae)).generate([1], seed=0)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("var", "autoregressive_infer_cfg"),
        ("vae", "decode"),
        ("vae.quantize", "contribution"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_any_method_replaced_on_an_original_is_refused(path, name, before):
    model, vae = pair()
    ours = None if before else accelerate(model, vae)
    replace(path, name)(model, vae)
    with pytest.raises(UserError, match=f"{path}.{name} was replaced on the instance"):
        (ours or accelerate(model, vae)).generate([1], seed=0)


def test_what_training_calls_may_be_replaced_or_overridden():
    model, vae = own_pair()
    expected = accelerate(model, vae).generate([1], seed=0).tokens

    class Trained(VQVAE):
        def forward(self, images_BIYX, num_scales=None):
            raise AssertionError("a generation trains")

    vae.__class__ = Trained
    model.forward = vae.quantize.forward = lambda *args: pytest.fail("a generation trains")
    assert accelerate(model, vae).generate([1], seed=0).tokens.equal(expected)


def test_hooks_that_only_look_on_are_no_obstacle():
    model, vae = pair()
    model.blocks[1].register_forward_hook(lambda module, args, output: None)
    assert_equal_now(model, vae, accelerate(model, vae))


def test_a_compiled_model_is_unwrapped_and_other_wrappers_are_refused():
    model, vae = pair()
    ours = accelerate(torch.compile(model, backend="eager"), torch.compile(vae, backend="eager"))
    assert_equal_now(model, vae, ours)
    with pytest.raises(UserError, match=r"var is wrapped in DataParallel; give var\.module"):
        accelerate(nn.DataParallel(model), vae)
    with pytest.raises(UserError, match=r"vae is wrapped in DataParallel; give vae\.module"):
        accelerate(model, nn.DataParallel(vae))
    with pytest.raises(TypeError, match="var must be of type Module"):
        accelerate("var.pth", vae)


def test_a_patched_model_keeps_its_depth_and_statistics():
    model, vae = pair()
    with patch(model, depth=2, bridge=1) as handle:
        model.autoregressive_infer_cfg(2, LABELS)
        stats = handle.stats()
        ours = accelerate(model, vae)
        assert handle.stats() is stats
        model.autoregressive_infer_cfg(2, LABELS)
        assert handle.stats().depths == stats.depths
    assert_equal_now(model, vae, ours)


# --- changes -------------------------------------------------------------------------------------


def new_state(model, factor):
    return {
        name: value * factor if value.is_floating_point() and value.isfinite().all() else value
        for name, value in model.state_dict().items()
    }


def by_assignment(model):
    model.load_state_dict(new_state(model, 0.5), assign=True)


def by_loading(model):
    model.load_state_dict(new_state(model, 0.5))


def by_casts(model):
    model.half().float()
    model.load_state_dict(new_state(model, 0.5))


def by_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def by_swaps(model):
    """Two averages in turn, whose memory may be that of the weights before."""
    for _ in range(3):
        by_data(model)


def by_deletion(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                setattr(module, name, nn.Parameter(parameter.detach() * 0.5))


CHANGES = [by_assignment, by_loading, by_casts, by_data, by_swaps, by_deletion]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_followed_at_the_next_call(change, patched, held):
    model, vae = pair()
    handle = patch(model) if patched else None
    ours = accelerate(model, vae)
    engine = ours.engine()
    first = engine.forced_logits(LABELS, TOKENS)
    for part in (model, vae):
        change(part)
    if handle is not None:
        handle.unpatch()
    if held:
        assert (engine.forced_logits(LABELS, TOKENS) - first).abs().max() > 1e-3
    assert_equal_now(model, vae, ours, tolerance=1e-5)
    for name, parameter in ours.var.named_parameters():
        assert parameter is model.get_parameter(name)


def test_training_the_original_is_followed():
    model, vae = pair()
    ours = accelerate(model, vae)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(LABELS, words_of(vae)).square().mean().backward()
        optimizer.step()
        assert_equal_now(model, vae, ours)


def test_a_change_of_dtype_is_followed():
    model, vae = pair()
    ours = accelerate(model, vae)
    model.bfloat16()
    assert ours.engine().dtype == torch.bfloat16
    assert ours.engine().forced_logits(LABELS, TOKENS).isfinite().all()
    model.float()
    assert_equal_now(model, vae, ours)
    ours.to(torch.float64).to(torch.float32)
    assert model.head.weight.dtype == torch.float32
    assert_equal_now(model, vae, ours)


def replace_head(model, vae):
    model.head = nn.Linear(64, 24)


def replace_block(model, vae):
    model.blocks[1] = copy.deepcopy(model.blocks[0])


def parametrise(model, vae):
    parametrizations.weight_norm(model.blocks[1].ffn.fc1)


def to_meta(model, vae):
    model.blocks[2].to("meta")


def other_shape(model, vae):
    model.head.weight.data = torch.zeros(24, 32)


def other_setting(model, vae):
    vae.quantize.using_znorm = True


def other_eps(model, vae):
    for norm in (*(block.ln_wo_grad for block in model.blocks), model.head_nm.ln_wo_grad):
        norm.eps = 1e-2


def weights_of_a_norm(model, vae):
    model.head_nm.ln_wo_grad.weight = nn.Parameter(torch.full((64,), 2.0))


def bias_of_a_block(model, vae):
    model.blocks[1].attn.mat_qkv.bias = nn.Parameter(torch.ones(192))


def other_codebook(model, vae):
    vae.quantize.embedding = nn.Embedding(24, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_head, r"var\.head is another module now"),
        (replace_block, r"var\.blocks\[1\] is another module now"),
        (parametrise, r"var\.blocks\[1\]\.ffn\.fc1\.weight is no parameter any more"),
        (to_meta, r"var\.blocks\[2\]\.\S+ is on the meta device now"),
        (other_shape, r"var\.head\.weight has shape \(24, 32\) now, not \(24, 64\)"),
        (other_setting, "vae: using_znorm is True now, not False"),
        (other_eps, "var: norm_eps is 0.01 now, not 1e-06"),
        (weights_of_a_norm, "var: layer norms must have no weight"),
        (bias_of_a_block, r"var\.blocks\[1\]\.attn\.mat_qkv\.bias is a parameter now"),
        (other_codebook, r"vae\.quantize\.embedding is another module now"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name_at_the_next_call(change, message):
    model, vae = pair()
    ours = accelerate(model, vae)
    engine = ours.engine()
    change(model, vae)
    for call in (
        lambda: engine.forced_logits(LABELS, TOKENS),
        lambda: engine.generate([1], seed=0),
        lambda: ours.generate([1], seed=0),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_copies_pickles_and_files_have_weights_of_their_own(tmp_path):
    model, vae = pair()
    ours = accelerate(model, vae)
    expected = ours.engine().forced_logits(LABELS, TOKENS)
    others = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    engine = pickle.loads(pickle.dumps(ours.engine()))
    ours.save_pretrained(tmp_path / "model")
    others.append(variant.VARiant.from_pretrained(tmp_path / "model"))
    by_data(model)
    assert (ours.engine().forced_logits(LABELS, TOKENS) - expected).abs().max() > 1e-3
    for other in others:
        assert type(other) is variant.VARiant
        assert torch.equal(other.engine().forced_logits(LABELS, TOKENS), expected)
    assert torch.equal(engine.forced_logits(LABELS, TOKENS), expected)


# --- code that changes later ---------------------------------------------------------------------


def add_hook(model, vae):
    model.blocks[0].attn.proj.register_forward_hook(lambda module, inputs, output: output * 2)


def add_pre_hook(model, vae):
    model.blocks[1].ffn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def replace_forward(model, vae):
    ffn = model.blocks[0].ffn
    ffn.forward = functools.partial(lambda forward, x: 2 * forward(x), ffn.forward)


def replace_activation(model, vae):
    model.blocks[0].ffn.act = nn.ReLU()


def append_block(model, vae):
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def hook_decoder(model, vae):
    vae.decoder.register_forward_hook(lambda module, inputs, output: output / 2)


def pad_in_circles(model, vae):
    for conv in vae.decoder.modules():
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = "circular"


def group_otherwise(model, vae):
    for norm in vae.decoder.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = 16


def other_bound(model, vae):
    """Without effect until a scale has grown beyond it."""
    for block in model.blocks:
        block.attn.max_scale_mul = math.log(50)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (add_hook, "var does not run.*blocks\\[0\\].attn.proj has hooks"),
        (add_pre_hook, "var does not run.*blocks\\[1\\].ffn has hooks"),
        (replace_forward, "var does not run.*blocks\\[0\\].ffn has hooks or another forward"),
        (replace_activation, "var does not run"),
        (append_block, "var does not run"),
        (hook_decoder, "vae does not run.*decoder has hooks"),
        (spoil_logits, r"var\.get_logits was replaced on the instance"),
        (spoil_subclass, r"var\.get_logits is that of Cooler"),
        (spoil_pixels, r"vae\.fhat_to_img was replaced on the instance"),
        (spoil_next_input, r"vae\.quantize\.get_next_autoregressive_input was replaced"),
        (pad_in_circles, "vae does not run as the original code does"),
        (group_otherwise, "vae does not run as the original code does"),
        (other_bound, r"var .*blocks\[0\]\.attn\.max_scale_mul must be log 100; found 3\.9"),
    ],
)
def test_code_that_changes_after_accelerate_is_refused(change, name):
    model, vae = pair()
    ours = accelerate(model, vae)
    ours.generate([1], seed=0)
    change(model, vae)
    for _ in range(2):
        with pytest.raises(UserError, match=name):
            ours.generate([1], seed=0)


def test_hooks_that_change_nothing_and_a_patch_may_come_after_accelerate():
    model, vae = pair()
    ours, seen = accelerate(model, vae), []
    model.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(1))
    assert_equal_now(model, vae, ours)
    seen.clear()
    with patch(model):
        assert_equal_now(model, vae, ours)
    assert_equal_now(model, vae, ours)
    compared = len(seen)
    ours.generate([1], seed=0)
    assert len(seen) == compared  # only a change makes the comparison run again


def test_hooks_of_every_module_that_come_later_are_followed_or_refused():
    model, vae = pair()
    ours = accelerate(model, vae)
    expected = ours.generate([1], seed=0)
    block, norm = type(model.blocks[0]), nn.GroupNorm

    def scaled(kind):
        return lambda part, inputs, output: 1.5 * output if isinstance(part, kind) else None

    for kind in (block, nn.Linear):
        handle = register_module_forward_hook(scaled(kind))
        with pytest.raises(UserError, match=r"accelerate: var does .*; hooks of every module"):
            ours.generate([1], seed=0)
        handle.remove()
    handle = register_module_forward_hook(scaled(norm))
    assert_equal_now(model, vae, ours)
    assert (ours.generate([1], seed=0).images - expected.images).abs().max() > 0.05
    handle.remove()
    assert ours.generate([1], seed=0).images.equal(expected.images)
    calls = []
    handle = register_module_forward_hook(lambda *_: calls.append(1))
    assert ours.generate([1], seed=0).images.equal(expected.images)
    handle.remove()
