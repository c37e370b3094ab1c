"""Training: runs are reproducible, resumed runs equal unbroken ones, bad numbers stop a run."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import open_recipe_data
from tiny_runs import (
    CPU,
    OPTIM,
    assert_same,
    interrupt_after,
    metrics,
    quiet,
    resume,
    run_until,
    tiny_recipe,
    train_both,
    trained_vae,
    with_precision,
)

from variant.checkpoints.model_folder import load_model
from variant.data.images import epoch_order
from variant.errors import UserError
from variant.training.late_values import LateValues
from variant.training.run_setup import RunSetup
from variant.training.trainer import Trainer
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """Both trainings of the tiny recipe: their folder, which must not be changed, and summaries.

    The first has a worker, which the runs that are compared with it lack.
    """
    out = tmp_path_factory.mktemp("whole")
    vae, var = (
        train(tiny_recipe(folders, workers), out, console=quiet(), device=CPU)
        for train, workers in ((train_vae, 1), (train_var, 0))
    )
    return SimpleNamespace(folder=out, vae=vae, var=var)


def test_the_two_commands_give_a_model_folder(recipe, whole):
    summary = whole.var
    assert summary.epochs == 4
    assert summary.steps == 8
    assert set(summary.held_out_loss) == {"full", "2"}
    var, vae, config = load_model(whole.folder)
    assert var.config == dataclasses.replace(recipe.var_config, class_names=("class0", "class1"))
    assert vae.config == recipe.vae
    assert config["training"]["recipe"] == "tiny"
    assert config["training"]["held_out_loss"] == summary.held_out_loss
    best = load_file(whole.folder / "var-best.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in var.state_dict().items())
    entries = metrics(whole.folder)
    means = [entry["held_out_mean"] for entry in entries]
    assert summary.best_epoch == means.index(min(means)) + 1


def test_the_same_seed_gives_the_same_losses_and_weights_twice(recipe, whole, tmp_path):
    for name, seed in (("b", 0), ("c", 1)):
        for train in (train_vae, train_var):  # anew, each in this process
            train(recipe, tmp_path / name, seed=seed, console=quiet(), device=CPU)
    for kind in ("vae", "var"):
        assert metrics(whole.folder, kind) == metrics(tmp_path / "b", kind)
        assert metrics(whole.folder, kind) != metrics(tmp_path / "c", kind)
    weights = [load_file(f / "model.safetensors") for f in (whole.folder, tmp_path / "b")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("kind", "task", "step"),  # the end of an epoch, and the middle of one
    [
        pytest.param("vae", VAETask, 1, marks=pytest.mark.nightly),
        ("vae", VAETask, 2),
        ("var", VARTask, 1),
        pytest.param("var", VARTask, 2, marks=pytest.mark.nightly),
    ],
)
def test_stopping_and_resuming_equals_never_stopping(
    recipe, whole, tmp_path, monkeypatch, kind, task, step
):
    if kind == "var" and step == 1:  # with a worker, which the whole run lacks
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    parted = tmp_path / "parted"
    if kind == "var":
        others = shutil.ignore_patterns("var-*", "config*", "model*", "README*")
        shutil.copytree(whole.folder, parted, ignore=others)
    train = train_vae if kind == "vae" else train_var
    with monkeypatch.context() as patch:
        interrupt_after(patch, task, step)
        console = quiet()
        with pytest.raises(SystemExit) as stopped:
            train(recipe, parted, console=console, device=CPU)
    assert stopped.value.code == 130
    assert f"stopped after step {step + 1} of" in console.file.getvalue()
    assert "Resume with: the same command and --resume" in console.file.getvalue()
    torch.manual_seed(99)  # other draws of the process must not change the run
    train(recipe, parted, resume=True, console=quiet(), device=CPU)
    assert metrics(parted, kind) == metrics(whole.folder, kind)
    states = [
        torch.load(folder / f"{kind}-last.pt", weights_only=True)
        for folder in (whole.folder, parted)
    ]
    for part in ("module", "random"):
        assert_same(states[0][part], states[1][part])
    assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])
    bests = [load_file(f / f"{kind}-best.safetensors") for f in (whole.folder, parted)]
    assert_same(*bests)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(recipe, tmp_path):
    plain = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, mixup=0.0),
        model=dataclasses.replace(recipe.model, cond_drop_rate=0.0),
    )
    parted = dataclasses.replace(plain, optim=dataclasses.replace(OPTIM, accumulate=3))
    for name, chosen in (("whole", plain), ("parted", parted)):
        train_both(chosen, tmp_path / name)
    whole, parts = (metrics(tmp_path / name)[0] for name in ("whole", "parted"))
    assert parts["train"] == pytest.approx(whole["train"], rel=1e-4)


def test_bf16_trains(recipe, tmp_path):
    assert train_both(with_precision(recipe, "bf16"), tmp_path).steps == 8


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, monkeypatch):
    def loss(self, indices, epoch, step):
        return self.module(self.data.samples(indices, epoch).images)[1] * float("nan")

    monkeypatch.setattr(VAETask, "loss", loss)
    with pytest.raises(UserError, match=r"the loss is not finite at step 0 .epoch 0.; try a lower"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)


def test_epochs_visit_every_image_once_in_an_order_of_their_own():
    orders = [epoch_order(0, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert epoch_order(0, 1, 50).tolist() == orders[1]


def test_the_summary_has_both_losses_of_every_configuration(recipe, whole):
    assert whole.vae.train_loss.keys() == {"reconstruction"}
    assert whole.vae.held_out_loss.keys() == {"reconstruction"}
    summary = whole.var
    assert summary.train_loss.keys() == summary.held_out_loss.keys() == {"full", "2"}
    var, vae, _ = load_model(whole.folder)
    data = open_recipe_data(recipe)
    # Six images, as many as are held out; the same in every run, and of both classes.
    sample = np.random.default_rng(0).permutation(24)[:6]
    images, labels = data.train(sample, 0)
    assert set(labels.tolist()) == {0, 1}
    with torch.no_grad():
        tokens = vae.encode(images)
        logits = var(labels, vae.teacher_input(tokens), var.schedule(2))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert summary.train_loss["2"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_held_out_loss_that_is_not_finite_leaves_the_best_weights_alone(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        VAETask, "evaluate", lambda self, indices, *, held_out: {"reconstruction": float("nan")}
    )
    with pytest.raises(UserError, match=r"the held-out loss is not finite at step 2 .epoch 0."):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert not (tmp_path / "vae-best.safetensors").exists()
    assert not (tmp_path / "vae-last.pt").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    recipe, tmp_path, monkeypatch
):
    modules = []

    def loss(self, indices, epoch, step):
        modules.append((self.module, {k: v.clone() for k, v in self.module.state_dict().items()}))
        weight = next(self.module.parameters())
        return weight.sum() * 0 + (weight.flatten()[0] * 0).sqrt()  # its gradient is not finite

    monkeypatch.setattr(VAETask, "loss", loss)
    with pytest.raises(UserError, match="the gradient is not finite at step 0"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    module, before = modules[-1]
    assert_same(module.state_dict(), before)


@pytest.fixture
def late(monkeypatch):
    """Numbers of a step are read after the next one, as on a GPU."""
    monkeypatch.setattr("variant.training.late_values.steps_late", lambda device: 1)


def test_losses_that_are_read_a_step_late_are_the_same(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, every=3))
    measured = []
    for late in (0, 1):
        folder = tmp_path / str(late)
        monkeypatch.setattr("variant.training.late_values.steps_late", lambda device, n=late: n)
        train_vae(recipe, folder, console=quiet(), device=CPU)
        lines = [
            json.loads(text) for text in (folder / "vae-steps.jsonl").read_text().split("\n")[:-1]
        ]
        lines = [{k: line[k] for k in line if k.startswith(("loss", "grad"))} for line in lines]
        measured.append((metrics(folder, "vae"), lines))
    assert measured[0] == measured[1]
    assert {"loss/loss", "gradient_norm/loss/all"} <= measured[0][1][0].keys()


def test_a_step_waits_for_none_of_its_numbers(recipe, tmp_path, monkeypatch, late):
    item, callers, events = torch.Tensor.item, [], []

    def noted(tensor):
        callers.append(Path(sys._getframe(1).f_code.co_filename).name)
        return item(tensor)

    add, read = LateValues.add, LateValues.read

    def noted_add(self, step, values):
        events.append(("queued", step[1]))
        add(self, step, values)

    def noted_read(self, *, everything=False):
        for step, numbers in read(self, everything=everything):
            events.append(("read", step[1]))
            yield step, numbers

    monkeypatch.setattr(torch.Tensor, "item", noted)
    monkeypatch.setattr(LateValues, "read", noted_read)
    monkeypatch.setattr(LateValues, "add", noted_add)
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert "trainer.py" not in callers
    assert events[:4] == [("queued", 0), ("queued", 1), ("read", 0), ("read", 1)]  # an epoch ends


def _bad_from(monkeypatch, bad_step, factor):
    """From a step on the loss times ``factor``; the weights before each step, by number."""
    loss, weights = VAETask.loss, {}

    def spoiled(self, indices, epoch, step):
        weights[step] = {k: v.clone() for k, v in self.module.state_dict().items()}
        weights["module"] = self.module
        return loss(self, indices, epoch, step) * (factor if step >= bad_step else 1)

    monkeypatch.setattr(VAETask, "loss", spoiled)
    return weights


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [2, 3])  # 3 is the last of an epoch
def test_a_bad_loss_that_is_read_late_stops_the_run_before_it_is_saved(
    recipe, tmp_path, monkeypatch, late, bad_step, factor
):
    recipe = dataclasses.replace(
        recipe, output=dataclasses.replace(recipe.output, checkpoint_steps=1)
    )
    weights = _bad_from(monkeypatch, bad_step, factor)
    with pytest.raises(UserError, match=f"the loss is not finite at step {bad_step} .epoch 1.;"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    saved = torch.load(tmp_path / "vae-last.pt", weights_only=True)
    assert saved["step"] == bad_step
    assert_same(saved["module"], weights[bad_step])
    for name, weight in weights["module"].named_parameters():  # nor did it reach the weights
        assert torch.equal(weight, weights[bad_step][name])


def test_a_signal_after_a_bad_loss_does_not_save_it(recipe, tmp_path, monkeypatch, late):
    _bad_from(monkeypatch, 2, float("nan"))
    interrupt_after(monkeypatch, VAETask, 2, signal.SIGTERM)
    with pytest.raises(UserError, match="the loss is not finite at step 2"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)


def test_sigterm_finishes_the_step_saves_and_exits_with_143(recipe, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, VAETask, 2, signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert caught.value.code == 143
    assert torch.load(tmp_path / "vae-last.pt", weights_only=True)["step"] == 3


def test_a_resumed_run_equals_an_unbroken_one_with_copies_and_accumulation(
    recipe, tmp_path, monkeypatch
):
    chosen = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, mixup=0.0, copies=2),
        optim=dataclasses.replace(OPTIM, accumulate=3),
    )
    train_both(chosen, tmp_path / "whole")
    parted = tmp_path / "parted"
    trained_vae(chosen, parted)
    run_until(chosen, parted, monkeypatch, train_var, VARTask)
    torch.manual_seed(99)
    resume(chosen, parted, train_var)
    states = [
        torch.load(f / "var-last.pt", weights_only=True) for f in (tmp_path / "whole", parted)
    ]
    assert_same(states[0]["module"], states[1]["module"])
    assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])


def trainer_of(recipe, out):
    setup = RunSetup("vae", recipe, OPTIM, out, device=CPU)
    module = torch.nn.Sequential(torch.nn.Linear(2, 1))
    nothing = {"__init__": lambda self: None, "after_step": lambda self, step: None}
    task = type("Fixed", (VAETask,), nothing)()
    task.module, task.data, task.recipe = module, setup.data, recipe
    return Trainer(task, setup, 1, quiet())


def test_the_real_optimiser_decays_matrices_only_and_steps_on_clipped_gradients(recipe, tmp_path):
    trainer = trainer_of(recipe, tmp_path)
    decays = [group["weight_decay"] for group in trainer.state.optimizer.param_groups]
    assert decays == [OPTIM.weight_decay, 0.0]
    weight, bias = trainer.task.module[0].weight, trainer.task.module[0].bias
    assert [group["params"] for group in trainer.state.optimizer.param_groups] == [[weight], [bias]]
    trainer.task.loss = lambda indices, epoch, step: (weight.sum() + bias.sum()) * 1e3
    trainer.task.before_step = lambda indices, epoch, step: None
    seen = []
    step = trainer.state.optimizer.step

    def watched(*args, **rest):
        result = step(*args, **rest)
        # The fused AdamW clips gradients as it reads them, and writes them back.
        seen.append(torch.cat((weight.grad.flatten(), bias.grad)).norm().item())
        return result

    trainer.state.optimizer.step = watched
    trainer._train_step()
    assert seen == [pytest.approx(OPTIM.clip, rel=1e-3)]
