"""``variant train`` and ``variant train-vae``."""

import shlex
from pathlib import Path

import pytest

from variant.cli.options import Generate, Tokenize, Train, TrainVae
from variant.cli.parser import parse
from variant.cli.tokenize import train_command
from variant.cli.train import folder_of, resume_command
from variant.cli.words import command_line


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


@pytest.mark.parametrize("name", ["-x", "--out", "~/x", "a b", "x'y", "-1"])
def test_commands_that_are_printed_can_be_given(name, monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    train = Train(recipe=name, out=Path(name), start_from=name, overrides=(f"data.train={name}",))
    vae = Tokenize(recipe=name, vae=Path(name))
    for text, expected in (
        (command_line("generate", Generate(model=name, labels=(name,), out=Path(name))),
         {"model": name, "labels": (name,), "out": Path(name)}),
        (resume_command("train", train), {"recipe": name, "out": Path(name), "start_from": name}),
        (train_command(vae, Path(name)), {"recipe": name, "out": Path(name)}),
    ):  # fmt: skip
        given = parse(shlex.split(text)[1:])
        assert {key: str(getattr(given, key)) for key in expected} == {
            key: str(value).replace("~/x", "./~/x") if key != "out" else str(value)
            for key, value in expected.items()
        }
