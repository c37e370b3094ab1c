"""Helpers of the training tests: start, stop and resume small runs."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from variant.data.config import DataSection
from variant.models.config import VQVAEConfig
from variant.training.checksum import append_checksum
from variant.training.optim import OptimSection
from variant.training.recipe import EvalSection, ModelSection, Recipe, VAETraining
from variant.training.schedule import ScheduleSection
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import train_var

OPTIM = OptimSection(batch_size=12, learning_rate=1e-3)
CPU = torch.device("cpu")


def tiny_recipe(folders, workers=0):
    """A recipe for the images in the folders ``train`` and ``held_out`` of ``folders``.

    Each worker imports torch, which takes longer than the training. Runs with workers are compared
    with those without in test_trainer.py and test_distributed.py; tests/robustness/kills.py kills
    them.
    """
    return Recipe(
        name="tiny",
        description="two classes of flat colours",
        model=ModelSection(depth=3, embed_dim=32, num_heads=2, num_classes=2),
        vae=VQVAEConfig(
            vocab_size=8,
            z_channels=4,
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            patch_nums=(1, 2, 4),
        ),
        vae_training=VAETraining(epochs=2, optim=OPTIM, revive_every=2, scale_dropout=0.5),
        data=DataSection(
            kind="folder",
            train=str(folders / "train"),
            held_out=str(folders / "held_out"),
            hflip=0.5,
            randaugment_ops=2,
            randaugment_magnitude=9,
            mixup=0.2,
            workers=workers,
        ),
        optim=OPTIM,
        schedule=ScheduleSection(depths=(2,), bridge=1, joint=1, transition=2, refinement=1),
        eval=EvalSection(batch_size=4),
    )


def quiet():
    """A console whose output is kept in ``console.file``."""
    return Console(file=io.StringIO(), width=200)


def with_precision(recipe, precision):
    return dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, precision=precision))


def metrics(folder, kind="var"):
    """The entries of a metrics file, without the seconds."""
    lines = (folder / f"{kind}-metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("seconds")
    return entries


def steps_of(folder, kind="var"):
    """The lines of a file of steps, without what clocks and the machine's memory give."""
    clocked = ("speed/", "data/", "memory/", "time/")
    lines = (folder / f"{kind}-steps.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(clocked)}
        for line in lines
    ]


def trained_vae(recipe, out):
    """Write the files of the training of the recipe's VQ-VAE into the folder ``out``.

    The first recipe with these settings trains it beside its folder of images, others get copies:
    for tests of what comes after it.
    """
    own = {"model", "optim", "schedule", "ema"}  # of the transformer
    settings = {key: value for key, value in recipe.to_dict().items() if key not in own}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    kept = Path(recipe.data.train).parents[1] / f"vae-{digest[:16]}"
    if not kept.exists():
        train_vae(recipe, kept.with_suffix(".part"), console=quiet(), device=CPU)
        kept.with_suffix(".part").rename(kept)
    shutil.copytree(kept, out, dirs_exist_ok=True)


def train_both(recipe, out):
    """Train the transformer on :func:`trained_vae`; returns its summary."""
    trained_vae(recipe, out)
    return train_var(recipe, out, console=quiet(), device=CPU)


def interrupt_after(monkeypatch, task, step, signum=signal.SIGINT):
    """Send a signal to this process, once, while that step runs."""
    original, sent = task.loss, []

    def loss(self, indices, epoch, current):
        if current == step and not sent:
            sent.append(current)
            os.kill(os.getpid(), signum)
        return original(self, indices, epoch, current)

    monkeypatch.setattr(task, "loss", loss)


def run_until(recipe, out, patch, train=train_vae, task=VAETask, step=2, **rest):
    """Start a run, stop it after that step (of its second epoch), return its output."""
    console = quiet()
    with patch.context() as inner:
        interrupt_after(inner, task, step)
        with pytest.raises(SystemExit):
            train(recipe, out, console=console, device=CPU, **rest)
    return console.file.getvalue()


def resume(recipe, out, train=train_vae):
    return train(recipe, out, resume=True, console=quiet(), device=CPU)


def rewrite(path, state=None, **changes):
    """Change or remove (None) entries of a checkpoint.

    state: what it holds, where it has been read; it is not changed.
    """
    state = dict(torch.load(path, weights_only=True) if state is None else state)
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, path)
    append_checksum(path)


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


def is_killed(work):
    """Do some work in a child process, which must end or be killed; returns whether it was."""
    child = os.fork()  # before any thread of OpenMP exists
    if child == 0:
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
