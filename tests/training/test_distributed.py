"""Several processes train the model that one process trains, and end together."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_jobs import Job, run
from tiny_runs import CPU, assert_same, quiet
from torch.distributed import TCPStore

from variant.training.checkpoint_folder import read_into, stored_tensors
from variant.training.checkpointer import Checkpointer
from variant.training.logging_section import LoggingSection
from variant.training.parallel import ParallelSection
from variant.training.vae_task import train_vae

HERE = Path(__file__).parent
MODES = ("ddp", "fsdp2")
STEPS = 8
# The steps in which a run is stopped, the first of an epoch and its last: "all" tries every one.
ALL = os.environ.get("VARIANT_TRAINING_STOPS") == "all"
STOPS = {"ddp": range(STEPS - 1) if ALL else (2,), "fsdp2": range(STEPS - 1) if ALL else (3,)}
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def base(folders, tmp_path_factory):
    """A recipe of 8 steps whose VQ-VAE is trained, with two parts and everything that is drawn."""
    from tiny_runs import tiny_recipe

    recipe = tiny_recipe(folders)
    out = tmp_path_factory.mktemp("vae")
    train_vae(recipe, out, console=quiet(), device=CPU)
    replace = dataclasses.replace
    return replace(
        recipe,
        model=replace(recipe.model, depth=4, cond_drop_rate=0.3, drop_path_rate=0.3),
        vae_training=replace(recipe.vae_training, weights=str(out / "vae-best.safetensors")),
        data=replace(recipe.data, mixup=0.5),
        optim=replace(recipe.optim, accumulate=2, learning_rate=1e-2),
        # Of 8 steps, some of each configuration.
        schedule=replace(
            recipe.schedule, joint_probability=0.5, joint=4, transition=0, refinement=0
        ),
        logging=LoggingSection(every=3, tensorboard=TENSORBOARD, samples_every=4),
    )


def in_mode(recipe, mode, **changes):
    return dataclasses.replace(recipe, parallel=ParallelSection(mode), **changes)


def train_on_two(jobs, folder, *, check=True):
    """Run jobs in two processes.  Returns: the results of each job, one per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    # Held here, as torchrun holds its own; the system chooses free ports.
    stores = [TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60)) for _ in jobs]
    ports = ",".join(str(store.port) for store in stores)
    processes = []
    for rank in range(2):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        }
        command = [sys.executable, str(HERE / "rank_jobs.py"), str(folder / "jobs"), ports]
        processes.append(
            subprocess.Popen(
                [*command, str(folder / f"rank{rank}.json")],
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300) for process in processes]
    if check:
        assert [process.returncode for process in processes] == [0, 0], outputs
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    ranks = [json.loads(file.read_text()) if file.exists() else [] for file in files]
    return list(zip(*ranks, strict=True)) if check else (ranks, outputs, processes)


def losses(result):
    return list(result["losses"].values())


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    """The results of one process and of two in both modes, by job; the trained folders."""
    root = tmp_path_factory.mktemp("together")
    bf16 = dataclasses.replace(base.optim, precision="bf16")
    no_bridge = dataclasses.replace(base.schedule, bridge=0)
    recipes = {
        "fp32": base,
        "bf16": dataclasses.replace(base, optim=bf16),
        "no bridge": dataclasses.replace(base, schedule=no_bridge),
    }
    one = {name: run(Job(recipe, root / f"one {name}")) for name, recipe in recipes.items()}
    keys = [(name, mode) for name in recipes for mode in MODES]
    jobs = [Job(in_mode(recipes[name], mode), root / f"{name} {mode}") for name, mode in keys]
    two = dict(zip(keys, train_on_two(jobs, root / "jobs"), strict=True))
    return one, two, root


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_report_what_one_does(together, mode):
    _, _, root = together
    folders = root / "one fp32", root / f"fp32 {mode}"
    one, two = (
        [json.loads(line) for line in (folder / "var-steps.jsonl").read_text().splitlines()]
        for folder in folders
    )
    assert [line["step"] for line in two] == [2, 3, 4, 6, 8]
    clocked = ("speed/", "data/", "memory/", "time/")
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys()
        assert any(key.endswith("/full_only") for key in shared)
        for key, value in shared.items():
            if not key.startswith(clocked):
                assert value == pytest.approx(alone[key], rel=1e-4), key
    pictures = [folder / "var-samples-0004.png" for folder in folders]
    alone, shared = (np.asarray(Image.open(path)).astype(int) for path in pictures)
    assert np.abs(alone - shared).max() <= 2
    assert len(list((folders[1]).glob("tensorboard/var/events*"))) == TENSORBOARD


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3), ("no bridge", 1e-5)]
)
def test_two_processes_have_the_losses_of_one(together, name, mode, tolerance):
    one, two, _ = together
    first, second = two[name, mode]
    assert first["ended"] == second["ended"] == one[name]["ended"] == "finished"
    assert set(one[name]["names"].values()) == {"full", "2"}
    assert len(losses(first)) == STEPS
    assert losses(first) == losses(second)
    assert losses(first) == pytest.approx(losses(one[name]), rel=tolerance)
    assert (
        first["held_out"]
        == second["held_out"]
        == pytest.approx(one[name]["held_out"], rel=tolerance)
    )
    assert first["train"] == pytest.approx(one[name]["train"], rel=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_is_missing_with_a_bridge_and_skipped_layers_have_none_without(together, mode):
    two = together[1]
    assert all(names == [] for names in two["fp32", mode][0]["missing"].values())
    first = two["no bridge", mode][0]
    missing = {
        step: {name.split(".")[1] for name in names} for step, names in first["missing"].items()
    }
    # The subnet of 2 of the 4 layers has layers 0 and 3.
    assert missing == {
        step: {"1", "2"} if name == "2" else set() for step, name in first["names"].items()
    }


def tensors_in(folder):
    """Every tensor of the last checkpoint of several processes, whole."""
    path = Checkpointer(folder, "var").path
    stored = stored_tensors(path)
    tensors = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in stored.items()}
    read_into(path, tensors)
    return tensors


@pytest.fixture(scope="module")
def resumed(base, together, tmp_path_factory):
    """Folders of runs that were stopped after a step and resumed, and how their sittings ended."""
    root = tmp_path_factory.mktemp("resumed")
    jobs, keys = [], []
    for mode, steps in STOPS.items():
        recipe = in_mode(base, mode)
        for step in steps:
            out = root / f"{mode} {step}"
            jobs += [Job(recipe, out, stop_at=step), Job(recipe, out, resume=True)]
            keys += [(mode, step, "stopped"), (mode, step, "resumed")]
    ended = dict(zip(keys, train_on_two(jobs, root / "jobs"), strict=True))
    return ended, root


@pytest.mark.parametrize(("mode", "step"), [(mode, step) for mode in STOPS for step in STOPS[mode]])
def test_a_run_that_is_stopped_and_resumed_has_the_same_weights(together, resumed, mode, step):
    ended, root = resumed
    for rank in range(2):  # the signal came to rank 1 only
        assert ended[mode, step, "stopped"][rank]["ended"] == "exit 143"
        assert list(ended[mode, step, "stopped"][rank]["losses"]) == [
            str(n) for n in range(step + 1)
        ]
        assert ended[mode, step, "resumed"][rank]["ended"] == "finished"
    assert "stopped after step" in ended[mode, step, "stopped"][0]["printed"]
    assert ended[mode, step, "stopped"][1]["printed"] == ""
    whole, parted = together[2] / f"fp32 {mode}", root / f"{mode} {step}"
    assert_same(tensors_in(parted), tensors_in(whole))
    assert (parted / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_draw_different_configurations_end_with_an_error_that_names_both(
    base, tmp_path, mode
):
    (ranks,) = train_on_two([Job(in_mode(base, mode), tmp_path / "run", differ_at=2)], tmp_path)
    for result in ranks:
        pattern = r"the same configuration; rank 0 has (\w+), .*, rank 1 has (\w+), .*step 2"
        assert set(re.search(pattern, result["ended"]).groups()) == {"full", "2"}
        assert len(result["losses"]) == 2


def test_the_rank_that_is_left_names_the_lost_one_and_ends(base, tmp_path):
    job = Job(in_mode(base, "fsdp2"), tmp_path / "run", kill_at=2)
    started = time.monotonic()
    (first, _), _, processes = train_on_two([job], tmp_path, check=False)
    assert time.monotonic() - started < 60
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL]
    assert f"rank 1 (process {processes[1].pid} on " in first[0]["ended"]
    assert "is lost" in first[0]["ended"]
