"""The VQ-VAE against outputs of the original VAR code; rare options and bad arguments."""

import dataclasses

import pytest
import torch
from golden_models import NAMES, load_golden
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from variant.models.config import VARConfig, VQVAEConfig
from variant.models.quantizer import residual_conv_of_scale
from variant.models.vqvae import VQVAE

SMALL = VQVAEConfig(
    vocab_size=16, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=(1, 2, 4)
)


def build(name):
    golden = load_golden(name)
    model = VQVAE(golden.vae_config).eval()
    model.load_state_dict(golden.vae_state, strict=True)
    return model, golden


def small(**changes):
    torch.manual_seed(0)
    model = VQVAE(dataclasses.replace(SMALL, **changes))
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_original_keys_and_shapes(name):
    golden = load_golden(name)
    own = {key: list(value.shape) for key, value in VQVAE(golden.vae_config).state_dict().items()}
    assert own == golden.json["vae_state"]


@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_the_original_tokens(name):
    model, golden = build(name)
    tokens = model.encode(golden.tensors["image_in"].float())
    assert torch.equal(tokens, golden.tensors["image_tokens"])


@pytest.mark.parametrize("name", NAMES)
def test_teacher_input_matches_the_original(name):
    model, golden = build(name)
    x_teacher = model.teacher_input(golden.tensors["tokens_in"])
    assert x_teacher.dtype == torch.float32
    torch.testing.assert_close(x_teacher, golden.tensors["x_teacher"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["full", "subnet"])
def test_decode_gives_the_original_images(name, which):
    model, golden = build(name)
    images = model.decode(golden.tensors[f"greedy_tokens_{which}"])
    expected = golden.tensors[f"greedy_image_{which}"].float()
    # Stored in float16: half a unit in the last place below 1 is 2.4e-4.
    torch.testing.assert_close(images, expected, rtol=0, atol=2.6e-4)


def test_stepwise_calls_give_what_the_whole_calls_give():
    model, golden = build("shared_aln")
    tokens = golden.tensors["tokens_in"]
    f_hat = model.new_features(tokens.shape[0])
    inputs = []
    for k in range(model.layout.num_scales):
        returned = model.accumulate(f_hat, tokens[:, model.layout.slice(k)], k)
        assert returned is f_hat
        if k + 1 < model.layout.num_scales:
            inputs.append(model.next_scale_input(f_hat, k))
    assert torch.equal(torch.cat(inputs, dim=1), model.teacher_input(tokens))
    assert torch.equal(model.decode_features(f_hat), model.decode(tokens))
    by_scale = list(model.decode_by_scale(tokens))
    assert len(by_scale) == model.layout.num_scales
    assert torch.equal(by_scale[-1], model.decode(tokens))


class Convolutions(TorchDispatchMode):
    """Notes the flags of each convolution; None where torch's global settings decide."""

    def __init__(self):
        super().__init__()
        self.flags = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            self.flags.append(args[9:] if func is torch.ops.aten._convolution.default else None)
        return func(*args, **(kwargs or {}))


def test_the_feature_map_is_accumulated_without_tf32_whatever_torch_allows(monkeypatch):
    """cuDNN takes TF32 by default, and tokens drawn from the feature map would differ by device."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    vae, tokens = small(), torch.randint(0, 16, (2, 21))
    f_hat = vae.new_features(2)
    with torch.no_grad(), Convolutions() as seen:
        for k in range(3):
            vae.accumulate(f_hat, tokens[:, vae.layout.slice(k)], k)
        vae.teacher_input(tokens)
        vae.quantize.encode(torch.randn(2, 4, 4, 4))
    benchmark_deterministic_enabled_tf32 = (False, True, True, False)
    assert seen.flags == [benchmark_deterministic_enabled_tf32] * (3 + 2 + 3)
    assert torch.backends.cudnn.allow_tf32  # of other threads


def test_the_convolution_without_tf32_is_torchs_own():
    conv, x = small().quantize.quant_resi[0], torch.randn(2, 4, 4, 4)
    with_gradient = conv(x)
    with torch.no_grad():
        assert torch.equal(conv(x), with_gradient)
        assert conv.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("way", ["setting", "method"])
def test_a_changed_padding_holds_with_and_without_gradients(way):
    """The two ways in which images are made to repeat seamlessly."""
    conv, x = small().quantize.quant_resi[0], torch.randn(2, 4, 4, 4)
    if way == "setting":
        conv.padding_mode = "circular"
    else:
        conv._conv_forward = lambda x, weight, bias: F.conv2d(
            F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
        )
    padded = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
    expected = x * (1 - conv.ratio) + padded * conv.ratio
    torch.testing.assert_close(conv(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected)


def test_four_convolutions_are_shared_by_ten_scales_as_in_trained_checkpoints():
    assert residual_conv_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert residual_conv_of_scale(7, 7) == (0, 1, 2, 3, 4, 5, 6)
    assert residual_conv_of_scale(1, 4) == (0,)


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_way_of_sharing_and_channel_count_round_trips_in_shape(share, channels):
    model = small(share_quant_resi=share, in_channels=channels)
    images = torch.rand(2, channels, 8, 8) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 21)
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


@pytest.mark.parametrize("changes", [{"quant_resi": 0.0}, {"using_znorm": True}])
def test_rare_options_work(changes):
    model = small(**changes)
    assert model.decode(model.encode(torch.zeros(1, 3, 8, 8))).shape == (1, 3, 8, 8)


def test_a_single_scale_divides_nothing_by_zero():
    model = small(patch_nums=(4,))
    tokens = model.encode(torch.zeros(2, 3, 8, 8))
    assert model.teacher_input(tokens).shape == (2, 0, 4)
    assert torch.isfinite(model.decode(tokens)).all()
    assert torch.isfinite(model(torch.zeros(2, 3, 8, 8))[1])


def test_encode_takes_the_nearest_code_of_the_residual():
    model = small()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = model.encode(images)
    rest = model.features(images) - sum(
        model.quantize.contribution(tokens[:, model.layout.slice(k)], k) for k in range(2)
    )
    vectors = rest.permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(vectors.double(), model.quantize.embedding.weight.double()).argmin(dim=1)
    assert torch.equal(tokens[:, model.layout.slice(2)].flatten(), nearest)


def test_gradient_passes_straight_through_the_quantiser():
    model = small()
    features = torch.randn(2, 4, 4, 4, requires_grad=True)
    quantised, _, _ = model.quantize(features)
    upstream = torch.randn_like(quantised)
    (gradient,) = torch.autograd.grad(quantised, features, upstream)
    assert torch.equal(gradient, upstream)


def test_quantisation_loss_moves_the_codes_and_the_encoder():
    model = small()
    _, loss, usage = model(torch.rand(2, 3, 8, 8) * 2 - 1)
    loss.backward()
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert usage.shape == (3,)
    assert (usage > 0).all()


def test_the_quantisation_loss_has_the_gradient_of_its_two_sides():
    """Numerically: both sides of each scale are the squared distance of f and f_hat.

    beta times its gradient is that of the features (commitment), once its gradient that of the
    codes and convolutions. Float64 but for the features, whose steps float32 holds exactly.
    """
    torch.manual_seed(4)
    quantizer = small().quantize.double().eval()
    beta, step = quantizer.config.beta, 2.0**-9
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
    f = (torch.randn(2, 4, 4, 4) * 64).round() / 64
    f.requires_grad_()
    weights = [quantizer.embedding.weight, *quantizer.quant_resi.parameters()]
    gradients = torch.autograd.grad(quantizer(f)[1], [f, *weights], allow_unused=True)
    tokens = quantizer.encode(f.detach())

    @torch.no_grad()
    def numerical(tensor, place):
        values = []
        for sign in (1, -1):
            tensor.view(-1)[place] += sign * step
            assert quantizer.encode(f.detach()).equal(tokens), "a code has changed"
            values.append(quantizer(f)[1].item())
            tensor.view(-1)[place] -= sign * step
        return (values[0] - values[1]) / (2 * step)

    for tensor, gradient, side in zip(
        (f.data, *weights), gradients, [beta] + [1] * len(weights), strict=True
    ):
        if gradient is None:  # of a convolution that serves no scale
            continue
        places = range(0, tensor.numel(), max(1, tensor.numel() // 16))
        wanted = [numerical(tensor, place) * side / (1 + beta) for place in places]
        found = [gradient.flatten()[place].item() for place in places]
        assert found == pytest.approx(wanted, abs=1e-6)
        assert max(map(abs, found)) > 1e-3


def test_a_state_of_another_number_of_scales_loads():
    state = small().state_dict()
    model = small(patch_nums=(1, 2, 3, 4))
    model.load_state_dict(state, strict=True)
    assert model.quantize.ema_vocab_hit_SV.shape == (4, 16)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 8, 8), r"images must be .* with B >= 1; got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 9), r"images must be \(B, 3, 8, 8\) .*; got \(1, 3, 8, 9\)"),
        (torch.zeros(3, 8, 8), r"images must be \(B, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point; got torch.uint8"),
        (torch.full((1, 3, 8, 8), 2.0), r"in \[-1, 1\]; got values from 2 to 2"),
        (torch.full((1, 3, 8, 8), torch.nan), r"in \[-1, 1\]"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        small().encode(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 20, dtype=torch.int64), r"tokens must be \(B, 21\); got \(1, 20\)"),
        (torch.full((1, 21), 16), r"tokens must be in \[0, 16\); got values from 16 to 16"),
        (torch.full((1, 21), -1), r"tokens must be in \[0, 16\)"),
        (torch._neg_view(torch.ones(1, 21, dtype=torch.int64)), r"must be in \[0, 16\); .* -1 to"),
        (torch.zeros(1, 21), "int64 or int32; got torch.float32"),
    ],
)
@pytest.mark.parametrize("method", ["decode", "decode_by_scale", "teacher_input"])
def test_wrong_tokens_are_refused(method, tokens, message):
    with pytest.raises(ValueError, match=message):
        getattr(small(), method)(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 48}, "multiple of 32, the groups of the group normalisation; got '48 \\* 1'"),
        ({"in_channels": 2}, "in_channels must be 1 or 3; got 2"),
        ({"patch_nums": (2, 1)}, r"patch_nums must be ascending positive integers; got \(2, 1\)"),
        ({"quant_conv_ks": 2}, "quant_conv_ks must be odd"),
        ({"vocab_size": 0}, "vocab_size must be an integer in \\[1, 16777216\\]; got 0"),
    ],
)
def test_wrong_vae_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_a_boolean_is_no_number_of_channels():
    with pytest.raises(TypeError, match="VQVAEConfig: in_channels must be an integer"):
        VQVAEConfig(vocab_size=8, z_channels=4, ch=32, in_channels=True)


def test_configs_round_trip_through_plain_values():
    golden = load_golden("plain")
    assert VQVAEConfig.from_dict(golden.vae_config.to_dict()) == golden.vae_config
    plain = golden.var_config.to_dict()
    assert plain["subnets"] == {"3": [0, 3, 5]}
    assert VARConfig.from_dict(plain) == golden.var_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depht": 3}, "VARConfig: depht: unknown key"),
        ({"depth": "deep"}, "VARConfig: depth: .*integer.*; got 'deep'"),
        ({"num_heads": 3}, "embed_dim / num_heads must be a multiple of 8"),
        ({"subnets": {"2": [0, 3, 5]}}, r"subnets\[2\] must list 2 layers; got \(0, 3, 5\)"),
        (
            {"subnets": {"3": [0, 3, 5], "03": [0, 2, 5]}},
            r"VARConfig: subnets\.03.*in plain digits; got '03'",
        ),
        ({"subnets": {"3": [0, 3, 4]}}, r"must start with 0 and end with 5"),
        ({"bridge": 8}, r"bridge must be an integer in \[0, 7\]; got 8"),
        ({"cond_drop_rate": 1.5}, r"cond_drop_rate must be a finite number in \[0, 1\]; got 1.5"),
    ],
)
def test_wrong_plain_values_are_refused_in_one_line(changes, message):
    plain = load_golden("plain").var_config.to_dict() | changes
    with pytest.raises(ValueError, match=message) as caught:
        VARConfig.from_dict(plain)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("using_znorm", [False, True])
def test_autocast_does_not_reach_the_quantizer(using_znorm):
    """Codes that bfloat16 cannot tell apart; training, encoding and decoding agree."""
    torch.manual_seed(0)
    config = VQVAEConfig(
        vocab_size=64,
        z_channels=4,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        patch_nums=(1, 2, 4),
        using_znorm=using_znorm,
    )
    quantizer = VQVAE(config).quantize
    torch.nn.init.normal_(quantizer.embedding.weight, 5.0, 0.01)
    features = 5 + 0.01 * torch.randn(8, 4, 4, 4)

    def results():
        found = features.clone().requires_grad_()
        f_hat, loss, usage = quantizer(f_BCHW=found)
        loss.backward()
        tokens = quantizer.encode(features)
        return f_hat, loss, usage, tokens, quantizer.contribution(tokens[:, :1], 0), found.grad

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for value, wanted in zip(results(), expected, strict=True):
            assert torch.equal(value, wanted)
