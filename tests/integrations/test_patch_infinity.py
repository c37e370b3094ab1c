"""``patch`` on a model built like Infinity, and the rotation that it needs."""

import copy

import pytest
import torch
from lookalike_infinity import SQUARE, WIDE, lookalike

from variant_kernels import CachePlan, DepthSchedule, ScaleLayout, patch
from variant_kernels.integrations import PatchError
from variant_kernels.integrations.rope import rotate_pairs

TEXT = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
KINDS = [
    pytest.param({"cos_attn": cos, "using_flash": flash}, id=f"cos_{cos}-flash_{flash}")
    for cos, flash in ((True, False), (True, True), (False, False))
]


def paint(model, scales=SQUARE, **options):
    return model.autoregressive_infer_cfg(TEXT, scales, g_seed=5, **options)


def test_another_default_device_changes_nothing():
    model = lookalike()
    with torch.device("meta"):
        handle = patch(model)
    handle.unpatch()


def members(model):
    return [(type(m), dict(vars(m))) for m in model.modules()]


def test_rotation_turns_neighbouring_channels_by_the_tokens_angle():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 16, generator=generator)
    angle = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    turn = torch.stack((angle.cos(), angle.sin()))
    cos, sin = (part.unsqueeze(1) for part in turn)
    even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
    expected = torch.stack((cos * even - sin * odd, sin * even + cos * odd), -1).flatten(-2)
    assert (rotate_pairs(x, turn.float()) - expected).abs().max() < 1e-6
    half = rotate_pairs(x.bfloat16(), turn.float())
    assert half.dtype == torch.float32
    assert torch.equal(half, rotate_pairs(x.bfloat16().float(), turn.float()))
    # Views with other strides, and no token at all.
    assert torch.equal(
        rotate_pairs(x.mT.contiguous().mT, turn.float()), rotate_pairs(x, turn.float())
    )
    assert rotate_pairs(x[:, :0], turn[:, :0].float()).shape == (2, 0, 3, 16)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_a_patched_model_paints_the_same_bits_and_logits(options, greedy):
    model = lookalike(**options)
    bits, logits = paint(model, greedy=greedy)
    assert 0.2 < bits.mean() < 0.8, "bits that are all alike would prove nothing"
    with patch(model) as handle:
        assert handle.family == "Infinity"
        for _ in range(2):
            again, close = paint(model, greedy=greedy)
            assert torch.equal(again, bits)
            assert (close - logits).abs().max() < 1e-4
    assert torch.equal(paint(model, greedy=greedy)[1], logits)


def test_each_generation_brings_its_own_scales():
    model = lookalike()
    expected = [paint(model, scales) for scales in (SQUARE, WIDE, SQUARE)]
    with patch(model) as handle:
        for scales, (bits, logits) in zip((SQUARE, WIDE, SQUARE), expected, strict=True):
            again, close = paint(model, scales)
            assert torch.equal(again, bits)
            assert (close - logits).abs().max() < 1e-4
            layout = ScaleLayout(tuple((h, w) for _, h, w in scales))
            plan = CachePlan(layout, DepthSchedule.full(4, 4))
            planned = plan.peak_bytes(4, 2, 32, torch.float32, guidance=False)
            stats = handle.stats()
            assert stats.kv_planned_bytes == stats.kv_allocated_bytes == planned


def test_a_generation_may_end_early_and_the_next_is_whole():
    model = lookalike()
    short, whole = paint(model, trunk=2), paint(model)
    with patch(model):
        assert torch.equal(paint(model, trunk=2)[0], short[0])
        assert torch.equal(paint(model)[0], whole[0])


@pytest.mark.parametrize(("depth", "bridge"), [(2, 1), (3, 2), ((0, 1, 3), 0)])
def test_skipped_layers_are_the_identity(depth, bridge):
    model = lookalike()
    schedule = DepthSchedule(4, 4, depth, bridge)
    with patch(model, depth=depth, bridge=bridge) as handle:
        bits, logits = paint(model)
        assert handle.stats().depths == schedule.depths
    # Reference: a skipped layer returns its tokens unchanged and caches nothing.
    for layer, block in enumerate(model.unregistered_blocks):

        def skipping(x, original=block.forward, layer=layer, **options):
            active = schedule.is_active(layer, options["scale_ind"])
            return original(x=x, **options) if active else x

        block.forward = skipping
    expected_bits, expected = paint(model)
    assert torch.equal(bits, expected_bits)
    assert (logits - expected).abs().max() < 1e-4


def test_training_gives_the_same_logits_and_gradients():
    model = lookalike()
    words = torch.randn(2, sum(h * w for _, h, w in SQUARE) - 1, 6)

    def step():
        model.zero_grad()
        logits = model(TEXT, words, SQUARE)
        logits.square().mean().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    logits, gradients = step()
    with patch(model):
        close, ours = step()
    assert (close - logits).abs().max() < 1e-4
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_another_mask_than_the_block_causal_one_is_respected():
    model = lookalike()
    attention = model.unregistered_blocks[0].sa
    x, mask = torch.randn(2, 30, 64), torch.randn(1, 1, 30, 30)
    call = (x, mask, None, SQUARE, model.rope2d_freqs_grid)
    expected = attention(*call)
    with patch(model):
        assert (attention(*call) - expected).abs().max() < 1e-5


def test_bfloat16_autocast_is_as_close_to_float32_as_without_the_patch():
    model = lookalike().requires_grad_(False)
    exact = paint(model)[1][:, :1]  # later scales depend on what was drawn
    with torch.autocast("cpu", torch.bfloat16):
        plain = paint(model)[1][:, :1]
        with patch(model):
            ours = paint(model)[1][:, :1]
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2**-8


def test_unpatch_leaves_no_trace_and_patching_twice_is_refused():
    model = lookalike()
    before, state = members(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = patch(model)
    assert list(model.state_dict()) == list(state)
    with pytest.raises(PatchError, match="patched already"):
        patch(model)
    copied = copy.deepcopy(model)
    assert torch.equal(paint(copied)[0], paint(model)[0])
    assert type(copied.unregistered_blocks[0]) is before_type(before, model)
    handle.unpatch()
    after = members(model)
    assert [kind for kind, _ in after] == [kind for kind, _ in before]
    for (_, new), (_, old) in zip(after, before, strict=True):
        assert list(new) == list(old)
        assert all(new[name] is value for name, value in old.items())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def before_type(before, model):
    """The plain class of the blocks."""
    blocks = [kind for kind, _ in before if kind.__name__ == "CrossAttnBlock"]
    assert len(blocks) == len(model.unregistered_blocks)
    return blocks[0]


def damaged(change):
    model = lookalike()
    change(model)
    return model


def edit_forward(model):
    """A forward that computes something else under the same signature."""
    attention = model.unregistered_blocks[2].sa

    class SelfAttention(type(attention)):
        def forward(
            self,
            x,
            attn_bias_or_two_vector,
            attn_fn=None,
            scale_schedule=None,
            rope2d_freqs_grid=None,
            scale_ind=0,
        ):
            return 1.5 * super().forward(
                x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
            )

    attention.__class__ = SelfAttention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "use_flex_attn", True), "use_flex_attn must be False"),
        (lambda m: m.rope2d_freqs_grid.clear(), "rope2d_freqs_grid must be a dictionary"),
        (
            lambda m: m.rope2d_freqs_grid.update({str(tuple(SQUARE)): torch.zeros(2, 3)}),
            r"must be float32 \(2, 1, 1, 1, 30, 16\); found torch.float32 \(2, 3\)",
        ),
        (
            lambda m: setattr(m.unregistered_blocks[1].sa, "max_scale_mul", 3.0),
            r"unregistered_blocks\[1\].sa.max_scale_mul must be log 100; found 3.0",
        ),
        (
            lambda m: delattr(m.unregistered_blocks[3].sa, "q_bias"),
            r"unregistered_blocks\[3\].sa must have \['q_bias'\]",
        ),
        (
            lambda m: m.unregistered_blocks.append(lookalike().unregistered_blocks[0]),
            r"unregistered_blocks\[4\] must be a module of the model",
        ),
        (edit_forward, "has its forward been edited"),
    ],
)
def test_a_changed_model_is_refused_by_name_and_left_as_it_was(change, message):
    model = damaged(change)
    before = members(model)
    with pytest.raises(PatchError, match=message):
        patch(model)
    for (new_kind, new), (kind, old) in zip(members(model), before, strict=True):
        assert new_kind is kind
        assert list(new) == list(old)


def test_ways_to_generate_that_pages_cannot_serve_are_refused():
    model = lookalike()
    with patch(model), torch.no_grad():
        attention = model.unregistered_blocks[0].sa
        attention.kv_caching(True)
        with pytest.raises(PatchError, match="need unpatch"):
            attention(torch.zeros(1, 1, 64), torch.zeros(1, 1, 1, 1), None, SQUARE, {})
        block = model.unregistered_blocks[0]
        with pytest.raises(PatchError, match="must get scale_schedule"):
            block(torch.zeros(1, 1, 64), torch.zeros(1, 1, 6, 64), torch.zeros(1, 3, 64), None)
        attention.kv_caching(False)
        with pytest.raises(PatchError, match="no rotation for the scales"):
            paint(model, [(1, 1, 1), (1, 5, 5)])
        with pytest.raises(ValueError, match="bridge must be an integer >= 0"):
            patch(lookalike(), depth=2, bridge=-1)


def test_a_generation_with_gradients_is_refused():
    model = lookalike()
    paint_with_gradient = type(model).autoregressive_infer_cfg.__wrapped__
    with patch(model), pytest.raises(PatchError, match=r"^patch: generation has no gradient; run"):
        paint_with_gradient(model, TEXT, SQUARE, g_seed=5)
