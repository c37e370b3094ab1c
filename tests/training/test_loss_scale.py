"""The loss scale of fp16: start, cap, skipped steps; on the CPU, where torch's scaler works too."""

import dataclasses

import pytest
import torch
from tiny_runs import CPU, OPTIM, quiet

from variant.errors import UserError
from variant.training.loss_scale import CAP, START, LossScaler
from variant.training.optim import clipped_step
from variant.training.run_setup import RunSetup
from variant.training.trainer import Trainer
from variant.training.vae_task import VAETask


class Weight:
    """One weight, whose gradient overflows where asked."""

    def __init__(self, growth_interval=2000):
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.125)
        self.scaler = LossScaler("cpu")
        self.scaler.set_growth_interval(growth_interval)

    def step(self, overflows=False):
        self.optimizer.zero_grad()
        loss = self.weight.sum() * (float("inf") if overflows else 1.0)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scaler.require_progress("tiny", 7)


def test_the_scale_starts_at_2_to_the_11_and_grows_to_2_to_the_15_at_most():
    one = Weight(growth_interval=1)
    one.step()
    assert START == 2**11
    assert one.scaler.get_scale() == 2**12
    scales = []
    for _ in range(6):
        one.step()
        scales.append(one.scaler.get_scale())
    assert scales == [2**13, 2**14, 2**15, 2**15, 2**15, 2**15]
    assert one.weight.item() == 1 - 7 * 0.125  # unscaled gradients of 1


def test_a_skipped_step_leaves_the_weights_halves_the_scale_and_is_counted():
    one = Weight()
    for overflows in (False, True, True, False, True):
        one.step(overflows)
    assert one.weight.item() == 1 - 2 * 0.125
    assert one.scaler.get_scale() == START / 8
    state = one.scaler.state_dict()
    assert (one.scaler.skipped, state["skipped"], state["skipped_in_row"]) == (3, 3, 1)


def test_the_counts_and_the_scale_are_resumed_and_a_higher_scale_is_capped():
    one, other = Weight(), Weight()
    for overflows in (True, False, True, True):
        one.step(overflows)
    other.scaler.load_state_dict(one.scaler.state_dict())
    assert other.scaler.state_dict() == one.scaler.state_dict()
    for each in (one, other):
        each.step(True)
        assert each.scaler.skipped == 4
        assert each.scaler.get_scale() == START / 16
    plain = torch.amp.GradScaler("cpu").state_dict()  # starts at 65,536, has no counts
    for fresh in (Weight(), one):
        fresh.scaler.load_state_dict(plain)
        assert fresh.scaler.get_scale() == CAP
        assert fresh.scaler.skipped == 0


@pytest.mark.parametrize("before", [0, 15])
def test_more_than_20_skipped_steps_in_a_row_stop_the_run(before):
    one = Weight()
    for _ in range(15):
        one.step(True)
    if before == 0:
        one.step(False)  # the row begins anew
    resumed = Weight()
    resumed.scaler.load_state_dict(one.scaler.state_dict())
    for _ in range(20 - before):
        resumed.step(True)
    with pytest.raises(
        UserError,
        match=r"tiny: 21 optimizer steps in a row were skipped until step 7: gradients in fp16 "
        r"overflow also at a loss scale of [0-9.e-]+; try precision bf16",
    ):
        resumed.step(True)


def test_a_disabled_scaler_has_no_state_and_counts_nothing():
    scaler = LossScaler("cpu", enabled=False)
    scaler.update()
    scaler.require_progress("tiny", 1)
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})
    assert scaler.skipped == 0


def fp16_trainer(recipe, folder, overflows):
    """A trainer of one layer, whose gradient overflows at those steps."""
    setup = RunSetup("vae", recipe, OPTIM, folder, device=CPU)
    setup.optim = dataclasses.replace(OPTIM, precision="fp16")  # allowed on a GPU only, as it pays
    nothing = {"__init__": lambda self: None, "after_step": lambda self, step: None}
    task = type("Fixed", (VAETask,), nothing)()
    task.module = torch.nn.Sequential(torch.nn.Linear(2, 1))
    task.data, task.recipe = setup.data, recipe
    weight = task.module[0].weight

    def loss(indices, epoch, step):  # finite, but its gradient is not
        overflow = (weight.flatten()[0] * 0).sqrt() if overflows[step] else 0.0
        return (weight * 1e-2).sum() + overflow

    task.loss, task.before_step = loss, lambda indices, epoch, step: None
    return Trainer(task, setup, 12, quiet())


def test_a_norm_that_is_not_finite_skips_a_step_with_finite_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), LossScaler("cpu")
    for norm, skipped in ((1.0, 0), (float("nan"), 1), (float("inf"), 2)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        clipped_step(optimizer, scaler, torch.tensor(norm), 1.0)
        scaler.update()
        assert torch.equal(weight.detach(), before) == (skipped > 0)
        assert scaler.skipped == skipped


def test_a_gradient_of_the_discriminator_that_is_not_finite_stops_fp16_too(recipe, tmp_path):
    trainer = fp16_trainer(recipe, tmp_path, [False] * 2)
    norms = iter((torch.tensor(1.0), torch.tensor(float("nan"))))
    trainer.task.after_backward = lambda *args: next(norms)
    trainer._train_step()
    trainer.state.step += 1
    before = trainer.task.module[0].weight.detach().clone()
    with pytest.raises(UserError, match="gradient of the discriminator is not finite at step 1"):
        trainer._train_step()
    assert torch.equal(trainer.task.module[0].weight.detach(), before)


def test_the_trainer_skips_counts_saves_and_stops(recipe, tmp_path):
    overflows = [False, True, False] + [True] * 21
    trainer = fp16_trainer(recipe, tmp_path, overflows)
    weight = trainer.task.module[0].weight
    moved = []
    for _ in range(23):
        before = weight.detach().clone()
        trainer._train_step()
        moved.append(not torch.equal(weight.detach(), before))
        trainer.state.step += 1
    assert moved == [not overflow for overflow in overflows[:23]]
    with pytest.raises(UserError, match="21 optimizer steps in a row were skipped until step 24"):
        trainer._train_step()
    trainer._save()
    saved = trainer.checkpointer.read()["scaler"]
    assert (saved["skipped"], saved["skipped_in_row"], saved["scale"]) == (22, 21, 2.0**-11)
