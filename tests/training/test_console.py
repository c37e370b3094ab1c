"""The output of a training run."""

import io

import pytest
from rich.console import Console

from variant.training.console import RunConsole


def printed(entry, kind="var"):
    console = Console(file=io.StringIO(), width=200)
    RunConsole(kind, epochs=4, total_steps=40, console=console).print_epoch(entry)
    return console.file.getvalue()


def test_losses_are_labelled_and_in_a_fixed_order():
    losses = {"full": 3.5, "16": 3.625, "2": 3.75}
    for train in (losses, dict(sorted(losses.items())), dict(reversed(losses.items()))):
        entry = {"epoch": 1, "step": 10, "train": train, "held_out": losses, "seconds": 20.0}
        shown = "full 3.5000 | depth 16 3.6250 | depth 2 3.7500"
        assert printed(entry) == (
            f"var epoch 1/4  train: {shown}  held out: {shown}  20 s, about 60 s left\n"
        )


def test_an_epoch_without_evaluation_prints_its_training_loss_alone():
    entry = {"epoch": 3, "step": 30, "train": {"loss": 0.25}, "seconds": 6.0}
    assert printed(entry, "vae") == "vae epoch 3/4  train: loss 0.2500  6 s, about 2 s left\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_is_shown_on_terminals_only(is_terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    run = RunConsole("vae", epochs=1, total_steps=4, console=console)
    with run.progress_bar() as move_bar:
        move_bar(2, 0.5)
    assert ("vae" in console.file.getvalue()) is is_terminal


def test_the_first_line_tells_the_size_of_the_run():
    console = Console(file=io.StringIO(), width=200)
    run = RunConsole("var", epochs=4, total_steps=40, console=console)
    run.print_start(24, "cpu", 0)
    run.print_start(24, "cuda:0", 7, ["data.workers 2 -> 1", "name 'a' -> 'b'"])
    assert console.file.getvalue().splitlines() == [
        "var: training on 24 images with cpu, for 40 steps, 4 epochs",
        "var: training on 24 images with cuda:0, from step 7 of 40 steps, 4 epochs",
        "changed since the run began: data.workers 2 -> 1, name 'a' -> 'b'",
    ]


def test_without_a_terminal_a_line_is_printed_every_minute(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("variant.training.console.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    run = RunConsole("vae", epochs=1, total_steps=9, console=console)
    for done in range(4):
        now[0] += 25
        run.print_preparation("images tokenized", done, 4)
    with run.progress_bar() as move_bar:
        for step in range(1, 7):
            now[0] += 25
            move_bar(step, step / 8)
    assert console.file.getvalue().splitlines() == [
        "vae: 0 of 4 images tokenized",
        "vae: 3 of 4 images tokenized",
        "vae step 3/9  loss 0.3750",
        "vae step 6/9  loss 0.7500",
    ]
