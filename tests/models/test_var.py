"""The transformer against outputs of the original VAR code."""

import copy

import pytest
import torch
from golden_models import NAMES, load_golden
from small_models import small_model
from torch.func import functional_call, grad, vmap

from variant.models.var import VAR, branch_scales, derived_buffers
from variant_kernels import DepthSchedule, use_backend

BACKENDS = ("reference", "cpu")


def golden_var(name):
    golden = load_golden(name)
    var = VAR(golden.var_config).eval()
    var.load_state_dict(golden.var_state, strict=True)
    return golden, var


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_original(name, backend):
    golden, var = golden_var(name)
    tensors = golden.tensors
    subnet = golden.json["subnet"]
    with use_backend(backend), torch.no_grad():
        full = var(tensors["label"], tensors["x_teacher"])
        small = var(tensors["label"], tensors["x_teacher"], var.schedule(subnet["depth"]))
    torch.testing.assert_close(full, tensors["logits_full"], atol=1e-4, rtol=0)
    torch.testing.assert_close(small, tensors["logits_subnet"], atol=1e-4, rtol=0)
    # The two differ by much more than the tolerance: the schedule does something.
    assert (full - small).abs().max() > 1e-2


def test_layer_selection_equals_the_golden_subnets():
    for name in NAMES:
        golden, var = golden_var(name)
        subnet = golden.json["subnet"]
        chosen = DepthSchedule(
            golden.var_config.depth, var.layout.num_scales, subnet["depth"], subnet["bridge"]
        )
        assert list(chosen.active_layers(subnet["bridge"])) == subnet["active_layers_flexible"]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_with_derived_buffers_is_the_original_state_dict(name):
    golden, var = golden_var(name)
    state = {**var.state_dict(), **derived_buffers(var.layout)}
    assert state.keys() == golden.var_state.keys()
    for key, value in golden.var_state.items():
        assert torch.equal(state[key], value), key


def test_gradients_agree_between_backends():
    golden, var = golden_var("plain")
    tensors = golden.tensors
    gradients = []
    for backend in BACKENDS:
        var.zero_grad()
        with use_backend(backend):
            logits = var(tensors["label"], tensors["x_teacher"], var.schedule(3))
            logits.logsumexp(-1).square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in var.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, atol=1e-4, rtol=1e-3, msg=key)


def test_layers_that_never_run_get_no_gradient_and_bridge_layers_do():
    golden, var = golden_var("plain")
    tensors = golden.tensors
    with use_backend("reference"):
        for bridge, expected in ((0, False), (2, True)):
            var.zero_grad(set_to_none=True)
            schedule = DepthSchedule(6, 7, [0, 5], bridge)
            var(tensors["label"], tensors["x_teacher"], schedule).square().mean().backward()
            assert (var.blocks[2].ffn.fc1.weight.grad is not None) is expected


def test_labels_are_dropped_in_training_mode_only():
    golden, _ = golden_var("no_l2norm")
    config = golden.var_config
    var = VAR(type(config).from_dict({**config.to_dict(), "cond_drop_rate": 1.0}))
    var.load_state_dict(golden.var_state)
    tensors = golden.tensors
    null = torch.full_like(tensors["label"], config.num_classes)
    with use_backend("reference"), torch.no_grad():
        dropped = var.train()(tensors["label"], tensors["x_teacher"])
        conditional = var.eval()(tensors["label"], tensors["x_teacher"])
        unconditional = var(null, tensors["x_teacher"])
    assert torch.equal(dropped, unconditional)
    assert not torch.equal(conditional, unconditional)


def test_mixup_mixes_class_embeddings():
    golden, var = golden_var("plain")
    tensors = golden.tensors
    label = tensors["label"]
    other = (label + 1) % 10
    with use_backend("reference"), torch.no_grad():
        plain = var(label, tensors["x_teacher"])
        one = var(label, tensors["x_teacher"], mixed_labels_B=other, mix_B=torch.ones(len(label)))
        zero = var(label, tensors["x_teacher"], mixed_labels_B=other, mix_B=torch.zeros(len(label)))
        torch.testing.assert_close(one, plain)
        torch.testing.assert_close(zero, var(other, tensors["x_teacher"]))


def test_wrong_inputs_are_named():
    golden, var = golden_var("plain")
    tensors = golden.tensors
    with pytest.raises(ValueError, match=r"labels_B must be in \[0, 10\]; got 11"):
        var(torch.tensor([11, 0, 0]), tensors["x_teacher"])
    mixed = {"mixed_labels_B": torch.tensor([0, -1, 0]), "mix_B": torch.ones(3)}
    with pytest.raises(ValueError, match=r"mixed_labels_B must be in \[0, 10\]; got -1"):
        var(tensors["label"], tensors["x_teacher"], **mixed)
    for name in ("dropped_B", "branch_scales_N2B", "mix_B", "mixed_labels_B"):
        with pytest.raises(TypeError, match=f"VAR.forward: {name} must be a torch.Tensor; got str"):
            var(tensors["label"], tensors["x_teacher"], **{name: "auto"})
    with pytest.raises(ValueError, match=r"x_teacher must be \(3, 154, 16\)"):
        var(tensors["label"], tensors["x_teacher"][:, 1:])
    with pytest.raises(ValueError, match="schedule must have 6 layers and 7 scales; got 6 and 6"):
        var(tensors["label"], tensors["x_teacher"], DepthSchedule.full(6, 6))
    with pytest.raises(
        ValueError, match=r"VAR.schedule: depth must be an integer in \[2, 6\] .*; got 7"
    ):
        var.schedule(7)


def test_a_dropped_branch_leaves_its_image_as_it_was_and_kept_ones_are_scaled():
    uniform_N2B = torch.tensor([[[0.99, 0.0], [0.99, 0.0]], [[0.49, 0.51], [0.0, 0.99]]])
    scales_N2B = branch_scales(uniform_N2B, 0.5)
    assert scales_N2B.tolist() == [[[1, 1], [1, 1]], [[2, 0], [2, 0]]]
    torch.manual_seed(0)
    var = small_model(drop_path_rate=0.5).var
    labels, x_teacher = torch.tensor([1, 2]), torch.randn(2, 13, 8)
    everything_dropped = torch.zeros(4, 2, 2)
    everything_dropped[:, :, 0] = 1
    logits = var(labels, x_teacher, branch_scales_N2B=everything_dropped)
    full = var(labels, x_teacher)
    assert torch.equal(logits[:1], full[:1])
    assert not torch.equal(logits[1:], full[1:])
    without_layers = copy.deepcopy(var)
    without_layers.blocks = torch.nn.ModuleList(Same() for _ in range(4))
    assert torch.equal(logits[1:], without_layers(labels, x_teacher)[1:])


class Same(torch.nn.Module):
    """A layer that leaves the stream as it is."""

    def forward(self, stream, *_, **__):
        return stream


def test_given_drops_take_the_place_of_drawn_ones():
    torch.manual_seed(0)
    var = small_model(drop_path_rate=0.5, cond_drop_rate=0.9).var.train()
    labels, x_teacher = torch.tensor([1, 2]), torch.randn(2, 13, 8)
    dropped_B, scales_N2B = torch.tensor([True, False]), torch.ones(4, 2, 2)
    state = torch.get_rng_state()
    logits = var(labels, x_teacher, dropped_B=dropped_B, branch_scales_N2B=scales_N2B)
    assert torch.equal(torch.get_rng_state(), state)
    unconditional = torch.tensor([5, 2])  # num_classes stands for no class
    assert torch.equal(logits, var.eval()(unconditional, x_teacher))
    drawn = [var.train()(labels, x_teacher) for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dropped_B", torch.zeros(3, dtype=torch.bool), r"must be \(2,\) bool; got \(3,\)"),
        ("dropped_B", torch.zeros(2), r"must be \(2,\) bool; got \(2,\) torch.float32"),
        ("branch_scales_N2B", torch.ones(4, 2, 2, device="meta"), "must be on the device of the"),
        ("branch_scales_N2B", torch.ones(4, 2, 1), r"must be \(4, 2, 2\) of a float dtype; got"),
        ("branch_scales_N2B", torch.ones(4, 2, 2, dtype=torch.int64), "of a float dtype; got"),
    ],
)
def test_drops_that_do_not_fit_are_refused(name, value, message):
    var = small_model().var
    with pytest.raises(ValueError, match=rf"VAR.forward: {name} .*{message}"):
        var(torch.tensor([1, 2]), torch.randn(2, 13, 8), **{name: value})


@pytest.mark.parametrize("name", ["gate_scale", "modulation_scale", "head_scale"])
@pytest.mark.parametrize("value", [torch.ones(2), "0.5", float("nan")], ids=str)
def test_scales_of_initial_weights_are_numbers(name, value):
    var = small_model().var
    before = copy.deepcopy(var.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"^VAR.init_weights: {name} must be a"):
        var.init_weights(**{name: value})
    assert all(torch.equal(before[key], now) for key, now in var.state_dict().items())
    # torch 2.13 ends the process where a weight is multiplied by a sparse scalar in place.
    var.init_weights(**{name: torch.tensor(0.5).to_sparse()})


def test_empty_memory_filled_by_a_state_dict_is_the_model():
    """As large models are loaded: what no state dict holds is computed anew."""
    model = small_model().var
    with torch.device("meta"):
        other = small_model().var
    other.to_empty(device="cpu").scale_index_L.zero_()
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(other.scale_index_L, model.scale_index_L)
    assert torch.equal(other.position_embedding(), model.position_embedding())
    assert other.to("meta").scale_index_L.is_meta


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_and_batched_ones_are_those_of_single_passes():
    model = small_model()
    var, labels_B = model.var, torch.tensor([1, 2])
    x_BLE = model.vae.teacher_input(torch.randint(24, (2, 14)))
    weights = {name: weight.detach() for name, weight in var.named_parameters()}

    def loss(weights, label, x_LE):
        return functional_call(var, weights, (label[None], x_LE[None])).square().mean()

    of_each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, labels_B, x_BLE)
    out_2 = var(labels_B, x_BLE).square().mean((1, 2))
    options = {"retain_graph": True, "is_grads_batched": True}
    batched = torch.autograd.grad(out_2, list(var.parameters()), torch.eye(2), **options)
    for row in range(2):
        single = torch.autograd.grad(out_2[row], list(var.parameters()), retain_graph=True)
        for name, own, expected in zip(weights, batched, single, strict=True):
            bound = 1e-5 * expected.abs().max().clamp(min=1e-3)
            assert (own[row] - expected).abs().max() <= bound, name
            assert (of_each[name][row] - expected).abs().max() <= bound, name


@pytest.mark.parametrize("way", ["hook", "method"])
def test_the_loss_is_that_of_the_logits_whatever_the_head_does(way):
    """The chunked loss reads the weights of a plain head only."""
    var = small_model().var
    if way == "hook":
        var.head.register_forward_hook(lambda *args: args[-1] / 3)
    else:
        var.head.forward = lambda h: torch.nn.functional.linear(h, var.head.weight) / 3
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 3])
    x_teacher = torch.randn(2, var.layout.total - 1, 8, generator=generator)
    targets = torch.randint(24, (2, var.layout.total), generator=generator)
    logits = var(labels, x_teacher)
    loss = var(labels, x_teacher, targets_BL=targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.mean, expected)


def test_the_name_of_the_caller_must_be_a_text():
    var = small_model().var
    for call in (var.schedule, var.layers_of):
        with pytest.raises(TypeError, match=r"^VAR\.\w+: op must be of type str; got .*bytes"):
            call(2, op=b"mine")
        with pytest.raises(ValueError, match=r"^mine: depth must be"):
            call(99, op="mine")
