"""``variant train`` and ``variant train-vae``."""

from pathlib import Path

from variant.cli.options import TrainVae
from variant.cli.train import folder_of, resume_command


def test_a_stopped_run_prints_the_command_that_resumes_it():
    command = TrainVae(recipe="my recipes/tiny.toml", seed=3)
    assert folder_of(command) == Path("runs/tiny")
    assert resume_command("train-vae", command) == (
        "variant train-vae --recipe 'my recipes/tiny.toml' --out runs/tiny --seed 3 --resume"
    )
