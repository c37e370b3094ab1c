"""Changed parts of VAR and VQVAE: a call names the part, or runs right."""

import copy
import pickle

import pytest
import torch
from changed_parts import halved, removed, replaced, wrapped
from small_models import small_model
from torch import nn
from torch.nn.utils import parametrizations

from variant import VAR
from variant.checkpoints.original_var import save_original
from variant.models.parts import changes_of, expected_model

LABELS = torch.tensor([1, 2])
TOKENS = torch.randint(24, (2, 14), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
X = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(2))


def forward(var, **options):
    with torch.no_grad():
        return var(LABELS, X, **options)


def raises(error, op, message):
    return pytest.raises(error, match=rf"^{op}: {message}")


VAR_PARTS = [
    (removed("head"), TypeError, r"var\.head must be of type Linear; it was removed"),
    (removed("head_nm"), TypeError, r"var\.head_nm must be of type HeadNorm; it was removed"),
    (removed("word_embed"), TypeError, r"var\.word_embed must be of type Linear; it was rem"),
    (removed("class_emb"), TypeError, r"var\.class_emb must be of type Embedding; it was rem"),
    (removed("pos_start"), TypeError, r"var\.pos_start must be a tensor of shape \(1, 1, 32\)"),
    (removed("blocks"), TypeError, r"var\.blocks must be of type ModuleList; it was removed"),
    (removed("blocks.1.ada_lin"), TypeError, r"var\.blocks\[1\]\.ada_lin must be of type Seq"),
    (removed("blocks.1.attn.proj"), TypeError, r"var\.blocks\[1\]\.attn\.proj must be of type L"),
    (removed("blocks.1.attn.mat_qkv"), TypeError, r"var\.blocks\[1\]\.attn\.mat_qkv must be"),
    (removed("blocks.1.attn.q_bias"), TypeError, r"var\.blocks\[1\]\.attn\.q_bias must be a tens"),
    (removed("blocks.1.ffn"), TypeError, r"var\.blocks\[1\]\.ffn must be of type MLP; it was"),
    (replaced("blocks.1"), TypeError, r"var\.blocks\[1\] must be of type Block; got Identity"),
    (replaced("blocks.1.ffn.fc1"), TypeError, r"var\.blocks\[1\]\.ffn\.fc1 must be of type Linear"),
    (
        replaced("head", lambda old: nn.Linear(16, 24)),
        ValueError,
        r"var\.head\.weight must have shape \(24, 32\); got \(24, 16\)\. The call failed with Runt",
    ),
    (
        halved("blocks.1"),
        ValueError,
        r"the weights of var must be of one dtype; got 12 of float16 ",
    ),
    (halved("head"), ValueError, r".*got 2 of float16 \(var\.head\) among 56 of float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), VAR_PARTS)
def test_a_part_by_which_the_forward_pass_fails_is_named(change, error, message):
    var = small_model().var
    change(var)
    with raises(error, r"VAR\.forward", message) as caught:
        forward(var)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda var: var.blocks.__delitem__(3),
        lambda var: setattr(var, "blocks", var.blocks[:3]),
        lambda var: var.blocks.append(copy.deepcopy(var.blocks[0])),
    ],
)
@pytest.mark.parametrize("depth", [None, 2])
def test_another_number_of_layers_is_refused(change, depth):
    var = small_model().var
    change(var)
    message = r"var\.blocks must have 4 layers, as var\.config says; got [35]\."
    with raises(ValueError, r"VAR\.forward", message):
        forward(var, schedule=var.schedule(depth))
    with raises(ValueError, r"VAR\.forward", message):
        forward(var, targets_BL=TOKENS)


def test_parts_that_the_forward_pass_calls_may_be_others():
    expected = forward(small_model().var)
    for path in (
        "head",
        "blocks.1.attn.proj",
        "blocks.1.attn.mat_qkv",
        "blocks.1.ffn",
        "class_emb",
    ):
        var = small_model().var
        wrapped(path, 1.0)(var)
        assert torch.allclose(forward(var), expected, atol=1e-4), path
    doubled = small_model().var
    wrapped("head", 2.0)(doubled)
    assert torch.equal(forward(doubled), 2 * expected)


def test_an_error_that_no_part_causes_is_raised_as_it_is():
    var = small_model().var
    for error in (RuntimeError("mine"), KeyError("mine"), torch.OutOfMemoryError("mine")):

        def fail(*_, error=error):
            raise error

        hook = var.head.register_forward_hook(fail)
        with pytest.raises(type(error)) as caught:
            forward(var)
        assert caught.value is error
        hook.remove()
    with pytest.raises(ValueError, match=r"^VAR\.forward: labels_B must be in \[0, 5\]; got 9$"):
        var(torch.tensor([9, 1]), X)


ALL = ("encode", "teacher_input", "decode", "decode_by_scale", "forward")
BACK = ("teacher_input", "decode", "decode_by_scale", "forward")
INTO = ("encode", "forward")
OUT = ("decode", "decode_by_scale", "forward")
VAE_PARTS = [
    (removed("quantize"), ALL, TypeError, r"vae\.quantize must be of type MultiScaleQuantizer; it"),
    (removed("quantize.embedding"), ALL, TypeError, r"vae\.quantize\.embedding must be of type Em"),
    (removed("quantize.quant_resi"), ALL, TypeError, r"vae\.quantize\.quant_resi must be of type"),
    (replaced("quantize.quant_resi"), ALL, TypeError, r"vae\.quantize\.quant_resi must be .*Ident"),
    (halved("quantize.embedding"), ALL, ValueError, r".*one dtype; got 1 of float16 \(vae\.quant"),
    (removed("encoder"), INTO, TypeError, r"vae\.encoder must be of type Encoder; it was removed"),
    (removed("encoder.conv_in"), INTO, TypeError, r"vae\.encoder\.conv_in must be of type Conv2d"),
    (
        replaced("encoder.conv_in"),
        INTO,
        TypeError,
        r"vae\.encoder\.conv_in must be .*; got Identity",
    ),
    (halved("encoder.mid"), INTO, ValueError, r".*of float16 \(vae\.encoder\.mid\) among "),
    (removed("quant_conv"), INTO, TypeError, r"vae\.quant_conv must be of type Conv2d; it was rem"),
    (removed("decoder"), OUT, TypeError, r"vae\.decoder must be of type Decoder; it was removed"),
    (removed("decoder.up.1.upsample"), OUT, TypeError, r"vae\.decoder\.up\[1\]\.upsample must be"),
    (
        removed("decoder.mid.block_1.conv1"),
        OUT,
        TypeError,
        r"vae\.decoder\.mid\.block_1\.conv1 must",
    ),
    (
        removed("post_quant_conv"),
        OUT,
        TypeError,
        r"vae\.post_quant_conv must be of type Conv2d; it",
    ),
    (halved("decoder.mid"), OUT, ValueError, r".*of float16 \(vae\.decoder\.mid"),
]


@pytest.mark.parametrize(("change", "methods", "error", "message"), VAE_PARTS)
def test_a_part_by_which_a_method_of_the_vqvae_fails_is_named(change, methods, error, message):
    vae = small_model().vae
    expected = results(vae)
    change(vae)
    for name in ALL:
        if name in methods:
            with raises(error, rf"VQVAE\.{name}", message) as caught, torch.no_grad():
                call(vae, name)
            assert "\n" not in str(caught.value)
        else:  # its half of the VQ-VAE is whole
            with torch.no_grad():
                assert all(map(torch.equal, call(vae, name), expected[name])), name


def call(vae, name):
    if name == "decode_by_scale":
        return list(vae.decode_by_scale(TOKENS))
    given = {"encode": IMAGES, "forward": IMAGES}.get(name, TOKENS)
    result = getattr(vae, name)(given)
    return result if isinstance(result, tuple) else [result]


@torch.no_grad()
def results(vae):
    return {name: call(vae, name) for name in ALL}


@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}])
@pytest.mark.parametrize("zones", [{}, {"zone_weights": "lora", "lora_rank": 2}])
def test_an_unchanged_model_has_no_change(options, zones):
    model = small_model(**options, **zones)
    state = torch.get_rng_state()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half()):
        assert changes_of(other) == []
    for part in (model.var, model.vae):
        expected = expected_model(part)
        assert all(tensor.is_meta for tensor in expected.parameters())
        assert expected.state_dict().keys() == part.state_dict().keys()
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"


def test_subclasses_and_parts_of_torch_are_no_change():
    class Own(VAR):
        pass

    class OwnEmbedding(nn.Embedding):
        pass

    model = small_model()
    var = Own(model.var.config)
    var.class_emb = OwnEmbedding(6, 32)
    var.blocks[0].attn.proj = nn.Linear(32, 32)
    var.blocks[0].ffn.fc1 = parametrizations.weight_norm(nn.Linear(32, 128))
    assert changes_of(var) == []
    var.blocks[0].attn.mat_qkv = nn.Linear(32, 96)
    assert [change.text for change in changes_of(var)] == [
        "var.blocks[0].attn.mat_qkv.bias must be None; got Parameter of shape (96,) torch.float32"
    ]


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("var", removed("head_nm"), TypeError, r"var\.head_nm must be of type HeadNorm; it was r"),
        ("var", wrapped("head"), TypeError, r"var\.head must be of type Linear; got Wrapper"),
        ("var", replaced("head_nm.ada_lin.0"), TypeError, r"var\.head_nm\.ada_lin\[0\] must be of"),
        ("vae", removed("encoder"), TypeError, r"vae\.encoder must be of type Encoder; it was rem"),
        ("vae", wrapped("decoder.mid"), TypeError, r"vae\.decoder\.mid must be of type _Middle"),
        (
            "vae",
            replaced("quant_conv", lambda old: nn.Conv2d(8, 8, 1)),
            ValueError,
            r"vae\.quant_conv\.weight must have shape \(8, 8, 3, 3\); got \(8, 8, 1, 1\)",
        ),
        (
            "var",
            lambda var: parametrizations.weight_norm(var.head),
            ValueError,
            r"var has a weight that its config does not ask for, 'head\.parametrizations\.weight",
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(
    part, change, error, message, tmp_path
):
    model = small_model()
    change(getattr(model, part))
    with raises(error, "save_pretrained", message):
        model.save_pretrained(tmp_path / "m")
    with raises(error, "save_original", message):
        save_original(model.var, model.vae, tmp_path / "var.pth", tmp_path / "vae.pth")
    assert list(tmp_path.iterdir()) == []
