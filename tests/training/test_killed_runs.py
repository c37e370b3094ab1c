"""kill -9: a run that is killed again and again ends with the files of one that never was."""

import json
import os
import pickle
from pathlib import Path

import torch
from tiny_runs import assert_same, metrics, steps_of

from tests.forked_program import run_forked
from tests.robustness.forked import option

HERE = Path(__file__).parent
# Events that a sitting has more than the one before it; `make nightly` tries every one.
STRIDE = option("KILLED_STRIDE", 5)


def test_runs_killed_again_and_again_equal_runs_that_never_were(recipe, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = run_forked(
        *(HERE / "killed_run.py", whole, parted, STRIDE),
        input=pickle.dumps(recipe),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    for kind in ("vae", "var"):
        assert kills[kind] >= 2
        assert metrics(parted, kind) == metrics(whole, kind)
        assert steps_of(parted, kind) == steps_of(whole, kind)
        states = [torch.load(f / f"{kind}-last.pt", weights_only=True) for f in (whole, parted)]
        for part in ("step", "module", "random", "best_sha256", "inputs"):
            assert_same(states[0][part], states[1][part])
        assert_same(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])
    for name in ("vae-best.safetensors", "var-best.safetensors", "model.safetensors"):
        assert (parted / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in parted.iterdir()} == {path.name for path in whole.iterdir()}
