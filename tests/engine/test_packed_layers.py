"""Packed products and convolutions against the layers that they replace."""

import copy

import pytest
import torch
from small_models import small_model
from torch import nn
from torch.nn import functional as F

from variant.engine import packed_layers
from variant.engine.engine import Engine
from variant.engine.packed_layers import (
    CastBuffer,
    CastDecoder,
    Linear,
    MergedUpsample,
    PackedConv2d,
    PackedDecoder,
)
from variant.models.vqvae import ResidualBlock, Upsample
from variant_kernels.packed_linear import can_pack

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def packs(dtype):
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN has no native {dtype} here")
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 24), (1, 130, 40), (700, 16)])
def test_a_packed_linear_is_as_near_to_float64_as_a_plain_one(shape, gelu, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(56, shape[-1]) / shape[-1] ** 0.5, torch.randn(56)
    weight, bias, x = weight.to(dtype), bias.to(dtype), torch.randn(shape).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    plain = Linear(weight, bias, dtype, packed=False, gelu=gelu)(x)
    ours = Linear(weight, bias, dtype, packed=packs(dtype), gelu=gelu)(x)
    assert ours.dtype == dtype
    assert ours.shape == expected.shape
    allowed = 2 * (plain.double() - expected).abs().max() + torch.finfo(dtype).eps
    assert (ours.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("width", [8, 24, 64, 1024])
def test_weights_packed_through_one_cast_buffer_keep_their_own_values(width):
    packs(torch.bfloat16)
    torch.manual_seed(0)
    cast_buffer = CastBuffer(torch.bfloat16)
    weights, bias = torch.randn(2, width, width), torch.zeros(width)
    x = torch.randn(3, width).bfloat16()
    linears = [
        Linear(w, bias, torch.bfloat16, packed=True, cast_buffer=cast_buffer)
        for w in weights.unbind(0)
    ]
    for linear, weight in zip(linears, weights, strict=True):
        assert torch.equal(linear(x), Linear(weight, bias, torch.bfloat16, packed=True)(x))
    channels = min(width, 64)
    convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    image = torch.randn(1, channels, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    packed = [PackedConv2d(conv, cast_buffer) for conv in convs]
    for one, conv in zip(packed, convs, strict=True):
        assert torch.equal(one(image), PackedConv2d(conv, CastBuffer(torch.bfloat16))(image))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (4, 7)])
def test_a_merged_upsample_equals_the_upsample(shape):
    torch.manual_seed(0)
    upsample = Upsample(6)
    x = torch.randn(2, 6, *shape)
    merged = MergedUpsample(upsample.conv, torch.float32)(x)
    torch.testing.assert_close(merged, upsample(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_packed_decoder_decodes_as_the_model_does(batch):
    vae = small_model().vae
    before = copy.deepcopy(vae.state_dict())
    f_hat = torch.randn(batch, 8, 3, 3)
    packs(torch.float32)
    images = PackedDecoder(vae, torch.float32)(f_hat)
    torch.testing.assert_close(images, vae.decode_features(f_hat), atol=1e-5, rtol=0)
    # The model itself is as it was: same modules, same tensors, still trainable.
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())
    assert any(isinstance(module, nn.Conv2d) for module in vae.decoder.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in vae.parameters())


def test_the_bfloat16_decoder_is_as_near_as_autocast():
    packs(torch.bfloat16)
    vae = small_model().vae
    f_hat = torch.randn(4, 8, 3, 3)
    expected = copy.deepcopy(vae).double().decode_features(f_hat.double())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = vae.decode_features(f_hat).double()
    ours = PackedDecoder(vae, torch.bfloat16)(f_hat).double()
    assert (ours - expected).abs().max() <= 2 * (autocast - expected).abs().max() + 2**-8
    assert (ours - expected).abs().mean() <= 2 * (autocast - expected).abs().mean()


def test_packing_is_reported_and_can_be_turned_off():
    packs(torch.float32)
    model = small_model()
    results = {
        pack: Engine(model.var, model.vae, pack=pack).generate([1, 2], top_k=1)
        for pack in (True, False)
    }
    assert {pack: result.stats.packed for pack, result in results.items()} == {
        True: True,
        False: False,
    }
    assert torch.equal(results[True].tokens, results[False].tokens)
    torch.testing.assert_close(results[True].images, results[False].images, atol=1e-5, rtol=0)


def test_the_engine_repacks_a_changed_decoder():
    packs(torch.float32)
    model = small_model()
    engine = Engine(model.var, model.vae)
    before = engine.generate([1], seed=0)
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.add_(0.25)
    after = engine.generate([1], seed=0)
    assert torch.equal(before.tokens, after.tokens)
    assert not torch.equal(before.images, after.images)


def test_the_mlp_in_parts_equals_the_whole_mlp(monkeypatch):
    packs(torch.float32)
    model = small_model()
    whole = Engine(model.var, model.vae).forced_logits([1, 2, 3], torch.zeros(3, 14).long())
    monkeypatch.setattr("variant.engine.weights.MLP_TOKENS", 4)
    parts = Engine(model.var, model.vae).forced_logits([1, 2, 3], torch.zeros(3, 14).long())
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)


def test_a_cast_decoder_is_as_near_as_the_model_in_that_dtype():
    model = small_model()
    f_hat = torch.randn(2, model.vae.config.z_channels, 3, 3)
    before = copy.deepcopy(model.vae.state_dict())
    exact = copy.deepcopy(model.vae).double().decode_features(f_hat.double())
    plain = copy.deepcopy(model.vae).bfloat16().decode_features(f_hat.bfloat16())
    ours = CastDecoder(model.vae, torch.bfloat16)(f_hat)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps
    assert (ours.double() - exact).abs().max() <= allowed
    after = model.vae.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # a copy was cast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_whose_norms_keep_channels_last_is_the_same(monkeypatch, dtype):
    """On a GPU the norms are kernels of ours; here their definition."""
    model, generator = small_model(), torch.Generator().manual_seed(0)
    f_hat = torch.randn(2, 8, 3, 3, generator=generator)
    plain = CastDecoder(model.vae, dtype)
    monkeypatch.setattr(packed_layers, "keeps_channels_last", lambda device, dtype: True)
    ours = CastDecoder(model.vae, dtype)
    norms = [m for m in ours.layers.modules() if isinstance(m, packed_layers.ChannelsLastNorm)]
    assert len(norms) == sum(isinstance(m, nn.GroupNorm) for m in plain.layers.modules())
    assert not any(isinstance(m, nn.GroupNorm) for m in ours.layers.modules())
    assert sum(norm.silu for norm in norms) == 2 * sum(
        isinstance(m, packed_layers.ResidualBlock) for m in plain.layers.modules()
    )
    layouts = []
    for norm in norms:
        norm.register_forward_hook(
            lambda module, x, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    exact = model.vae.double().decode_features(f_hat.double())
    errors = [(decoder(f_hat).double() - exact).abs().max() for decoder in (ours, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6
    assert layouts == [True] * len(norms)


def test_the_decoder_of_a_cpu_keeps_torchs_norms():
    assert not packed_layers.keeps_channels_last(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "own", "of_kernel_3"),
    [
        ({}, True, True),
        ({"bias": False}, True, True),
        ({"stride": 2}, True, False),
        ({"stride": (1, 2)}, True, False),
        ({"dilation": 2}, True, False),
        ({"padding": 0}, True, False),
        ({"padding": (1, 0)}, True, False),
        ({"kernel_size": 1}, True, False),
        ({"kernel_size": (3, 5)}, True, False),
        ({"groups": 2}, True, False),
        ({"padding": "same"}, False, False),
        ({"padding_mode": "reflect"}, False, False),
    ],
)
def test_convolutions_that_are_taken_for_those_of_the_model(options, own, of_kernel_3):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1} | options)
    assert packed_layers._is_own_conv(conv) is own
    assert packed_layers._is_own_conv(conv, kernel=3) is of_kernel_3
    for other in (None, nn.Linear(2, 2)):
        assert not packed_layers._is_own_conv(other)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, packed_layers.PackedPointwise),
        ({"bias": False}, packed_layers.PackedPointwise),
        ({"stride": 2}, packed_layers.PackedConv2d),
        ({"padding": 1}, packed_layers.PackedConv2d),
        ({"groups": 2}, packed_layers.PackedConv2d),
        ({"kernel_size": 3, "dilation": 2, "bias": False}, packed_layers.PackedConv2d),
        ({"kernel_size": 3, "padding": 1}, packed_layers.PackedConv2d),
        ({"padding_mode": "reflect", "padding": 1}, nn.Conv2d),
    ],
)
def test_a_packed_convolution_is_the_convolution(options, kind):
    packs(torch.float32)
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{"kernel_size": 1} | options)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv(x)
        packed = packed_layers._pack(conv, packed_layers.CastBuffer(torch.float32))
        assert type(packed) is kind
        torch.testing.assert_close(packed(x), expected)


@pytest.mark.parametrize("part", ["norm1", "norm2", "conv1", "conv2", "nin_shortcut"])
def test_a_block_with_another_part_keeps_its_own_forward(part):
    class Own(nn.Module):
        def forward(self, x):
            return x

    block = ResidualBlock(32, 64)
    assert packed_layers._is_own_block(block)
    assert packed_layers._is_own_block(ResidualBlock(32, 32))  # its shortcut is the identity
    for other in (Own(), None):
        block._modules[part] = other
        assert not packed_layers._is_own_block(block)
    assert not packed_layers._is_own_block(nn.Identity())


def test_one_buffer_holds_the_cast_of_the_last_weight():
    cast = packed_layers.CastBuffer(torch.float16)
    same = torch.ones(3, dtype=torch.float16)
    assert cast(same).data_ptr() == same.data_ptr()
    first = cast(torch.arange(6.0).view(2, 3))
    assert (first.dtype, first.tolist()) == (torch.float16, [[0, 1, 2], [3, 4, 5]])
    second = cast(torch.full((2, 2), 7.0))
    assert second.data_ptr() == first.data_ptr()
    assert first.tolist() == [[7, 7, 7], [7, 4, 5]]
    assert cast(torch.zeros(6)).data_ptr() == first.data_ptr()
    assert cast(torch.zeros(7)).data_ptr() != first.data_ptr()


def test_a_linear_layer_shares_a_weight_of_its_dtype():
    weight, bias = torch.randn(8, 4), torch.randn(8)
    plain = packed_layers.Linear(weight, bias, torch.float32, packed=False)
    cast = packed_layers.Linear(weight, bias, torch.bfloat16, packed=False)
    assert plain.shares(weight)
    assert not plain.shares(weight.clone())
    assert not cast.shares(weight)
    assert (plain.num_bytes, cast.num_bytes) == (8 * 4 * 4, 8 * 4 * 2)
    packed = packed_layers.Linear(weight, bias, torch.float32, packed=packs(torch.float32))
    assert not packed.shares(weight)
    assert packed(torch.ones(2, 3, 4)).shape == plain(torch.ones(2, 3, 4)).shape == (2, 3, 8)


def test_a_plain_linear_layer_has_the_tanh_form_of_gelu():
    weight, bias, x = torch.randn(8, 4), torch.randn(8), torch.randn(2, 3, 4)
    expected = F.linear(x, weight, bias)
    plain = packed_layers.Linear(weight, bias, torch.float32, packed=False)
    torch.testing.assert_close(plain(x), expected)
    gelu = packed_layers.Linear(weight, bias, torch.float32, packed=False, gelu=True)
    torch.testing.assert_close(gelu(x), F.gelu(expected, approximate="tanh"))
    # torch's fused form, which a GPU takes; on a CPU it may be the exact one.
    gelu._epilogue = True
    assert gelu(x).shape == (2, 3, 8)
    torch.testing.assert_close(gelu(x), F.gelu(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_the_form_of_a_fused_gelu_is_found_by_trying(monkeypatch, form):
    def fused(bias, x, weight, *, use_gelu):
        assert use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate=form)

    monkeypatch.setattr(torch.ops.aten, "_addmm_activation", fused)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert packed_layers.computes_tanh(CPU, dtype) is (form == "tanh")


def test_a_merged_upsample_may_have_no_bias():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    x = torch.randn(1, 3, 4, 5)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    with torch.no_grad():
        torch.testing.assert_close(MergedUpsample(conv, torch.float32)(x), expected)


def test_convolutions_of_a_cast_decoder_have_channels_last():
    layers = CastDecoder(small_model().vae, torch.bfloat16).layers
    weights = [weight for weight in layers.parameters() if weight.ndim == 4]
    assert weights
    for weight in weights:
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_upsample_is_merged_with_a_convolution_of_its_own_alone():
    packs(torch.float32)
    upsample, buffer = Upsample(4), CastBuffer(torch.float32)
    assert type(packed_layers._pack(copy.deepcopy(upsample), buffer)) is MergedUpsample
    upsample.conv = nn.Conv2d(4, 4, 1)
    assert type(packed_layers._pack(upsample, buffer)) is Upsample


def test_the_fused_form_is_tried_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(packed_layers, "computes_tanh", lambda device, dtype: True)
    fused = packed_layers.fused_gelu.__wrapped__
    assert fused(torch.device("cuda"), torch.float16) is True
    assert fused(CPU, torch.float16) is False


def test_what_a_gpu_alone_has_is_not_used_on_a_cpu():
    assert packed_layers.fused_gelu(torch.device("cpu"), torch.float32) is False
    assert not packed_layers.keeps_channels_last(torch.device("cpu"), torch.float32)
