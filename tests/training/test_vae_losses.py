"""The losses of the VQ-VAE: each against its definition and against numerical gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from variant.models.discriminator import PatchDiscriminator
from variant.training.adversary import Adversary
from variant.training.distributed import Ranks
from variant.training.image_loss import ImageLoss
from variant.training.meters import Meters
from variant.training.optim import OptimSection
from variant.training.perceptual import PerceptualLoss
from variant.training.recipe import VAETraining
from variant.training.vae_losses import (
    MOST_ADAPTIVE,
    adaptive_weight,
    feature_distance,
    generator_loss,
    hinge_loss,
    lecam_penalty,
    pixel_error,
    r1_penalty,
    with_gradient,
)
from variant.training.vae_sections import AdversarySection, PerceptualSection

CPU = torch.device("cpu")
OPTIM = OptimSection(batch_size=4, learning_rate=1e-3)


def images(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def discriminator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(1, 4, 1).double()


class Smooth(nn.Module):
    """Features that have second derivatives, of two layers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)]).double()

    def forward(self, x):
        one = torch.tanh(self.convs[0](x))
        return [one, torch.tanh(self.convs[1](one))]


def test_every_loss_has_the_gradient_of_its_values():
    real, fake = images(1, 2, 1, 8, 8), images(2, 2, 1, 8, 8).requires_grad_()
    network, averages = discriminator(), torch.tensor((0.3, -0.2), dtype=torch.float64)
    features = Smooth()

    def distance(x):
        maps = [features(y.expand(-1, 3, -1, -1)) for y in (x, real)]
        return feature_distance(*maps)

    weights = [torch.rand(4).double(), torch.rand(5).double()]
    losses = {
        "l2": lambda x: pixel_error("l2", x, real),
        "l1": lambda x: pixel_error("l1", x, real),
        "perceptual": distance,
        "lpips": lambda x: feature_distance(
            *(features(y.expand(-1, 3, -1, -1)) for y in (x, real)), weights
        ),
        "generator": lambda x: generator_loss(network(x)),
        "hinge": lambda x: hinge_loss(network(x), network(-x)),
        "r1": lambda x: r1_penalty(network(x), x),
        "lecam": lambda x: lecam_penalty(network(x), network(-x), averages),
    }
    for name, loss in losses.items():
        assert torch.autograd.gradcheck(loss, (fake,)), name

    def of_weight(weight):
        logits = torch.func.functional_call(network, {"stack.0.weight": weight}, (fake,))
        return r1_penalty(logits, fake)

    # The discriminator learns by the second derivative of R1.
    assert torch.autograd.gradcheck(of_weight, (network.stack[0].weight,))


def test_values_are_those_of_the_formulas():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.0])
    assert generator_loss(fake).item() == 1.0
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.0 / 2))
    averages = torch.tensor((0.25, -0.5))
    expected = (1.0**2 + 2.5**2) / 2 + (2.25**2 + 0.25**2) / 2
    assert lecam_penalty(real, fake, averages).item() == pytest.approx(expected)
    x = images(1, 3, 1, 4, 4).requires_grad_()
    # The mean of 16 logits 2 x: a gradient of 2 / 16 at each of 16 pixels.
    assert r1_penalty(2 * x, x).item() == pytest.approx(0.5 * 16 * (2 / 16) ** 2)
    one, other = torch.tensor([[[3.0]], [[4.0]]])[None], torch.tensor([[[0.0]], [[2.0]]])[None]
    assert feature_distance([one], [other]).item() == pytest.approx(0.6**2 + 0.2**2)
    weighed = feature_distance([one, one], [other, one], [torch.tensor((2.0, 0.0))] * 2)
    assert weighed.item() == pytest.approx(2 * 0.6**2)


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    first, last = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def losses():
        output = torch.tanh(x @ first) @ last
        return output, F.mse_loss(output, target), -(output**3).mean()

    output, reconstruction, generator = losses()
    norms = [torch.autograd.grad(losses()[index], last)[0].norm() for index in (1, 2)]
    expected = (norms[0] / norms[1]).item()
    section = AdversarySection(weight=0.7, width=4, layers=1)
    adversary = Adversary(section, 1, OPTIM, 0, Ranks(), CPU)
    gradients = [
        torch.autograd.grad(loss, output, retain_graph=True)[0]
        for loss in (reconstruction, generator)
    ]
    weight = adversary.weigh(output, gradients, last)
    assert weight.item() == pytest.approx(0.7 * expected, rel=1e-12)
    # The loss that the VQ-VAE gets has the gradient of the weighted sum, at every layer.
    value = (reconstruction + weight * generator).detach()
    loss = with_gradient(output, value, gradients[0] + weight * gradients[1])
    assert loss.item() == value.item()
    found = torch.autograd.grad(loss, (first, last))
    _, reconstruction, generator = losses()
    wanted = torch.autograd.grad(reconstruction + weight * generator, (first, last))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)


def test_a_known_gradient_serves_every_transform_and_no_second_derivative():
    x = torch.randn(3, dtype=torch.float64)

    def cubes(x):
        known = x.detach()
        return with_gradient(x, (known**3).sum(), 3 * known**2)

    wanted = 3 * x**2
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(cubes)(x), wanted)
    value, tangent = torch.func.jvp(cubes, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, (x**3).sum())
    torch.testing.assert_close(tangent, wanted.sum())
    rows = torch.stack([x, 2 * x])
    mapped = torch.vmap(torch.func.grad(cubes))(rows)
    torch.testing.assert_close(mapped, 3 * rows**2)
    message = "^with_gradient: has no second derivative"
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubes(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        first.sum().backward()
    for second in (torch.func.hessian(cubes), torch.func.jacfwd(torch.func.grad(cubes))):
        with pytest.raises(NotImplementedError, match=message):
            second(x)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: torch.func.grad(cubes)(x).sum())(x)


def trained_in(precision, scale):
    """Adaptive weight, loss and the decoder's gradient, where the losses are small."""
    optim = dataclasses.replace(OPTIM, precision=precision)
    training = VAETraining(
        epochs=1, optim=optim, reconstruction=1e-6, perceptual=PerceptualSection(weight=1e-6)
    )
    section, meters = AdversarySection(weight=1.0, width=4, layers=1), Meters(CPU)
    adversary = Adversary(section, 1, optim, 0, Ranks(), CPU)
    perceptual, conv = PerceptualLoss(Smooth().float(), "smooth"), nn.Conv2d(2, 1, 3, padding=1)
    nn.init.constant_(conv.weight, 0.1)
    nn.init.zeros_(conv.bias)
    loss = ImageLoss(training, perceptual, adversary, conv.weight, meters.add)
    x, real = images(1, 2, 2, 16, 16).float(), images(2, 2, 1, 16, 16).float()
    with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
        value = loss(conv(x).float(), real, 0, 1.0, torch.tensor(scale))
    (value * scale).backward()
    return meters.means().get("adversary/weight"), value.detach(), conv.weight.grad / scale


def test_small_gradients_of_fp16_are_those_of_fp32():
    expected = trained_in("fp32", 1.0)
    assert expected[0] > 0
    for value, wanted in zip(trained_in("fp16", 2.0**15), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0.02, atol=0)


def test_a_scale_that_overflows_gives_a_gradient_that_is_not_finite_and_a_finite_loss():
    weight, value, gradient = trained_in("fp16", 2.0**40)
    assert weight is None  # in a mean it would hide those of other steps
    assert torch.isfinite(value)
    assert not torch.isfinite(gradient).all()


def test_the_adaptive_weight_is_clamped_and_finite():
    one, zero = torch.ones(3), torch.zeros(3)
    assert adaptive_weight(one, zero).item() == MOST_ADAPTIVE == 1e4
    assert adaptive_weight(one, one * 1e-6).item() == 1e4
    assert adaptive_weight(zero, zero).item() == 0
    assert adaptive_weight(one, 2 * one).item() == 0.5
    for gradients in ((one, one / 0), (one / 0, one)):
        assert adaptive_weight(*gradients).isnan()


def test_zero_features_have_a_finite_gradient():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = feature_distance([F.relu(x)], [torch.ones(1, 3, 2, 2)])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("layers", "side"), [(1, 6), (2, 12), (3, 32), (3, 24)])
def test_the_discriminator_judges_patches_of_each_image_alone(layers, side):
    network = PatchDiscriminator(3, 8, layers)
    x = torch.randn(4, 3, side, side)
    logits = network(x)
    assert logits.shape == (4, 1, (side >> layers) - 2, (side >> layers) - 2)
    assert torch.allclose(logits[1:2], network(x[1:2]), atol=1e-6)


@pytest.mark.parametrize("regularizer", ["none", "r1", "lecam"])
def test_parts_of_a_batch_add_up_to_the_discriminators_gradient(regularizer):
    weight = 0.0 if regularizer == "none" else 0.5
    section = AdversarySection(
        weight=1.0, width=4, layers=2, regularizer=regularizer, regularizer_weight=weight
    )
    real, fake = (images(seed, 4, 1, 16, 16).float() for seed in (1, 2))
    one, parted = (Adversary(section, 1, OPTIM, 3, Ranks(), CPU) for _ in range(2))
    for _ in range(3):
        for adversary, parts in ((one, [slice(0, 4)]), (parted, [slice(0, 1), slice(1, 4)])):
            for part in parts:
                logits = adversary.logits(fake[part])
                adversary.accumulate(real[part], logits, len(real[part]) / 4)
            adversary.step(1e-3)
    assert int(one.module.steps) == 3
    for name, value in one.module.state_dict().items():
        assert torch.allclose(value.double(), parted.module.state_dict()[name].double(), atol=2e-4)
    start = Adversary(section, 1, OPTIM, 3, Ranks(), CPU)
    logits = [each.logits(real).mean() - each.logits(fake).mean() for each in (one, start)]
    assert logits[0] > logits[1]  # it has learnt


def test_a_step_that_is_skipped_leaves_the_averages_of_lecam():
    section = AdversarySection(
        weight=1.0, width=4, layers=1, regularizer="lecam", regularizer_weight=0.1
    )
    adversary = Adversary(section, 1, OPTIM, 3, Ranks(), CPU)
    real, fake = (images(seed, 2, 1, 8, 8).float() for seed in (1, 2))
    states = []
    for factor in (1.0, float("nan"), 1.0):
        adversary.accumulate(real, adversary.logits(fake * factor), 1.0)
        adversary.step(1e-3)
        states.append({key: x.clone() for key, x in adversary.module.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert all(torch.isfinite(value).all() for value in states[2].values())
    assert [int(state["steps"]) for state in states] == [1, 1, 2]


def test_a_perceptual_loss_of_equal_images_is_zero():
    loss = PerceptualLoss(Smooth().float(), "smooth")
    x = images(3, 2, 1, 8, 8).float()
    assert loss(x, x).item() == 0
    assert loss(-x, x).item() > 0
