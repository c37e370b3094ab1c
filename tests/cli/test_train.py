"""``variant train`` and ``variant train-vae``."""

from pathlib import Path

from variant.cli.options import Train, TrainVae
from variant.cli.train import folder_of, resume_command


def test_a_stopped_run_prints_the_command_that_resumes_it():
    command = TrainVae(recipe="my recipes/tiny.toml", seed=3)
    assert folder_of(command) == Path("runs/tiny")
    assert resume_command("train-vae", command) == (
        "variant train-vae --recipe 'my recipes/tiny.toml' --out runs/tiny --seed 3 --resume"
    )


def test_the_command_that_resumes_several_processes_starts_as_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    rest = "-m variant.cli train --recipe digits --out runs/digits --resume"
    assert resume_command("train", Train(recipe="digits")) == (
        f"torchrun --nproc-per-node 8 {rest}"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two machines
    assert resume_command("train", Train(recipe="digits")) == f"torchrun ... {rest}"


def test_the_resume_command_keeps_the_start():
    command = Train(recipe="digits", start_from="my model")
    assert resume_command("train", command) == (
        "variant train --recipe digits --out runs/digits --start-from 'my model' --resume"
    )
