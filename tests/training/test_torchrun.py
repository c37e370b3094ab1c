"""The documented command of several processes, as users type it: its files, lines and codes."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_runs import tiny_recipe, trained_vae

from variant import VARiant
from variant.training.recipe_reference import recipe_toml

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


def torchrun(*words):
    """The finished processes; their lines are standard output's, torchrun's standard error's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "variant.training", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.nightly  # test_distributed.py trains with two processes in CI
def test_torchrun_trains_a_model_and_resumes_it_in_the_other_mode(folders, tmp_path):
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    tiny = tiny_recipe(folders)
    recipe.write_text(recipe_toml(tiny))
    trained_vae(tiny, out)

    done = torchrun(recipe, "--out", out, "--parallel.mode", "ddp", "--schedule.refinement", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    # Rank 0 alone prints.
    assert done.stdout.count("var epoch 3/3") == 1
    assert done.stdout.count("for 6 steps, 3 epochs") == 1

    done = torchrun(recipe, "--out", out, "--parallel.mode", "fsdp2", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 6 of 8 steps" in done.stdout
    assert "variant: warning: " not in done.stderr
    images = VARiant.from_pretrained(out).generate([0, 1], depth=2, seed=0).images
    assert images.shape == (2, 3, 8, 8)


def test_a_mistake_is_one_line_of_each_process(tmp_path):
    done = torchrun("no-such-recipe", "--out", tmp_path / "run")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("variant: error: ")]
    assert len(errors) == 2
    assert all("no-such-recipe: no such recipe" in line for line in errors)
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # torchrun's own
