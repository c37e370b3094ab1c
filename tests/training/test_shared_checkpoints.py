"""Checkpoints of several processes: resumed bit for bit, and by another number of processes."""

import dataclasses
import random
import shutil
import signal

import pytest
import torch
from rank_jobs import Job, run
from test_distributed import ALL, MODES, in_mode, losses, train_on_two
from tiny_runs import CPU, assert_same, interrupt_after, metrics, quiet, tiny_recipe, trained_vae

from variant.errors import UserError
from variant.paths import file_sha256
from variant.training.checkpoint_folder import check_folder, read_contents, read_into
from variant.training.checkpoint_folder import stored_tensors as stored
from variant.training.checkpoint_schedule import OutputSection
from variant.training.checkpointer import Checkpointer
from variant.training.ema import EMASection
from variant.training.var_task import VARTask, train_var

STEPS, STOP = 6, 0  # 5 steps follow, and no evaluation comes before
# Modes whose runs are resumed in every way. Unless all are asked for, a run of DDP is resumed by
# FSDP2 and by one process only: test_distributed.py stops and resumes it in DDP.
FULL = MODES if ALL else ("fsdp2",)


@pytest.fixture(scope="module")
def recipe(folders, tmp_path_factory):
    """A recipe of 6 steps with an average, checkpoints after every second one and two kept."""
    recipe, replace = tiny_recipe(folders), dataclasses.replace
    out = tmp_path_factory.mktemp("vae")
    trained_vae(recipe, out)
    return replace(
        recipe,
        vae_training=replace(recipe.vae_training, weights=str(out / "vae-best.safetensors")),
        optim=replace(recipe.optim, accumulate=2, learning_rate=1e-2),
        schedule=replace(recipe.schedule, transition=1),
        ema=EMASection(0.5),
        output=OutputSection(checkpoint_every=9, checkpoint_steps=2, keep=2),
    )


def tensors_in(folder):
    """Every tensor of a checkpoint folder, whole."""
    check_folder(folder)
    tensors = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in stored(folder).items()}
    read_into(folder, tensors)
    return tensors


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """Results of two processes by name, and their folders: whole, stopped and resumed runs."""
    root, jobs = tmp_path_factory.mktemp("shared"), {}
    alone = root / "alone"
    stopped = run_alone(recipe, alone, STOP)
    assert stopped["ended"] == "exit 143"
    for mode in MODES:
        chosen, other = in_mode(recipe, mode), in_mode(recipe, MODES[mode == "ddp"])
        folder, copy = root / f"{mode} stopped", root / f"{mode} one"
        jobs[f"{mode} stop"] = Job(chosen, folder, stop_at=STOP)
        if mode in FULL:
            parted = root / f"{mode} parted"
            jobs[f"{mode} whole"] = Job(chosen, root / f"{mode} whole")
            jobs[f"{mode} other"] = Job(other, folder, resume=True, copy_before=parted)
            jobs[f"{mode} parted"] = Job(chosen, parted, resume=True, copy_before=copy)
            shutil.copytree(alone, root / f"{mode} from one")
            jobs[f"{mode} from one"] = Job(chosen, root / f"{mode} from one", resume=True)
        else:
            jobs[f"{mode} other"] = Job(other, folder, resume=True, copy_before=copy)
    results, _ = train_on_two(list(jobs.values()), root / "jobs")
    return dict(zip(jobs, results, strict=True)), root


def run_alone(recipe, out, stop_at=None, **rest):
    """The result of a run of this process; it gets SIGTERM in a step."""
    with pytest.MonkeyPatch.context() as patch:
        if stop_at is not None:
            interrupt_after(patch, VARTask, stop_at, signal.SIGTERM)
        return run(Job(recipe, out, **rest))


@pytest.mark.parametrize("mode", FULL)
def test_a_stopped_run_of_two_equals_one_that_was_not(trained, mode):
    results, root = trained
    whole, parted = root / f"{mode} whole", root / f"{mode} parted"
    for rank in range(2):
        assert (
            losses(results[f"{mode} parted"][rank])
            == losses(results[f"{mode} whole"][rank])[STOP + 1 :]
        )
    name = f"var-step-{STEPS:08d}"
    tensors = [tensors_in(folder / name) for folder in (whole, parted)]
    assert {key.split(".")[0] for key in tensors[0]} == {"module", "ema", "optimizer"}
    assert_same(*tensors)
    assert metrics(whole) == metrics(parted)
    for file in ("var-best.safetensors", "model.safetensors"):
        assert (whole / file).read_bytes() == (parted / file).read_bytes()
    for folder in (whole, parted):
        contents = read_contents(folder / name)
        assert contents["step"] == STEPS
        assert not list(folder.glob(".*"))
    assert sorted(path.name for path in whole.glob("var-step-*")) == ["var-step-00000004", name]
    for checkpoint in whole.glob("var-step-*"):
        best = checkpoint / "best.safetensors"
        assert file_sha256(best) == read_contents(checkpoint)["best_sha256"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_go_on_as_one_and_in_the_other_mode(trained, recipe, mode):
    results, root = trained
    assert [result["ended"] for result in results[f"{mode} stop"]] == ["exit 143"] * 2
    expected = losses(results[f"{FULL[-1]} whole"][0])[STOP + 1 :]
    assert losses(results[f"{mode} other"][0]) == pytest.approx(expected, rel=1e-5)
    out = root / f"{mode} one"
    result = run_alone(recipe, out, resume=True)
    assert losses(result) == pytest.approx(expected, rel=1e-5)
    # The one-file form takes the place of the older folders, two of all are kept.
    assert sorted(path.name for path in out.glob("var-step-*")) == [
        "var-step-00000004-best.safetensors",
        "var-step-00000004.pt",
    ]
    assert Checkpointer(out, "var").read()["step"] == STEPS


@pytest.mark.parametrize("mode", FULL)
def test_one_process_goes_on_as_two(trained, mode):
    results, root = trained
    expected = losses(results[f"{mode} whole"][0])[STOP + 1 :]
    assert losses(results[f"{mode} from one"][0]) == pytest.approx(expected, rel=1e-5)
    out = root / f"{mode} from one"
    assert not (out / "var-last.pt").exists()
    assert Checkpointer(out, "var").read()["step"] == STEPS


def test_a_flipped_bit_in_a_shared_checkpoint_stops_the_run_by_name(trained, recipe, tmp_path):
    _, root = trained
    folder = tmp_path / "run"
    shutil.copytree(root / "fsdp2 whole", folder)
    checkpoint, draw = folder / f"var-step-{STEPS:08d}", random.Random(5)
    for path in [path for path in checkpoint.iterdir() if path.name != "best.safetensors"]:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged") as caught:
            train_var(recipe, folder, resume=True, console=quiet(), device=CPU)
        assert path.name in str(caught.value)
        assert "var-step-00000004 is an older checkpoint: remove var-step-" in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    shutil.rmtree(checkpoint)
    (folder / "var-best.safetensors").unlink()
    result = run_alone(recipe, folder, resume=True)
    assert list(result["losses"]) == [4, 5]
    assert (folder / "var-last.pt").exists()
