"""A teacher for subnet steps."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_runs import CPU, assert_same, quiet, resume, run_until, tiny_recipe, trained_vae

from variant.errors import UserError
from variant.files import save_safetensors
from variant.models.var import VAR
from variant.training.configurations import Configurations
from variant.training.distillation import Teacher, distillation_loss
from variant.training.ema import EMA, EMASection
from variant.training.resume_rules import compare_recipes
from variant.training.trainer import Trainer
from variant.training.var_task import VARTask, train_var


def with_teacher(recipe, kind, **values):
    schedule = dataclasses.replace(
        recipe.schedule, teacher=kind, teacher_weight=0.5, joint_probability=0.8
    )
    return dataclasses.replace(recipe, schedule=schedule, **values)


def frozen(recipe, weights):
    model = dataclasses.replace(recipe.model, weights=str(weights), drop_path_rate=0.1)
    return with_teacher(dataclasses.replace(recipe, model=model), "frozen")


def test_the_loss_is_cross_entropy_and_weighted_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 3, 5, generator=generator).double() for _ in range(2))
    targets = torch.tensor([[0, 1, 4], [2, 2, 3]])
    loss, divergence = distillation_loss(logits, targets, teacher, 0.25)
    own = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    given = np.exp(teacher.numpy()) / np.exp(teacher.numpy()).sum(-1, keepdims=True)
    cross = [-np.log(own[b, t, targets[b, t]]) for b in range(2) for t in range(3)]
    kl = (given * np.log(given / own)).sum(-1).mean()
    assert loss.mean.item() == pytest.approx(np.mean(cross) + 0.25 * kl, rel=1e-5)
    assert divergence.item() == pytest.approx(kl, rel=1e-5)
    assert loss.losses_BL.flatten().tolist() == pytest.approx(cross, rel=1e-5)
    same, zero = distillation_loss(logits, targets, logits, 9.0)
    assert zero.item() == pytest.approx(0, abs=1e-6)
    assert same.mean.item() == pytest.approx(np.mean(cross), rel=1e-5)


def test_the_teacher_has_other_weights_and_leaves_those_of_the_module(recipe):
    torch.manual_seed(0)
    module = VAR(recipe.var_config).train()
    weights = EMA(module, 0.0)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    changed = {name: value.clone() for name, value in module.state_dict().items()}
    labels, teacher_input = torch.tensor([0, 1]), torch.randn(2, 20, 4)
    dropped = torch.tensor([False, True])
    given = Teacher(module, weights).logits(labels, teacher_input, dropped_B=dropped)
    assert module.training
    assert not given.requires_grad
    assert_same(dict(module.state_dict()), changed)
    other = VAR(recipe.var_config).eval()
    other.load_state_dict(start)
    null = torch.tensor([0, recipe.model.num_classes])
    torch.testing.assert_close(given, other(null_of(labels, null), teacher_input))


def null_of(labels, null):
    """The labels with the dropped one replaced by the null class."""
    return torch.stack((labels[0], null[1]))


def test_under_autocast_the_subnet_keeps_its_own_weights(recipe):
    """Autocast keeps casts of the weights until its outermost end."""
    torch.manual_seed(0)
    module = VAR(recipe.var_config).eval()
    weights = EMA(module, 0.0)
    with torch.no_grad():
        for average in weights.averages.values():
            average.mul_(3)
    labels, teacher_input = torch.tensor([0, 1]), torch.randn(2, 20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(labels, teacher_input)
    with torch.autocast("cpu", torch.bfloat16):
        taught = Teacher(module, weights).logits(labels, teacher_input)
        given = module(labels, teacher_input)
    assert torch.equal(given, expected)
    assert not torch.allclose(taught, expected)


def started(folders, out, kind):
    """A recipe with a teacher, and a trained VQ-VAE in ``out``."""
    recipe = tiny_recipe(folders)
    trained_vae(recipe, out)
    if kind == "ema":
        return with_teacher(recipe, "ema", ema=EMASection(decay=0.5))
    torch.manual_seed(7)
    weights = out / "start.safetensors"
    save_safetensors(
        weights, {k: v.contiguous() for k, v in VAR(recipe.var_config).state_dict().items()}
    )
    return frozen(recipe, weights)


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_a_resumed_run_equals_one_that_never_stopped(folders, tmp_path, monkeypatch, kind):
    recipe = started(folders, tmp_path / "whole", kind)
    train_var(recipe, tmp_path / "whole", console=quiet(), device=CPU)
    for name in ("vae-last.pt", "vae-best.safetensors"):
        (tmp_path / "parted").mkdir(exist_ok=True)
        (tmp_path / "parted" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    run_until(recipe, tmp_path / "parted", monkeypatch, train_var, VARTask, step=4)
    resume(recipe, tmp_path / "parted", train_var)
    states = [
        torch.load(tmp_path / part / "var-last.pt", weights_only=True)["module"]
        for part in ("whole", "parted")
    ]
    assert_same(*states)


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_subnet_steps_have_the_teacher_s_divergence(folders, tmp_path, monkeypatch, kind):
    """The teacher of every step, against the weights that it should have."""
    recipe = started(folders, tmp_path / "run", kind)
    seen = []
    original = Teacher.logits

    def logits(self, *arguments, **condition):
        seen.append({name: value.clone() for name, value in self.weights.averages.items()})
        return original(self, *arguments, **condition)

    monkeypatch.setattr(Teacher, "logits", logits)
    weights = []
    step_of = Trainer._train_step

    def train_step(self):
        result = step_of(self)
        weights.append({n: p.detach().clone() for n, p in self.task.module.named_parameters()})
        return result

    first = {}
    begin = Trainer.run

    def run(self):
        first.update({n: p.detach().clone() for n, p in self.task.module.named_parameters()})
        return begin(self)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    monkeypatch.setattr(Trainer, "run", run)
    train_var(recipe, tmp_path / "run", console=quiet(), device=CPU)
    names = [Configurations(recipe, 2).of_step(step).name for step in range(8)]
    assert len(seen) == names.count("2") > 3
    average, expected = dict(first), []
    for name, after in zip(names, weights, strict=True):
        if name == "2":
            expected.append(dict(average))
        if kind == "ema":
            average = {key: 0.5 * average[key] + 0.5 * after[key] for key in average}
    for given, known in zip(seen, expected, strict=True):
        for name, value in known.items():
            torch.testing.assert_close(given[name], value)


def test_a_teacher_needs_its_weights(recipe):
    with pytest.raises(ValueError, match=r'teacher "frozen" needs model.weights to start from'):
        with_teacher(recipe, "frozen")
    with pytest.raises(ValueError, match=r'teacher "ema" needs a moving average, ema.decay above'):
        with_teacher(recipe, "ema")
    alone = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, depths=()))
    with pytest.raises(ValueError, match=r'teacher "ema" needs depths or schedules'):
        with_teacher(alone, "ema", ema=EMASection(decay=0.5))


def test_a_run_goes_on_with_its_own_teacher_only(recipe):
    ema = EMASection(decay=0.5)
    taught = with_teacher(recipe, "ema", ema=ema)
    heavier = dataclasses.replace(
        taught, schedule=dataclasses.replace(taught.schedule, teacher_weight=2.0)
    )
    with pytest.raises(UserError, match=r"schedule.teacher_weight 0.5 -> 2.0"):
        compare_recipes(taught, heavier, "var", "FILE")


def test_a_frozen_teacher_s_file_must_stay(folders, tmp_path, monkeypatch):
    recipe = started(folders, tmp_path, "frozen")
    run_until(recipe, tmp_path, monkeypatch, train_var, VARTask)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(UserError, match=r"start.safetensors"):
        resume(recipe, tmp_path, train_var)
