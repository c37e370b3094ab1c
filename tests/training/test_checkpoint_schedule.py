"""When checkpoints are due, which are kept, and what happens when one cannot be written."""

import dataclasses
import errno
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    CPU,
    assert_same,
    interrupt_after,
    metrics,
    quiet,
    resume,
    train_both,
    trained_vae,
)

from variant import folder_lock
from variant.errors import UserError
from variant.training import checkpoint_files
from variant.training import checkpointer as checkpointer_module
from variant.training.checkpoint_schedule import CheckpointSchedule, OutputSection
from variant.training.checkpointer import Checkpointer
from variant.training.trainer import Trainer
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var


def with_output(recipe, **values):
    return dataclasses.replace(recipe, output=OutputSection(**values))


def due_steps(section, steps, steps_per_epoch):
    schedule = CheckpointSchedule(section, steps_per_epoch, clock=lambda: 0.0)
    return [step for step in range(1, steps + 1) if schedule.is_due(step)]


def test_checkpoints_are_due_by_epochs_and_by_steps():
    assert due_steps(OutputSection(), 12, 4) == [4, 8, 12]
    assert due_steps(OutputSection(checkpoint_every=2), 12, 4) == [8]
    assert due_steps(OutputSection(checkpoint_every=9, checkpoint_steps=5), 12, 4) == [5, 10]
    assert due_steps(OutputSection(checkpoint_steps=3), 12, 4) == [3, 4, 6, 8, 9, 12]


def test_checkpoints_are_due_by_minutes():
    now = [100.0]
    section = OutputSection(checkpoint_every=99, checkpoint_minutes=0.5)
    schedule = CheckpointSchedule(section, 4, clock=lambda: now[0])
    assert not schedule.is_due(1)
    now[0] += 29
    assert not schedule.is_due(2)
    now[0] += 1
    assert schedule.is_due(3)
    assert not schedule.is_due(3, minutes_are_over=False)
    schedule.restart_clock()
    assert not schedule.is_due(4)
    now[0] += 30
    assert schedule.is_due(5)
    off = CheckpointSchedule(OutputSection(checkpoint_every=99), 4, clock=lambda: now[0])
    now[0] += 1e9
    assert not off.is_due(6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1; got 0"),
        ({"checkpoint_steps": -1}, "checkpoint_steps must be >= 0; got -1"),
        ({"checkpoint_minutes": -0.5}, "checkpoint_minutes must be >= 0; got -0.5"),
        ({"keep": 0}, "keep must be >= 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OutputSection(**values)


def saved_steps(monkeypatch):
    """The steps at which checkpoints are written from now on."""
    steps, save = [], Checkpointer.save

    def watched(self, state, **rest):
        save(self, state, **rest)
        steps.append(state.step)

    monkeypatch.setattr(Checkpointer, "save", watched)
    return steps


def test_a_run_saves_by_steps_and_by_minutes(recipe, tmp_path, monkeypatch):
    steps = saved_steps(monkeypatch)
    by_steps = with_output(recipe, checkpoint_every=9, checkpoint_steps=3)
    train_vae(by_steps, tmp_path / "steps", console=quiet(), device=CPU)
    assert steps == [3, 4]
    steps.clear()
    monkeypatch.setattr(CheckpointSchedule, "minutes_are_over", property(lambda self: True))
    by_minutes = with_output(recipe, checkpoint_every=9, checkpoint_minutes=1)
    train_vae(by_minutes, tmp_path / "minutes", console=quiet(), device=CPU)
    assert steps == [1, 2, 3, 4]


def test_a_signal_at_a_saved_step_writes_no_second_checkpoint(recipe, tmp_path, monkeypatch):
    steps = saved_steps(monkeypatch)
    interrupt_after(monkeypatch, VAETask, 2)
    chosen = with_output(recipe, checkpoint_steps=3, keep=3)
    with pytest.raises(SystemExit):
        train_vae(chosen, tmp_path, console=quiet(), device=CPU)
    assert steps == [2, 3]
    assert [path.name for path in Checkpointer(tmp_path, "vae").files.older()] == [
        "vae-step-00000002.pt"
    ]


class Killed(BaseException):
    """Stands for kill -9: nothing may handle it."""


@pytest.mark.parametrize("kind", ["vae", "var"])
def test_a_step_checkpoint_resumes_in_mid_epoch_bit_for_bit(recipe, tmp_path, monkeypatch, kind):
    chosen = with_output(recipe, checkpoint_every=9, checkpoint_steps=1)
    train, task = {"vae": (train_vae, VAETask), "var": (train_var, VARTask)}[kind]
    total = {"vae": 4, "var": 8}[kind]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    if kind == "var":
        for folder in (whole, parted):
            trained_vae(recipe, folder)
    train(chosen, whole, console=quiet(), device=CPU)
    loss = task.loss

    def killing(at):
        def killed(self, indices, epoch, step):
            if step == at:
                raise Killed
            return loss(self, indices, epoch, step)

        return killed

    for at in range(1, total):  # each sitting makes one step
        monkeypatch.setattr(task, "loss", killing(at))
        with pytest.raises(Killed):
            train(chosen, parted, resume=at > 1, console=quiet(), device=CPU)
        assert torch.load(parted / f"{kind}-last.pt", weights_only=True)["step"] == at
    monkeypatch.setattr(task, "loss", loss)
    resume(chosen, parted, train)
    assert metrics(parted, kind) == metrics(whole, kind)
    states = [
        torch.load(folder / f"{kind}-last.pt", weights_only=True) for folder in (whole, parted)
    ]
    for part in ("module", "random", "sums", "best_sha256"):
        assert_same(states[0][part], states[1][part])
    assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])


# --- the last K ---------------------------------------------------------------------------------


def names(folder, pattern="vae-*"):
    return sorted(path.name for path in folder.glob(pattern))


def test_the_last_checkpoints_are_kept_with_their_best_weights(recipe, tmp_path):
    chosen = with_output(recipe, checkpoint_steps=1, keep=3)
    train_vae(chosen, tmp_path, console=quiet(), device=CPU)
    older = ["vae-step-00000002.pt", "vae-step-00000003.pt"]
    assert names(tmp_path, "vae-*.pt") == ["vae-last.pt", *older]
    for name in older:
        saved = torch.load(tmp_path / name, weights_only=True)
        best = tmp_path / name.replace(".pt", "-best.safetensors")
        assert saved["step"] == int(name[9:17])
        assert checkpointer_module.file_sha256(best) == saved["best_sha256"]
    assert not list(tmp_path.glob(".*"))


def test_a_run_goes_on_from_an_older_checkpoint_after_newer_ones_were_removed(recipe, tmp_path):
    chosen = with_output(recipe, checkpoint_steps=1, keep=4)
    train_both(chosen, tmp_path / "whole")
    parted = tmp_path / "parted"
    train_both(chosen, parted)
    last = parted / "var-last.pt"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    message = r"last.pt: is damaged.*; var-step-00000007.pt is an older .*: remove var-last.pt"
    with pytest.raises(UserError, match=message) as caught:
        resume(chosen, parted, train_var)
    assert "\n" not in str(caught.value)
    last.unlink()
    (parted / "var-step-00000007.pt").unlink()
    (parted / "var-best.safetensors").write_bytes(b"of a later epoch")
    resume(chosen, parted, train_var)  # from step 6
    assert metrics(parted) == metrics(tmp_path / "whole")
    for name in ("var-best.safetensors", "model.safetensors"):
        assert (parted / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert names(parted, "var-*.pt") == [
        "var-last.pt",
        *(f"var-step-0000000{step}.pt" for step in (5, 6, 7)),
    ]


def test_older_checkpoints_are_copied_where_files_have_one_name(recipe, tmp_path, monkeypatch):
    def no_links(*args, **rest):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    train_vae(with_output(recipe, checkpoint_steps=1, keep=2), tmp_path, console=quiet())
    assert names(tmp_path, "vae-step-*") == [
        "vae-step-00000003-best.safetensors",
        "vae-step-00000003.pt",
    ]
    saved = Checkpointer(tmp_path, "vae").read_from(tmp_path / "vae-step-00000003.pt")
    assert saved["step"] == 3


def lone_best(folder):
    """The best weights of older checkpoints that are not there."""
    found = [name.removesuffix("-best.safetensors") for name in names(folder, "vae-step-*-best*")]
    return [name for name in found if not (folder / f"{name}.pt").exists()]


@pytest.mark.parametrize(("function", "suffix"), [("unlink", "-best.safetensors"), ("link", ".pt")])
def test_best_weights_whose_checkpoint_a_killed_run_removed_do_not_stay(
    recipe, tmp_path, monkeypatch, function, suffix
):
    """Killed before it removes the second file of a checkpoint, or before it gives it its name."""
    chosen = with_output(recipe, checkpoint_steps=1, keep=2)
    owner = {"unlink": Path, "link": checkpoint_files}[function]
    original = getattr(owner, function)

    def killed(*paths, **rest):
        if paths[-1].name.endswith(suffix) and lone_best(tmp_path):
            raise Killed
        return original(*paths, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, killed)
        with pytest.raises(Killed):
            train_vae(chosen, tmp_path, console=quiet(), device=CPU)
    assert lone_best(tmp_path) == ["vae-step-00000002"]
    mine = tmp_path / "vae-step-mine-best.safetensors"
    mine.write_bytes(b"")
    resume(dataclasses.replace(chosen, output=OutputSection(keep=1)), tmp_path, train_vae)
    assert mine.exists()
    mine.unlink()
    assert lone_best(tmp_path) == []


def test_a_new_run_removes_no_weights(recipe, tmp_path):
    weights = tmp_path / "vae-step-00000002-best.safetensors"
    weights.write_bytes(b"perhaps those to start from")
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert weights.exists()


def test_leftovers_of_older_checkpoints_are_removed(tmp_path):
    checkpointer = Checkpointer(tmp_path, "var")
    (tmp_path / ".var-step-00000003.pt.77.tmp").write_text("")
    (tmp_path / "var-step-00000003.pt").write_text("")
    folder_lock.clear_leftovers(tmp_path, checkpointer.files.patterns)
    assert [path.name for path in tmp_path.iterdir()] == ["var-step-00000003.pt"]


# --- a full disk --------------------------------------------------------------------------------


def fail_writes(monkeypatch, is_full):
    """torch.save raises ENOSPC while ``is_full()``."""
    save = torch.save

    def full(contents, path):
        save(contents, path)
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpointer_module.torch, "save", full)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(recipe, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    chosen = with_output(recipe, checkpoint_steps=1)
    train_vae(chosen, whole, console=quiet(), device=CPU)
    steps, seen, console = [0], [], quiet()

    def is_full():
        steps[0] += 1
        if (parted / "vae-last.pt").exists():
            seen.append(Checkpointer(parted, "vae").read()["step"])
        return steps[0] in (2, 3)

    fail_writes(monkeypatch, is_full)
    train_vae(chosen, parted, console=console, device=CPU)
    assert seen == [1, 1, 1]  # that of the first step stays, whole
    lines = [line for line in console.file.getvalue().splitlines() if "the run goes on" in line]
    assert len(lines) == 2
    assert "vae step 2:" in lines[0]
    assert "vae-last.pt: cannot be written: No space left on device" in lines[0]
    assert metrics(parted, "vae") == metrics(whole, "vae")
    states = [torch.load(f / "vae-last.pt", weights_only=True) for f in (whole, parted)]
    for state in states:
        del state["log"]  # measured
        for part in (state, *state["history"]):
            del part["seconds"]
    assert_same(*states)
    assert not list(parted.glob(".*"))


@pytest.mark.parametrize("ending", ["end", "signal"])
def test_a_full_disk_at_the_end_or_at_a_signal_is_an_error(recipe, tmp_path, monkeypatch, ending):
    chosen = with_output(recipe, checkpoint_every=9)
    fail_writes(monkeypatch, lambda: True)
    if ending == "signal":
        interrupt_after(monkeypatch, VAETask, 2, signal.SIGTERM)
    with pytest.raises(UserError, match=r"vae-last.pt: cannot be written: No space left on device"):
        train_vae(chosen, tmp_path, console=quiet(), device=CPU)
    assert not (tmp_path / "vae-last.pt").exists()


def test_best_weights_that_cannot_be_written_are_not_recorded_as_kept(
    recipe, tmp_path, monkeypatch
):
    save, calls, console = checkpointer_module.save_safetensors, [0], quiet()

    def full(path, tensors, **rest):
        calls[0] += 1
        if calls[0] == 1:
            raise UserError(f"{path}: cannot be written: No space left on device")
        save(path, tensors, **rest)

    means = iter((3.0, 4.0))  # the first epoch would be the best one
    monkeypatch.setattr(checkpointer_module, "save_safetensors", full)
    monkeypatch.setattr(VAETask, "held_out_losses", lambda self, ranks: {"x": next(means)})
    summary = train_vae(recipe, tmp_path, console=console, device=CPU)
    assert "vae step 2: " in console.file.getvalue()
    assert summary.best_epoch == 2
    assert [entry.get("best_not_kept") for entry in metrics(tmp_path, "vae")] == [True, None]
    assert Checkpointer(tmp_path, "vae").read()["step"] == 4


def test_metrics_that_cannot_be_written_do_not_end_the_run(recipe, tmp_path):
    class Full(type(tmp_path)):
        pass

    console, append = quiet(), Trainer._end_epoch
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def end_epoch(self, started):
        if self.state.step == 2:  # files may not grow: the checkpoint and metrics fail for real
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        append(self, started)

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_end_epoch", end_epoch)
            loss = VAETask.loss

            def freeing(self, indices, epoch, step):
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                return loss(self, indices, epoch, step)

            patch.setattr(VAETask, "loss", freeing)
            train_vae(recipe, tmp_path, console=console, device=CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    lines = [line for line in console.file.getvalue().splitlines() if "the run goes on" in line]
    assert {line.split(":")[0] for line in lines} == {"vae step 2"}
    files = ("vae-best", "vae-metrics.jsonl", "vae-steps.jsonl", "vae-last.pt")
    assert len(lines) == len(files)
    for name, line in zip(files, lines, strict=True):
        assert name in line
    assert [entry["epoch"] for entry in metrics(tmp_path, "vae")] == [2]
