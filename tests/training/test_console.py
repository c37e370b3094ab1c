"""The output of a training run."""

import errno
import io
import os

import pytest
from rich.console import Console

from variant.training.console import RunConsole, duration


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


def test_losses_by_scale_have_a_line_of_their_own():
    entry = {"epoch": 1, "step": 10, "train": {"full": 2.0}, "seconds": 1.0}
    by_scale = {"2": [1.5, 2.25], "full": [1.0, 2.125]}
    lines = printed(entry | {"held_out_by_scale": by_scale}).splitlines()
    assert lines[1:] == ["  held out by scale: full 1.00 2.12 | depth 2 1.50 2.25"]


def test_a_line_of_steps_shows_what_matters_most():
    console = Console(file=io.StringIO(), width=200)
    run = RunConsole("var", epochs=4, total_steps=40, console=console)
    line = {"step": 10, "loss/full": 3.5, "loss/2": 3.75, "loss_by_scale/full/0": 1.0}
    line |= {"optim/learning_rate": 2e-4, "schedule/subnet_probability": 0.25}
    line |= {"speed/images_per_second": 1234.5, "data/share_waited": 0.005, "time/seconds_left": 89}
    run.print_step(line)
    run.print_step(line | {"data/share_waited": 0.256, "time/seconds_left": 100_000})
    shown = "var step 10/40  full 3.5000 | depth 2 3.7500  lr 2.00e-04  p 0.25  1,234 images/s"
    assert console.file.getvalue().splitlines() == [
        f"{shown}  about 89 s left",
        f"{shown}, 26% of the time waiting for data  about 27 h 47 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (91, "2 min"), (5360, "89 min"), (5400, "1 h 30 min"),
     (129_480, "35 h 58 min"), (129_600, "1 d 12 h"), (4.1e6, "47 d 11 h")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_is_shown_on_terminals_only(is_terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    run = RunConsole("vae", epochs=1, total_steps=4, console=console)
    with run.progress_bar() as move_bar:
        move_bar(2, 0.5)
    assert ("━" in console.file.getvalue()) is is_terminal


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


def test_without_a_terminal_a_line_follows_the_first_step_and_every_minute(monkeypatch):
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
        "vae step 1/9  loss 0.1250",
        "vae step 4/9  loss 0.5000",
    ]


class FillingDisk(io.StringIO):
    """A stream that cannot be written while it ``is_full``.  terminal: what ``isatty`` says."""

    def __init__(self, *, terminal):
        super().__init__()
        self.terminal, self.is_full = terminal, False

    def isatty(self):
        return self.terminal

    def write(self, text):
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)

    def flush(self):
        self.write("")


@pytest.mark.parametrize("terminal", [False, True])
def test_what_cannot_be_printed_is_lost_and_ends_no_run(terminal):
    stream = FillingDisk(terminal=terminal)
    run = RunConsole("var", epochs=1, total_steps=4, console=Console(file=stream, width=200))
    with run.progress_bar() as move:
        run.print_note("first")
        stream.is_full = True
        run.print_unwritten(2, OSError(errno.ENOSPC, "disk full"))
        move(2, 1.0)
        stream.is_full = False
        run.print_note("last")
    shown = stream.getvalue()
    assert "first" in shown
    assert "disk full" not in shown
    assert "last" in shown


def test_a_pipe_without_a_reader_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    RunConsole("var", epochs=1, total_steps=4, console=Console(file=stream)).print_note("lost")
    with pytest.raises(BrokenPipeError):  # what was to be printed is still in the buffer
        stream.close()


def test_names_of_files_are_printed_as_they_are():
    console = Console(file=io.StringIO(), width=200)
    run = RunConsole("var", epochs=4, total_steps=40, console=console)
    # rich takes these for the end of a style, an emoji and a style.
    command = "variant train --out 'runs/[/a]:x:[b]' --resume"
    run.print_stop(10, command)
    run.print_unwritten(10, OSError("runs/[/a]: No space left on \x1b[31mdevice"))
    stopped, unwritten = console.file.getvalue().splitlines()
    assert stopped.endswith(f"everything is saved. Resume with: {command}")
    assert unwritten.startswith("var step 10: runs/[/a]: No space left on \\x1b[31mdevice; ")
