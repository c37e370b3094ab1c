"""``patch`` on models built like the original VAR and CoDe."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from lookalike_var import LookalikeCoDe, LookalikeVAR, lookalike
from torch import nn
from torch.nn import functional as F

from variant_kernels import CachePlan, DepthSchedule, ScaleLayout, patch, select_layers
from variant_kernels.integrations import PatchError

LABELS = torch.tensor([1, 3])
KINDS = [
    pytest.param({"shared_aln": shared, "attn_l2_norm": l2}, id=f"shared_{shared}-l2_{l2}")
    for shared in (False, True)
    for l2 in (False, True)
]


def paint(model, **options):
    return model.autoregressive_infer_cfg(2, LABELS, g_seed=5, cfg=2.0, top_k=10, **options)


def members(model):
    return [(type(m), dict(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("options", KINDS)
def test_a_patched_model_paints_the_same_tokens_and_logits(options):
    model = lookalike(**options)
    tokens, logits = paint(model)
    with patch(model):
        for _ in range(2):
            again, close = paint(model)
            assert torch.equal(again, tokens)
            assert (close - logits).abs().max() < 1e-4 * logits.abs().max()


def test_the_first_scale_may_have_several_tokens():
    model = lookalike(sides=(2, 3, 4), depth=2)
    tokens, logits = paint(model)
    with patch(model) as handle:
        again, close = paint(model)
        assert torch.equal(again, tokens)
        assert (close - logits).abs().max() < 1e-4 * logits.abs().max()
        layout = ScaleLayout.from_patch_nums(model.patch_nums)
        plan = CachePlan(layout, DepthSchedule.full(2, 3))
        planned = plan.peak_bytes(4, 2, 32, torch.float32, guidance=False)
        assert handle.stats().kv_allocated_bytes == planned


def test_another_default_device_changes_nothing():
    model = lookalike()
    with torch.device("meta"):
        handle = patch(model)
    handle.unpatch()


def test_inference_mode_changes_nothing():
    model = lookalike()
    tokens, _ = paint(model)
    with patch(model), torch.inference_mode():
        assert torch.equal(paint(model)[0], tokens)


@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_autocast_is_as_close_to_float32_as_without_the_patch(shared):
    model = lookalike(shared_aln=shared).requires_grad_(False)
    exact = paint(model)[1][:, :1]  # later scales depend on what was drawn
    with torch.autocast("cpu", torch.bfloat16):
        plain = paint(model)[1][:, :1]
        with patch(model) as handle:
            ours = paint(model)[1][:, :1]
            assert not handle._runtime._copies  # freed with the generation
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2**-8


@pytest.mark.parametrize("keep", [False, True])
def test_weights_changed_between_generations_are_seen(keep):
    model = lookalike().requires_grad_(False)
    with patch(model, keep_copies=keep) as handle, torch.autocast("cpu", torch.bfloat16):
        paint(model)
        assert bool(handle._runtime._copies) == keep
        for parameter in (model.blocks[1].ffn.fc1.weight, model.blocks[0].ada_lin[1].weight):
            parameter.mul_(-3)
        changed = paint(model)[1][:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        expected = paint(model)[1][:, :1]
    assert (changed - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_condition_changed_in_place_is_seen():
    def last_scale(model):
        generator = torch.Generator().manual_seed(0)
        cond = torch.randn(2, 64, generator=generator)
        for block in model.blocks:
            block.attn.kv_caching(True)
        for tokens in (1, 4):
            x = torch.randn(2, tokens, 64, generator=generator)
            for block in model.blocks:
                x = block(x=x, cond_BD=cond, attn_bias=None)
            cond.mul_(-2)
        for block in model.blocks:
            block.attn.kv_caching(False)
        return x

    model = lookalike()
    with torch.no_grad():
        expected = last_scale(model)
        with patch(model):
            assert (last_scale(model) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("who", ["caller", "hook", "hook of a block"])
def test_a_shared_projection_changed_in_place_is_made_anew(who):
    model = lookalike(shared_aln=True)
    if who == "hook":
        model.shared_ada_lin.register_forward_hook(lambda *call: call[2].mul_(0.5))
    elif who == "hook of a block":
        model.blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: (args, {**kwargs, "cond_BD": kwargs["cond_BD"].mul_(0.5)}),
            with_kwargs=True,
        )
    else:
        project, shared = model.shared_ada_lin, nn.Module()
        shared.forward = lambda cond_BD: project(cond_BD).mul_(0.5)
        model.project, model.shared_ada_lin = project, shared
    expected = paint(model)
    if who == "caller":
        model.shared_ada_lin = project
    with patch(model):
        if who == "caller":
            model.shared_ada_lin = shared
        tokens, logits = paint(model)
    assert torch.equal(tokens, expected[0])
    assert (logits - expected[1]).abs().max() < 1e-4 * expected[1].abs().max()


@pytest.mark.parametrize("shared", [False, True])
def test_what_torch_broadcasts_and_any_stride_run_as_before(shared):
    generator = torch.Generator().manual_seed(0)
    cond_BC, x_BTC = (torch.randn(s, generator=generator) for s in ((3, 64), (3, 4, 64)))
    calls = {
        "one condition": (x_BTC, cond_BC[:1]),
        "one row of tokens": (x_BTC[:1], cond_BC),
        "another axis": (x_BTC, cond_BC.unsqueeze(1)),
        "strided channels": (x_BTC.mT.contiguous().mT, cond_BC),
        "one channel": (x_BTC[..., :1].expand(3, 4, 64), cond_BC),
    }

    def run(model):
        return {name: run_scale(model, *call) for name, call in calls.items()}

    def run_scale(model, x, cond):
        for block in model.blocks:
            block.attn.kv_caching(True)
        for block in model.blocks:
            x = block(x=x, cond_BD=model.shared_ada_lin(cond), attn_bias=None)
        hidden = model.head_nm(x, cond)
        for block in model.blocks:
            block.attn.kv_caching(False)
        return hidden

    model = lookalike(shared_aln=shared, sides=(2, 3))
    with torch.no_grad():
        expected = run(model)
        with patch(model):
            for name, hidden in run(model).items():
                assert hidden.shape == expected[name].shape, name
                difference = (hidden - expected[name]).abs().max()
                assert difference < 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("seen", ["all", "earlier scales"])
def test_a_mask_of_integers_is_refused_as_before(seen):
    model = lookalike()
    mask = torch.zeros(30, 30, dtype=torch.int64)
    if seen == "earlier scales":
        mask[:1, 1:] = -1
    call = torch.zeros(2, 30, 64), torch.zeros(2, 64), mask
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        model.blocks[0](*call)
    with patch(model), pytest.raises(RuntimeError, match="attn_mask dtype"):
        model.blocks[0](*call)


def hand_made(model, schedule):
    """``paint`` of the unpatched model, with blocks that return their input where inactive."""
    model.requires_grad_(False)
    kept = [block.forward for block in model.blocks]
    calls = dict.fromkeys(range(len(model.blocks)), 0)

    def skipping(layer, original):
        def forward(x, cond_BD, attn_bias):
            scale = calls[layer]
            calls[layer] += 1
            return original(x, cond_BD, attn_bias) if schedule.is_active(layer, scale) else x

        return forward

    for layer, block in enumerate(model.blocks):
        block.forward = skipping(layer, kept[layer])
    try:
        return paint(model)
    finally:
        for block in model.blocks:
            del block.forward


@pytest.mark.parametrize(("depth", "bridge"), [(2, 1), (3, 2), ((0, 1, 3), 0), (2, None)])
def test_skipped_layers_are_the_identity(depth, bridge):
    model = lookalike()
    schedule = DepthSchedule(4, 4, depth, 3 if bridge is None else bridge)
    tokens, logits = hand_made(model, schedule)
    with patch(model, depth=depth, bridge=bridge) as handle:
        ours, close = paint(model)
        assert handle.stats().depths == schedule.depths
    assert torch.equal(ours, tokens)
    assert (close - logits).abs().max() < 1e-4 * logits.abs().max()


def test_a_schedule_gives_the_layers_of_every_scale():
    model = lookalike()
    schedule = DepthSchedule.from_depths([4, [0, 1, 3], [0, 1, 3], [0, 3]])
    tokens, logits = hand_made(model, schedule)
    with patch(model, depth=schedule) as handle:
        ours, close = paint(model)
        assert handle.stats().depths == (4, 3, 3, 2)
        with pytest.raises(ValueError, match="set_depth: bridge must be None with a schedule"):
            handle.set_depth(schedule, 1)
        with pytest.raises(ValueError, match="set_depth: depth must be a schedule of 4 layers"):
            handle.set_depth(DepthSchedule.full(5, 4))
    assert torch.equal(ours, tokens)
    assert (close - logits).abs().max() < 1e-4 * logits.abs().max()


def test_stats_tell_the_plan_and_what_was_allocated():
    model = lookalike()
    layout = ScaleLayout.from_patch_nums(model.patch_nums)
    with patch(model) as handle:
        with pytest.raises(PatchError, match="nothing has been generated"):
            handle.stats()
        sizes = []
        for depth in (None, 2):
            handle.set_depth(depth, bridge=2)
            paint(model)
            stats = handle.stats()
            plan = CachePlan(layout, DepthSchedule(4, 4, depth or 4, 2))
            expected = plan.peak_bytes(2, 2, 32, torch.float32)
            assert stats.kv_planned_bytes == stats.kv_allocated_bytes == expected
            assert stats.seconds > 0
            assert (stats.depth, stats.bridge) == (depth, 2)
            sizes.append(expected)
    assert sizes[1] < sizes[0]


def test_unpatch_leaves_no_trace():
    model = lookalike(shared_aln=True)
    before, state = members(model), {k: v.data_ptr() for k, v in model.state_dict().items()}
    handle = patch(model, depth=2)
    paint(model)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    assert isinstance(model.blocks[0], type(lookalike().blocks[0]))
    handle.unpatch()
    handle.unpatch()
    for (kind, now), (old_kind, old) in zip(members(model), before, strict=True):
        assert kind is old_kind
        assert list(now) == list(old)
        assert all(now[name] is value for name, value in old.items())
    with pytest.raises(PatchError, match="unpatched"):
        handle.set_depth(2)


def test_patching_twice_is_refused():
    model = lookalike()
    with patch(model), pytest.raises(PatchError, match="patched already"):
        patch(model)
    patch(model).unpatch()


def test_a_copy_or_pickle_of_a_patched_model_is_the_plain_model():
    model = lookalike()
    tokens, _ = paint(model)
    with patch(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert b"variant_kernels" not in buffer.getvalue()
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
    for other in copies:
        assert [kind for kind, _ in members(other)] == [kind for kind, _ in members(model)]
        assert torch.equal(paint(other)[0], tokens)
        with patch(other):
            assert torch.equal(paint(other)[0], tokens)


def test_a_handle_kept_in_the_model_is_copied_and_pickled_with_it():
    model = lookalike()
    tokens, _ = paint(model)
    model.handle = patch(model, depth=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.handle.model is other
        assert not other.handle.patched
        other.handle.unpatch()
        with pytest.raises(PatchError, match="has been unpatched; patch it again"):
            other.handle.set_depth(2)
        assert torch.equal(paint(other)[0], tokens)
    assert copy.copy(model.handle) is model.handle
    assert not torch.equal(paint(model)[0], tokens)
    model.handle.unpatch()
    assert torch.equal(paint(model)[0], tokens)


def test_another_dtype_within_a_generation_is_named():
    model = lookalike()
    autocast = torch.autocast("cpu", torch.bfloat16)
    scales = []

    def switch(module, arguments):
        scales.append(None)
        if len(scales) == 2:
            autocast.__enter__()

    with patch(model):
        hook = model.blocks[0].register_forward_pre_hook(switch)
        try:
            with pytest.raises(PatchError, match="the dtype changed from float32 to bfloat16"):
                paint(model)
        finally:
            autocast.__exit__(None, None, None)
            hook.remove()


def test_a_generation_that_was_broken_off_does_not_spoil_the_next():
    model = lookalike()
    tokens, _ = paint(model)
    with patch(model):
        hook = model.blocks[2].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            paint(model)
        hook.remove()
        assert torch.equal(paint(model)[0], tokens)


def by_its_own_method(self, handle):
    with handle:  # interrupted within: it is unpatched
        paint(self)


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_generation_that_runs_is_not_unpatched(in_thread):
    model = lookalike()
    expected = paint(model)
    handle = patch(model)
    errors = []

    def unpatch():
        try:
            handle.unpatch()
        except PatchError as error:
            errors.append(str(error))

    def in_the_middle(*_):
        if in_thread:
            thread = threading.Thread(target=unpatch)
            thread.start()
            thread.join()
        else:
            unpatch()

    hook = model.blocks[2].ffn.register_forward_hook(in_the_middle)
    assert torch.equal(paint(model)[0], expected[0])
    hook.remove()
    assert errors == [errors[0]] * len(model.patch_nums)
    assert errors[0].startswith("unpatch: the model is generating; unpatch it after that")
    hook = model.blocks[2].ffn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        by_its_own_method(model, handle)
    hook.remove()
    assert not handle.patched
    assert torch.equal(paint(model)[0], expected[0])


@pytest.mark.parametrize("other_finishes", [True, False])
def test_a_second_thread_is_an_error_and_no_other_image(other_finishes):
    model = lookalike()
    tokens, _ = paint(model)
    painted, begun, refused = [], threading.Event(), threading.Event()
    main = threading.get_ident()

    def hook(module, args):
        if threading.get_ident() == main and not begun.is_set():
            other.start()
            begun.wait(60)
            if other_finishes:
                other.join(60)
        elif threading.get_ident() != main:
            begun.set()
            if not other_finishes:
                refused.wait(60)

    with patch(model):
        other = threading.Thread(target=lambda: painted.append(paint(model)[0]))
        handle = model.blocks[2].register_forward_pre_hook(hook)
        with pytest.raises(PatchError, match="another thread has begun a generation"):
            paint(model)
        refused.set()
        other.join(60)
        handle.remove()
        assert len(painted) == 1
        assert torch.equal(painted[0], tokens)
        assert torch.equal(paint(model)[0], tokens)


def test_a_call_that_fits_no_scale_is_refused():
    model = lookalike()
    x, cond = torch.randn(2, 3, 64), torch.randn(2, 64)
    with patch(model), torch.no_grad():
        for block in model.blocks:
            block.attn.kv_caching(True)
        with pytest.raises(PatchError, match="got 3 tokens"):
            model.blocks[0](x=x, cond_BD=cond, attn_bias=None)


def test_a_generation_with_gradients_is_refused():
    model = lookalike()
    generate = type(model).autoregressive_infer_cfg.__wrapped__
    with patch(model), pytest.raises(PatchError, match=r"^patch: generation has no gradient; run"):
        generate(model, 2, torch.tensor([1, 2]), g_seed=1)


@pytest.mark.parametrize("attn_drop", [0.0, 0.2])
@pytest.mark.parametrize("shared", [False, True])
def test_training_gives_the_same_gradients(shared, attn_drop):
    model = lookalike(shared_aln=shared, attn_drop=attn_drop).train()
    words = torch.randn(2, model.L - 1, model.Cvae)

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        loss = F.cross_entropy(model(LABELS, words).flatten(0, 1), torch.zeros(2 * model.L).long())
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with patch(model):
        ours = gradients()
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        assert (ours[name] - grad).abs().max() < 1e-3 * grad.abs().max() + 1e-8, name


@pytest.mark.parametrize("entry", [1, 2, 3])
@pytest.mark.parametrize("depth", [None, 2])
def test_codes_refiner_reads_the_draft_through_a_mask(entry, depth):
    model = lookalike(LookalikeCoDe)
    words = torch.randn(2, model.L - 1, model.Cvae)
    expected = model.autoregressive_infer_cfg_refine(2, LABELS, words, entry)
    with patch(model, depth=depth, bridge=2) as handle:
        assert handle.family == "CoDe"
        ours = model.autoregressive_infer_cfg_refine(2, LABELS, words, entry)
        if depth is None:
            assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
        else:
            # The same tokens fed scale by scale give the same logits: bridge tokens alone pass
            # through all layers, in one call or in several.
            stepwise = model.autoregressive_infer_cfg_refine(2, LABELS, words, 0)
            assert (ours - stepwise).abs().max() < 1e-4 * stepwise.abs().max()
            assert (ours - expected).abs().max() > 1e-2
        with pytest.raises(PatchError, match="beam search"):
            model.blocks[0].attn.update_cache_for_beams(2)


def spoil_norm(model):
    model.blocks[1].ln_wo_grad = nn.RMSNorm(64)


def spoil_mask(model):
    model.attn_bias_for_masking[0, 0, 0, 1] = 0


def spoil_scale(model):
    model.blocks[2].attn.max_scale_mul = 3.0


def spoil_bias(model):
    model.blocks[0].attn.q_bias = nn.Parameter(torch.zeros(63))


def spoil_part(model):
    del model.blocks[3].attn.v_bias


def spoil_forward(model):
    class Edited(type(model.blocks[0])):
        def forward(self, x, cond_BD, attn_bias):
            return super().forward(x, cond_BD, attn_bias) * 1.1

    model.blocks[1].__class__ = Edited


def spoil_signature(model):
    class Edited(type(model.blocks[0])):
        def forward(self, x, cond_BD, attn_bias, rope):
            return x

    model.blocks[1].__class__ = Edited


def spoil_compiled(model):
    model.blocks[0].compile()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_norm, r"blocks\[1\].ln_wo_grad must be a LayerNorm"),
        (spoil_mask, "attn_bias_for_masking must be the block-causal mask"),
        (spoil_scale, r"blocks\[2\].attn.max_scale_mul must be log 100"),
        (spoil_bias, r"q_bias must have shape \(64,\)"),
        (spoil_part, r"blocks\[3\].attn must have \['v_bias'\]"),
        (spoil_forward, "forward been edited"),
        (spoil_signature, r"blocks\[1\].forward must take"),
        (spoil_compiled, "compile afterwards"),
    ],
)
def test_a_changed_model_is_refused_whole(spoil, message):
    model = lookalike()
    spoil(model)
    before = members(model)
    with pytest.raises(PatchError, match=message):
        patch(model)
    assert [kind for kind, _ in members(model)] == [kind for kind, _ in before]
    assert all(
        now.keys() == old.keys() for (_, now), (_, old) in zip(members(model), before, strict=True)
    )


def test_the_error_for_an_unknown_model_names_the_structure():
    with pytest.raises(PatchError, match="mat_qkv"):
        patch(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        patch("var_d16.pth")


def test_a_depth_out_of_range_is_refused_before_anything_is_changed():
    model = lookalike()
    for options in ({"depth": 5}, {"depth": 2, "bridge": 9}, {"depth": (1, 3)}):
        with pytest.raises(ValueError):
            patch(model, **options)
    assert type(model) is LookalikeVAR
    with patch(model) as handle:
        handle.set_depth(2)
        assert select_layers(4, 2) == (0, 3)
        with pytest.raises(ValueError, match="bridge"):
            handle.set_depth(2, bridge=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bridge": True}, "patch: bridge must be an integer .*got True"),
        ({"depth": 2, "bridge": 1.0}, "patch: bridge must be an integer .*got 1.0"),
        ({"depth": 2, "bridge": "1"}, "patch: bridge must be an integer .*got '1'"),
        ({"depth": 2.0}, "patch: depth must be an integer .*got 2.0"),
        ({"depth": [0, "3"]}, "patch: .*must be an integer; got '3'"),
        ({"keep_copies": "no"}, "patch: keep_copies must be True or False; got 'no'"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(options, message):
    model = lookalike()
    with pytest.raises(TypeError, match=message):
        patch(model, **options)
    assert type(model) is LookalikeVAR


def test_depths_of_numpy_and_torch_are_kept_as_numbers():
    model, layers = lookalike(), np.array([0, 2, 3])
    with patch(model, depth=torch.tensor(2), bridge=np.int64(1)) as handle:
        paint(model)
        assert (handle.stats().depth, handle.stats().bridge) == (2, 1)
        assert type(handle.stats().depth) is int
        handle.set_depth(layers, torch.tensor(1))
        layers[:] = 0  # the caller's array may change
        paint(model)
        assert handle.stats().depth == (0, 2, 3)
        with pytest.raises(TypeError, match="set_depth: bridge"):
            handle.set_depth(2, True)


def test_patching_draws_nothing_and_keeps_training_mode():
    model = lookalike().train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    with patch(model):
        assert torch.equal(torch.rand(1), expected)
        assert [m.training for m in model.modules()] == modes


def test_a_generation_that_runs_is_not_patched():
    """The keys and values of its earlier scales would be lost."""
    model = lookalike()
    expected, _ = paint(model)
    refused = []

    def patch_inside(module, args, kwargs):
        with pytest.raises(PatchError, match=r"attn holds the keys and values of a generation"):
            patch(model)
        refused.append(True)

    hook = model.blocks[1].register_forward_pre_hook(patch_inside, with_kwargs=True)
    assert torch.equal(paint(model)[0], expected)
    assert refused
    hook.remove()
    with patch(model):
        assert torch.equal(paint(model)[0], expected)


def test_a_bound_that_changes_after_the_patch_is_refused():
    model = lookalike()
    with patch(model):
        tokens, _ = paint(model)
        model.blocks[2].attn.max_scale_mul = 3.0
        with pytest.raises(ValueError, match=r"patch: blocks\[2\].attn.max_scale_mul .* got 3.0"):
            paint(model)
        model.blocks[2].attn.max_scale_mul = np.float64(np.log(100))
        assert torch.equal(paint(model)[0], tokens)
