"""Training of the transformer's blocks: checkpointing, compilation, what is kept and recomputed."""

import copy

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn
from torch.nn import functional as F

from variant import VARConfig
from variant.models.execution import Execution
from variant.models.residual import PrefixStream
from variant.models.var import MLP, VAR, Block
from variant_kernels import DepthSchedule, ScaleLayout, use_backend

WIDTH = 64


def small_var(depth=6, **settings):
    settings = {"patch_nums": (1, 2, 3, 4), "vocab_size": 50, "bridge": 2, **settings}
    torch.manual_seed(0)
    var = VAR(
        VARConfig(
            depth=depth,
            embed_dim=WIDTH,
            num_heads=2,
            num_classes=10,
            vae_channels=8,
            **settings,
        )
    )
    for parameter in var.parameters():
        nn.init.normal_(parameter, std=0.05)  # gates far from 0
    return var.train()


def batch_of(var, images=3):
    generator = torch.Generator().manual_seed(1)
    length = var.layout.total
    labels = torch.randint(10, (images,), generator=generator)
    x_teacher = torch.randn(images, length - 1, var.config.vae_channels, generator=generator)
    targets = torch.randint(var.config.vocab_size, (images, length), generator=generator)
    return labels, x_teacher, targets


def scales_of(var, images=3):
    """Drop path with every kind of factor."""
    generator = torch.Generator().manual_seed(2)
    shape = (var.config.depth, 2, images)
    return (torch.rand(shape, generator=generator) < 0.7) / 0.7


def loss_and_gradients(var, schedule, **options):
    labels, x_teacher, targets = batch_of(var)
    loss = var(
        labels,
        x_teacher,
        schedule,
        targets_BL=targets,
        dropped_B=torch.tensor([True, False, False]),
        branch_scales_N2B=scales_of(var),
        **options,
    )
    parameters = dict(var.named_parameters())
    grads = torch.autograd.grad(loss.mean, list(parameters.values()), allow_unused=True)
    return loss, dict(zip(parameters, grads, strict=True))


def schedules(var):
    """Full, a subnet, and schedules whose layers run on prefixes in every order."""
    yield None
    yield var.schedule(2)
    yield DepthSchedule(6, 4, [0, 5], 0)
    yield DepthSchedule.full(6, 4).switched(1, [0, 1, 4, 5]).switched(2, [0, 4, 5]).switched(3, 2)


def masked_loss(var, schedule):
    """The definition: every layer on its tokens, by slices, without fusion or chunks."""
    labels, x_teacher, targets = batch_of(var)
    cond = var.class_emb(labels.masked_fill(torch.tensor([True, False, False]), 10))
    x = torch.cat((cond.unsqueeze(1) + var.pos_start, var.word_embed(x_teacher)), 1)
    x = x + var.position_embedding()
    for layer, block in enumerate(var.layers()):
        scales = 4 if schedule is None else schedule.last_scale(layer) + 1
        if scales == 0:
            continue
        layout = var.layout.prefix(scales)
        gates = block.modulation(cond)[:, :2] * scales_of(var)[layer].T.unsqueeze(2)
        scale1, scale2, shift1, shift2 = block.modulation(cond)[:, 2:].unbind(1)
        head, rest = x[:, : layout.total], x[:, layout.total :]
        h = F.layer_norm(head, (WIDTH,), eps=1e-6) * (1 + scale1[:, None]) + shift1[:, None]
        head = head + gates[:, :1] * block.attn(h, layout)
        h = F.layer_norm(head, (WIDTH,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
        head = head + gates[:, 1:] * block.ffn.fc2(F.gelu(block.ffn.fc1(h), approximate="tanh"))
        x = torch.cat((head, rest), 1)
    scale, shift = var.head_nm.modulation(cond).unbind(1)
    h = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return F.cross_entropy(var.head(h).flatten(0, 1), targets.flatten())


EXECUTIONS = {
    "plain": Execution(),
    "attention": Execution("attention"),
    "full": Execution("full"),
    "traced": Execution(compiled=torch.compile(Block.compute, backend="eager", fullgraph=True)),
}


@pytest.mark.parametrize("index", range(4))
def test_every_execution_computes_the_loss_and_gradients_of_the_definition(index):
    torch._dynamo.reset()
    var = small_var()
    schedule = list(schedules(var))[index]
    expected = masked_loss(var, schedule)
    parameters = dict(var.named_parameters())
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for name, execution in EXECUTIONS.items():
        if name == "traced" and index > 1:
            continue  # only other prefixes, each with a graph of its own
        loss, grads = loss_and_gradients(var, schedule, execution=execution)
        torch.testing.assert_close(loss.mean, expected, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(loss.losses_BL.mean(), loss.mean, rtol=1e-6, atol=0)
        for (key, grad), want in zip(grads.items(), wanted, strict=True):
            if want is None:
                assert grad is None, (name, key)
            else:
                assert grad is not None, (name, key)
                error = (grad - want).norm() / want.norm().clamp_min(1e-7)
                assert error < 2e-5, (name, key, error)


def test_the_loss_equals_that_of_the_logits():
    var = small_var().eval()
    labels, x_teacher, targets = batch_of(var)
    with torch.no_grad():
        logits = var(labels, x_teacher, var.schedule(2))
        loss = var(labels, x_teacher, var.schedule(2), targets_BL=targets)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(loss.losses_BL, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_attention_gives_the_same_bits(autocast):
    var = small_var()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, grads = loss_and_gradients(var, None)
        other, others = loss_and_gradients(var, None, execution=Execution("attention"))
    assert torch.equal(loss.mean, other.mean)
    assert all(torch.equal(grads[key], others[key]) for key in grads)


@pytest.mark.parametrize(
    ("checkpointing", "autocast"),
    [("none", True), pytest.param("attention", False, marks=pytest.mark.nightly)],
)
def test_a_block_compiles_once_for_each_configuration(checkpointing, autocast):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Block.compute, backend=backend, fullgraph=True)
    execution = Execution(checkpointing, compiled)
    var = small_var(12, drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(var.parameters(), lr=1e-3)
    labels, x_teacher, targets = batch_of(var)
    for step in range(20):
        schedule = var.schedule((None, 2, 4)[step % 3])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = var(labels, x_teacher, schedule, targets_BL=targets, execution=execution)
        loss.mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            assert len(graphs) == 2
    assert len(graphs) == 2
    var.eval()(labels[:1], x_teacher[:1], execution=execution)
    assert len(graphs) == 2  # evaluation runs eagerly, whatever its batches are


def test_a_copied_model_compiles_with_its_own_weights():
    # An average of the weights is kept in a copy of the model.
    torch._dynamo.reset()
    execution = EXECUTIONS["traced"]
    var = small_var()
    other = copy.deepcopy(var)
    with torch.no_grad():
        other.blocks[0].ffn.fc1.weight.mul_(2)
    first, _ = loss_and_gradients(var, None, execution=execution)
    second, _ = loss_and_gradients(other, None, execution=execution)
    expected, _ = loss_and_gradients(other, None)
    torch.testing.assert_close(second.mean, expected.mean)
    assert first.mean != second.mean


def saved_bytes(dtype, execution, images=4):
    """Bytes that the forward pass leaves for the backward pass, per token, layer and channel."""
    kept = []
    for depth in (1, 3):
        var = small_var(depth, patch_nums=(1, 2, 4, 8, 12, 16), vocab_size=50)
        labels, x_teacher, targets = batch_of(var, images)
        with LiveBytes() as live, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = var(labels, x_teacher, targets_BL=targets, execution=execution)
            # Casts of a layer's weights, which grow with the model and not with the batch.
            casts = dtype.itemsize * sum(
                p.numel() for p in var.blocks[0].parameters() if dtype != torch.float32
            )
            kept.append(live.now - casts * depth)
        del loss
    return (kept[1] - kept[0]) / 2 / (images * var.layout.total * WIDTH)


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "low", "high"),
    [
        (torch.bfloat16, "none", 30, 36),
        (torch.bfloat16, "attention", 20, 26),
        (torch.bfloat16, "full", 3.5, 5),
        (torch.float32, "none", 68, 73),
        (torch.float32, "full", 3.5, 5),
    ],
)
def test_bytes_kept_per_token_layer_and_channel(dtype, checkpointing, low, high):
    assert low < saved_bytes(dtype, Execution(checkpointing)) <= high


def test_every_linear_layer_is_called_through_its_module():
    var = small_var()
    called = set()
    for name, module in var.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    loss_and_gradients(var, None)
    assert called == {name for name, m in var.named_modules() if isinstance(m, nn.Linear)}


class Doubled(nn.Linear):
    """A layer that replaces another, as libraries of 8-bit products do: it takes no bias."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


def test_a_layer_that_replaces_a_linear_one_is_called():
    var = small_var()
    plain, _ = loss_and_gradients(var, None)
    for name in ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2"):
        changed = copy.deepcopy(var)
        owner, _, leaf = name.rpartition(".")
        old = changed.blocks[1].get_submodule(name)
        new = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        setattr(changed.blocks[1].get_submodule(owner), leaf, new)
        assert loss_and_gradients(changed, None)[0].mean != plain.mean, name
    changed = copy.deepcopy(var)
    changed.head = Doubled(WIDTH, 50)
    changed.head.load_state_dict(var.head.state_dict())
    labels, x_teacher, targets = batch_of(var)
    logits = changed.eval()(labels, x_teacher)
    loss = changed(labels, x_teacher, targets_BL=targets)
    torch.testing.assert_close(loss.mean, F.cross_entropy(logits.transpose(1, 2), targets))


def test_the_replaced_projection_keeps_the_bias():
    attn = small_var().blocks[0].attn
    x = torch.randn(2, 30, WIDTH)
    layout = ScaleLayout.from_patch_nums((1, 2, 3, 4))
    with use_backend("reference"):
        expected = attn(x, layout)
        plain = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        plain.load_state_dict(attn.mat_qkv.state_dict())
        attn.mat_qkv = plain
        torch.testing.assert_close(attn(x, layout), expected)


def test_the_prefix_stream_keeps_the_order_of_tokens():
    x = torch.arange(10.0).view(1, 10, 1)
    stream = PrefixStream(x)
    expected = x.clone()
    for step, length in enumerate((10, 7, 3, 5, 1, 8, 8, 10), start=1):
        assert torch.equal(stream.prefix(length), expected[:, :length])
        stream.head = stream.prefix(length) + 100 * step
        expected[:, :length] += 100 * step
    assert torch.equal(stream.prefix(10), expected)


def test_wrong_targets_are_named():
    var = small_var()
    labels, x_teacher, targets = batch_of(var)
    with pytest.raises(ValueError, match=r"targets_BL must be \(3, 30\) int64; got \(3, 29\)"):
        var(labels, x_teacher, targets_BL=targets[:, 1:])
    with pytest.raises(ValueError, match=r"targets_BL must be .* int64; got .* torch.int32"):
        var(labels, x_teacher, targets_BL=targets.int())
    for token in (-100, -1, var.config.vocab_size):
        with pytest.raises(ValueError, match=rf"targets_BL must be in \[0, .*\); got {token}"):
            var(labels, x_teacher, targets_BL=targets.index_fill(1, torch.tensor([3]), token))
    with pytest.raises(TypeError, match="execution must be"):
        var(labels, x_teacher, execution="full")


class Transposed(nn.Module):
    """A linear layer as a convolution, which keeps its input with two axes exchanged."""

    def __init__(self, linear):
        super().__init__()
        self.conv = nn.Conv1d(linear.in_features, linear.out_features, 1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    "layer",
    [Transposed, lambda linear: nn.Sequential(nn.Dropout(0.5, inplace=True), linear)],
    ids=["transposed", "written-in-place"],
)
def test_what_is_not_the_gelu_s_result_is_kept_for_the_backward_pass(layer):
    """Another layer in the place of fc2 may keep another order of it, or other values."""
    torch.manual_seed(0)
    mlp, x = MLP(16, 32), torch.randn(2, 5, 16).bfloat16()
    mlp.fc2 = layer(mlp.fc2)
    mlp = mlp.bfloat16()

    def gradients(**options):
        torch.manual_seed(1)
        y = mlp(x, **options).float()
        return torch.autograd.grad(y.square().sum(), list(mlp.parameters()))

    for ours, kept in zip(gradients(), gradients(keep_all=True), strict=True):
        torch.testing.assert_close(ours, kept, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
@pytest.mark.parametrize("zone_weights", ["shared", "copies"])
def test_what_is_computed_again_drops_what_was_dropped(zone_weights, checkpointing):
    own = {} if zone_weights == "shared" else {"subnets": {2: (0, 2)}, "zone_weights": "copies"}
    var = small_var(2 if zone_weights == "shared" else 3, **own)
    for part in [m for m in var.modules() if hasattr(m, "proj")]:
        part.proj = nn.Sequential(nn.Dropout(0.5), part.proj)
    schedule = None if zone_weights == "shared" else var.schedule(2)
    results = []
    for execution in (Execution(), Execution(checkpointing)):
        torch.manual_seed(3)
        results.append(loss_and_gradients(var, schedule, execution=execution))
        results[-1] = *results[-1], torch.get_rng_state()
    (loss, grads, state), (again, found, state_after) = results
    torch.testing.assert_close(again.mean, loss.mean)
    torch.testing.assert_close(found, grads)
    assert torch.equal(state_after, state), "the backward pass must draw nothing"
