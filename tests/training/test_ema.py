"""The moving average of the weights: its values, its evaluation, and the model that is shipped."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import OPTIM, assert_same, metrics, resume, run_until, train_both, trained_vae

from variant.checkpoints.model_folder import load_model
from variant.errors import UserError
from variant.training.checkpoint_schedule import OutputSection
from variant.training.ema import EMA, EMASection
from variant.training.recipe import load_recipe
from variant.training.var_task import VARTask, train_var


def with_ema(recipe, decay, rate=1e-3):
    optim = dataclasses.replace(OPTIM, learning_rate=rate)
    return dataclasses.replace(recipe, ema=EMASection(decay), optim=optim)


def module_of(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].bias.requires_grad_(False)
    return module


def test_the_average_follows_its_equation():
    module = module_of()
    ema = EMA(module, 0.75)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) + step)
        ema.update()
        for name, parameter in module.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach()
    assert ema.averages.keys() == {"0.weight", "1.weight", "1.bias"}  # of what is trained
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, expected[name])


def test_the_weights_come_back_after_their_average_took_their_place():
    module = module_of()
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module[0].weight.add_(2.0)
    ema.update()
    before, averages = copy.deepcopy(module.state_dict()), copy.deepcopy(ema.averages)
    place = module[0].weight.data_ptr()

    def interrupted():
        with ema.in_place_of_weights():
            assert torch.equal(module[0].weight, averages["0.weight"])
            assert module[0].weight.data_ptr() == place
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert_same(dict(module.state_dict()), dict(before))
    assert_same(ema.averages, averages)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must be (>= 0|< 1); got"):
        EMASection(decay)


def test_an_average_of_other_parameters_is_refused():
    ema = EMA(module_of(), 0.5)
    good = {name: value.clone() for name, value in ema.averages.items()}
    for bad, message in (
        ({}, "does not fit the module's parameters: 0.weight"),
        (good | {"1.bias": torch.zeros(5)}, r"1.bias is \(5,\)"),
        (good | {"1.bias": torch.zeros(4, dtype=torch.int32)}, "1.bias is .* torch.int32"),
        (good | {"1.bias": torch.full((4,), torch.nan)}, "1.bias is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ema.load(bad)
    assert_same(ema.averages, good)


def test_a_run_without_an_average_is_not_changed_by_one(recipe, tmp_path):
    train_both(recipe, tmp_path / "without")
    train_both(with_ema(recipe, 0.5), tmp_path / "with")
    states = [
        torch.load(tmp_path / name / "var-last.pt", weights_only=True)
        for name in ("without", "with")
    ]
    assert "ema" not in states[0]
    assert_same(states[0]["module"], states[1]["module"])
    for one, other in zip(*(metrics(tmp_path / n) for n in ("without", "with")), strict=True):
        assert one.items() <= other.items()
        assert other["ema_held_out"].keys() == other["held_out"].keys()


@pytest.mark.parametrize("better", [True, False])
def test_the_better_of_weights_and_average_is_shipped(recipe, tmp_path, monkeypatch, better):
    chosen = with_ema(recipe, 0.9)
    losses, calls = VARTask.held_out_losses, []

    def judged(self, ranks):
        """The average, which is evaluated second, is better or worse by one."""
        calls.append(losses(self, ranks))
        shift = 0 if len(calls) % 2 else (-1 if better else 1)
        return {name: loss + shift for name, loss in calls[-1].items()}

    monkeypatch.setattr(VARTask, "held_out_losses", judged)
    summary = train_both(chosen, tmp_path)
    assert summary.averaged == better
    entries = metrics(tmp_path)
    assert len(calls) == 2 * len(entries)
    name = "ema_held_out" if better else "held_out"
    best = min(entries, key=lambda entry: entry[f"{name}_mean"])
    assert summary.held_out_loss == best[name]
    assert summary.best_epoch == best["epoch"]
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    expected = "their moving average (EMA)" if better else "of the last step of that epoch"
    assert training["weights"] == expected
    assert f"- weights: {expected}" in (tmp_path / "README.md").read_text()
    var, _, _ = load_model(tmp_path)
    shipped = dict(var.state_dict())
    assert_same(load_file(tmp_path / "var-best.safetensors"), shipped)
    saved = torch.load(tmp_path / "var-last.pt", weights_only=True)
    if best["epoch"] == len(entries):
        source = saved["ema"] if better else saved["module"]
        assert_same(dict(source), {key: shipped[key] for key in source})
        other = saved["module"] if better else saved["ema"]
        assert not all(torch.equal(value, shipped[key]) for key, value in other.items())


@pytest.mark.usefixtures("two_threads")
def test_stopping_after_any_step_keeps_the_average_bit_for_bit(recipe, tmp_path, monkeypatch):
    chosen = dataclasses.replace(
        with_ema(recipe, 0.9), output=OutputSection(checkpoint_every=9, checkpoint_steps=2)
    )
    train_both(chosen, tmp_path / "whole")
    parted = tmp_path / "parted"
    trained_vae(chosen, parted)
    for step in range(7):
        run_until(chosen, parted, monkeypatch, train_var, VARTask, step, resume=step > 0)
        assert torch.load(parted / "var-last.pt", weights_only=True)["step"] == step + 1
    resume(chosen, parted, train_var)
    states = [
        torch.load(folder / "var-last.pt", weights_only=True)
        for folder in (tmp_path / "whole", parted)
    ]
    for part in ("ema", "module", "sums", "best_sha256"):
        assert_same(states[0][part], states[1][part])
    assert metrics(parted) == metrics(tmp_path / "whole")


def test_another_decay_is_refused_at_resume_but_not_by_the_vqvae(recipe, tmp_path, monkeypatch):
    trained_vae(recipe, tmp_path)
    assert resume(with_ema(recipe, 0.5), tmp_path).steps == 4
    run_until(recipe, tmp_path, monkeypatch, train_var, VARTask)
    with pytest.raises(UserError, match=r"other settings: ema.decay 0.0 -> 0.5"):
        resume(dataclasses.replace(recipe, ema=EMASection(0.5)), tmp_path, train_var)


def test_old_recipes_keep_no_average():
    assert load_recipe("digits").ema == EMASection(0.0)
