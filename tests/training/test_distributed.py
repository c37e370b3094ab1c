"""Several processes train the model that one process trains, and end together."""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rank_jobs import Job, run
from tiny_runs import CPU, quiet
from torch.distributed import TCPStore

from variant.training.logging_section import LoggingSection
from variant.training.parallel import ParallelSection
from variant.training.vae_task import train_vae

HERE = Path(__file__).parent
MODES = ("ddp", "fsdp2")
STEPS = 8
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
