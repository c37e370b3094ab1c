"""The engine with zone weights: equal to the training path, and as fast and large as it says."""

import pytest
import torch
from zone_models import KINDS, LABELS, VARIATIONS, full_network, teacher_input, zone_model

from variant.engine.engine import Engine
from variant.engine.planning import merged_zone_bytes
from variant.models.zones import LayerView
from variant.supernet import VARiant


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", VARIATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_forced_logits_equal_the_forward_pass(kind, options, backend):
    model = zone_model(kind, **options)
    x_teacher, tokens_BL = teacher_input(model)
    engine = Engine(model.var, model.vae, backend=backend, page_size=5)
    for depth, bridge in ((None, None), (2, None), (3, 2), (2, 0), ([0, 1, 3], 1)):
        logits_BLV = engine.forced_logits(LABELS, tokens_BL, depth=depth, bridge=bridge)
        expected = model.var(LABELS, x_teacher, model.var.schedule(depth, bridge))
        torch.testing.assert_close(logits_BLV, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_greedy_tokens_equal_the_forward_pass(kind):
    model = zone_model(kind)
    result = model.generate(LABELS, depth=2, cfg=0, top_k=1, seed=0, log_probs=True)
    x_teacher = model.vae.teacher_input(result.tokens)
    logits_BLV = model.var(LABELS, x_teacher, model.var.schedule(2))
    assert torch.equal(logits_BLV.argmax(-1), result.tokens)
    log_probs_BL = logits_BLV.log_softmax(-1).gather(2, result.tokens.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(result.log_probs, log_probs_BL, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_as_autocast(kind):
    model = zone_model(kind)
    x_teacher, tokens_BL = teacher_input(model)
    engine = Engine(model.var, model.vae, dtype=torch.bfloat16)
    schedule = model.var.schedule(2)
    expected = model.var(LABELS, x_teacher, schedule)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        allowed = (model.var(LABELS, x_teacher, schedule) - expected).square().mean().sqrt()
    error = engine.forced_logits(LABELS, tokens_BL, depth=2) - expected
    assert 0 < error.square().mean().sqrt() <= 2 * allowed


@pytest.mark.parametrize("kind", KINDS)
def test_full_depth_images_are_those_of_the_full_network_bit_by_bit(kind):
    model = zone_model(kind)
    plain = VARiant(full_network(model), model.vae).eval()
    for depth in (None, [0, 1, 3]):
        ours, expected = (m.generate(LABELS, depth=depth, seed=5) for m in (model, plain))
        assert torch.equal(ours.tokens, expected.tokens)
        assert torch.equal(ours.images, expected.images)
    assert not torch.equal(
        model.generate(LABELS, depth=2, seed=5).tokens,
        plain.generate(LABELS, depth=2, seed=5).tokens,
    )


def test_merged_additions_equal_applied_ones():
    model = zone_model("lora")
    view = LayerView(model.var.layers()[0], 2)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    for name in ("mat_qkv", "proj", "fc1"):
        weight_OI, bias_O = view.linear(name)
        merged = torch.nn.functional.linear(x, weight_OI, bias_O)
        torch.testing.assert_close(merged, view.project(name, x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(weight_OI, view.parameter(name), atol=1e-2)


def test_a_switch_between_scales_uses_the_zone_weights_of_the_new_depth():
    model = zone_model("copies")

    def switch(k, partial):
        return {0: 3, 1: 2}.get(k)

    result = model.generate(LABELS, cfg=0, top_k=1, seed=0, on_scale=switch)
    assert result.stats.depths == (4, 3, 2)
    x_teacher = model.vae.teacher_input(result.tokens)
    schedule = model.var.schedule(3).switched(2, [0, 3])
    assert torch.equal(model.var(LABELS, x_teacher, schedule).argmax(-1), result.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_zone_weights_are_seen_at_the_next_call(kind):
    model = zone_model(kind)
    before = {d: model.generate(LABELS, depth=d, seed=0).tokens for d in (None, 2, 3)}
    with torch.no_grad():
        for name, weight in model.var.named_parameters():
            if ".zones.2." in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    after = {d: model.generate(LABELS, depth=d, seed=0).tokens for d in (None, 2, 3)}
    assert torch.equal(before[None], after[None])
    assert torch.equal(before[3], after[3])
    assert not torch.equal(before[2], after[2])


def test_a_change_during_a_batch_does_not_change_the_batch():
    model = zone_model("lora")  # merged when the batch starts: not the model's own tensors
    options = {"cfg": 0, "top_k": 1, "seed": 0}
    expected = model.generate(LABELS, on_scale=lambda k, partial: 2, **options).tokens

    def change(k, partial):
        with torch.no_grad():
            model.var.layers()[0].zones["2"].lora["fc2"].lora_B.add_(1)
        return 2

    assert torch.equal(model.generate(LABELS, on_scale=change, **options).tokens, expected)
    after = model.generate(LABELS, on_scale=lambda k, partial: 2, **options)
    assert not torch.equal(after.tokens, expected)


def test_the_bytes_of_zone_weights_are_counted_when_their_depth_runs():
    for kind in ("lora", "copies", "adaln"):
        model = zone_model(kind)
        engine = Engine(model.var, model.vae, pack=False, dtype=torch.float32)
        assert engine.generate(LABELS, seed=0).stats.zone_weight_bytes == 0
        assert engine._weights()._zones == {}  # nothing is merged for full depth
        stats = engine.generate(LABELS, depth=3, seed=0).stats
        planned = merged_zone_bytes(model.var.config, 3, "float32")
        assert stats.zone_weight_bytes == planned, kind
        assert (planned > 0) == (kind == "lora")
        assert list(engine._weights()._zones) == [3]


def test_copies_with_a_softmax_scale_of_their_own_use_it():
    model = zone_model("copies", attn_l2_norm=False)
    x_teacher, tokens_BL = teacher_input(model)
    before = model.var(LABELS, x_teacher, model.var.schedule(2, 1))
    for block in model.var.layers():
        for zone in block.zones.values():
            zone.attn.softmax_scale *= 8
    expected = model.var(LABELS, x_teacher, model.var.schedule(2, 1))
    assert not torch.allclose(expected[:, 1:], before[:, 1:], atol=1e-2)
    assert torch.equal(expected[:, :1], before[:, :1])
    engine = Engine(model.var, model.vae)
    logits_BLV = engine.forced_logits(LABELS, tokens_BL, depth=2, bridge=1)
    torch.testing.assert_close(logits_BLV, expected, atol=1e-4, rtol=1e-4)
