"""Zone weights: a subnet's own weights on flexible tokens, over an unchanged full network."""

import pytest
import torch
from small_models import small_model
from torch.nn import functional as F
from zone_models import KINDS, LABELS, VARIATIONS, full_network, teacher_input, zone_model

from variant.models.config import VARConfig
from variant.models.parameter_count import var_parameters, zone_parameters
from variant.models.zones import (
    LayerView,
    freeze_full_network,
    reset_zone_weights,
    spans_of,
)
from variant.models.zones import zone_parameters as zone_tensors
from variant_kernels import DepthSchedule, patch
from variant_kernels.integrations import PatchError


def merged(model, depth):
    """The same with every layer of one subnet replaced by its zone weights."""
    var = full_network(model)
    for layer in model.var.config.subnets[depth]:
        view = LayerView(model.var.layers()[layer], depth)
        block = var.layers()[layer]
        with torch.no_grad():
            for name in ("mat_qkv", "proj", "fc1", "fc2"):
                linear = getattr(block.attn if name in ("mat_qkv", "proj") else block.ffn, name)
                linear.weight.copy_(view.linear(name)[0])
                if name != "mat_qkv":
                    linear.bias.copy_(view.linear(name)[1])
            for name in ("q_bias", "v_bias", "scale_mul_1H11"):
                if name in dict(block.attn.named_parameters()):
                    getattr(block.attn, name).copy_(getattr(view.attn, name))
            if view.has_adaln and block.shared_aln:
                block.ada_gss.copy_(view.own.ada_gss)
            elif view.has_adaln:
                block.ada_lin.load_state_dict(view.own.ada_lin.state_dict())
    return var


@pytest.mark.parametrize("options", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_new_zone_weights_change_nothing(kind, options):
    model = small_model(**KINDS[kind], **options)
    with torch.no_grad():
        for weight in model.var.blocks.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    reset_zone_weights(model.var)
    x_teacher, _ = teacher_input(model)
    shared = full_network(model)
    for depth in (None, 2, 3):
        schedule = shared.schedule(depth)
        torch.testing.assert_close(
            model.var(LABELS, x_teacher, schedule),
            shared(LABELS, x_teacher, schedule),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("options", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_depth_never_uses_zone_weights(kind, options):
    model = zone_model(kind, **options)
    x_teacher, _ = teacher_input(model)
    shared = full_network(model)
    for schedule in (None, shared.schedule(None), shared.schedule([0, 1, 3], 1)):
        expected = shared(LABELS, x_teacher, schedule)
        assert torch.equal(model.var(LABELS, x_teacher, schedule), expected)
    assert not torch.equal(model.var(LABELS, x_teacher, shared.schedule(2)), expected)


@pytest.mark.parametrize("options", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_bridge_a_subnet_is_the_network_of_its_zone_weights(kind, options):
    """All tokens use the zone weights then, so that one merged network computes the same."""
    model = zone_model(kind, **options)
    x_teacher, _ = teacher_input(model)
    for depth in (2, 3):
        schedule = model.var.schedule(depth, 0)
        logits_BLV = model.var(LABELS, x_teacher, schedule)
        expected = merged(model, depth)(LABELS, x_teacher, schedule)
        torch.testing.assert_close(logits_BLV, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bridge_tokens_are_those_of_the_full_network(kind):
    model = zone_model(kind)
    x_teacher, _ = teacher_input(model)
    full = model.var(LABELS, x_teacher)
    for bridge in (1, 2):
        tokens = sum(model.var.layout.tokens[:bridge])
        logits_BLV = model.var(LABELS, x_teacher, model.var.schedule(2, bridge))
        torch.testing.assert_close(logits_BLV[:, :tokens], full[:, :tokens], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits_BLV[:, tokens:], full[:, tokens:], atol=1e-2)


def test_every_scale_uses_the_zone_weights_of_its_own_layers():
    model = zone_model("copies")
    config = model.var.config
    schedule = DepthSchedule.from_depths([4, [0, 2, 3], [0, 3]])
    assert [(span.first, span.last, span.zone) for span in spans_of(config, schedule)] == [
        (0, 0, None),
        (1, 1, 3),
        (2, 2, 2),
    ]
    x_teacher, _ = teacher_input(model)
    before = model.var(LABELS, x_teacher, schedule)
    first, last = (model.var.layout.slice(k) for k in (1, 2))
    for depth, changed in ((3, first), (2, last)):
        with torch.no_grad():
            for block in model.var.layers():
                if str(depth) in block.zones:
                    block.zones[str(depth)].ffn.fc2.bias.add_(1)
        after = model.var(LABELS, x_teacher, schedule)
        assert not torch.allclose(after[:, changed], before[:, changed], atol=1e-2)
        assert torch.equal(after[:, : changed.start], before[:, : changed.start])
        before = after


@pytest.mark.parametrize("kind", KINDS)
def test_only_zone_weights_of_the_depth_get_gradients(kind):
    model = zone_model(kind)
    freeze_full_network(model.var)
    x_teacher, tokens_BL = teacher_input(model)
    logits_BLV = model.var(LABELS, x_teacher, model.var.schedule(2))
    F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten()).backward()
    reached = {name for name, p in model.var.named_parameters() if p.grad is not None}
    own = {name for name, _ in model.var.named_parameters() if ".zones.2." in name}
    assert reached == own
    with pytest.raises(ValueError, match="var must have zone weights"):
        freeze_full_network(small_model().var)


def test_gradients_equal_those_of_the_merged_network():
    """Of copies, without a bridge: the network of the copies has the same gradients."""
    model = zone_model("copies", subnets={2: (0, 3)})
    freeze_full_network(model.var)
    expected = merged(model, 2)
    x_teacher, tokens_BL = teacher_input(model)
    schedule = model.var.schedule(2, 0)
    for var in (model.var, expected):
        loss = F.cross_entropy(var(LABELS, x_teacher, schedule).flatten(0, 1), tokens_BL.flatten())
        loss.backward()
    for layer in (0, 3):
        for name, weight in model.var.layers()[layer].zones["2"].named_parameters():
            same = expected.layers()[layer].get_parameter(name)
            torch.testing.assert_close(weight.grad, same.grad, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_drops_branches_of_the_flexible_zone_alone():
    model = zone_model("copies")
    x_teacher, _ = teacher_input(model)
    schedule = model.var.schedule(2)
    scales_N2B = torch.zeros(4, 2, len(LABELS))
    kept = model.var(LABELS, x_teacher, schedule)
    dropped = model.var(LABELS, x_teacher, schedule, branch_scales_N2B=scales_N2B)
    assert torch.equal(dropped[:, :1], kept[:, :1])
    assert not torch.allclose(dropped[:, 1:], kept[:, 1:], atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_from_the_config(kind, options):
    var = small_model(**KINDS[kind], **options).var
    assert var_parameters(var.config) == sum(p.numel() for p in var.parameters())
    own = sum(zone_parameters(var.config, depth) for depth in var.config.subnets)
    assert own == sum(p.numel() for p in zone_tensors(var)) > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"zone_weights": "all"}, ValueError, "zone_weights must be one of 'shared', 'adaln'"),
        ({"zone_weights": 3}, TypeError, "zone_weights must be one of"),
        ({"zone_weights": "lora"}, ValueError, "lora_rank must be at least 1, such as 16"),
        ({"zone_weights": "lora", "lora_rank": 33}, ValueError, r"lora_rank must be .* \[0, 32\]"),
        ({"zone_weights": "copies", "lora_rank": 2}, ValueError, "lora_rank must be 0 with"),
        ({"lora_rank": 2}, ValueError, 'lora_rank must be 0 with zone_weights "shared"; got 2'),
        ({"zone_weights": "copies", "zone_adaln": False}, ValueError, 'needs zone_weights "lora"'),
        ({"zone_weights": "lora", "lora_rank": 2, "zone_adaln": 1}, TypeError, "zone_adaln must"),
        ({"zone_weights": "copies", "subnets": {}}, ValueError, "need subnets"),
        ({"zone_weights": "copies", "subnets": {4: (0, 1, 2, 3)}}, ValueError, "fewer layers"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, error, message):
    with pytest.raises(error, match=f"^VARConfig: .*{message}"):
        small_model(**options)


def test_a_config_of_zone_weights_is_read_back_and_an_old_one_is_shared():
    config = small_model(**KINDS["lora"]).var.config
    values = config.to_dict()
    assert VARConfig.from_dict(values) == config
    for name in ("zone_weights", "lora_rank", "zone_adaln"):
        del values[name]
    assert VARConfig.from_dict(values).zone_weights == "shared"


def test_patch_refuses_zone_weights_by_name():
    with pytest.raises(PatchError, match=r"blocks\[0\] has zone weights: .*nothing has been ch"):
        patch(small_model(**KINDS["lora"]).var)
