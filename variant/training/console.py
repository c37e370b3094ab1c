"""The output of a training run: a progress bar, a line per epoch, how to resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from variant.paths import printable
from variant.training.phase_ends import ENDED
from variant_kernels.wording import counted

# Seconds between lines of progress where there is no bar.
LINE_EVERY = 60.0


class _LossyOutput:
    """A text stream that loses what it cannot write, and raises nothing.

    Standard output may be a file on the disk that a checkpoint has filled, a pipe whose reader is
    gone, or a terminal that was closed: a run that trains for days goes on without them.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lossy(console: Console) -> Console:
    """The same console, whose prints raise no OSError from now on."""
    if not isinstance(console.file, _LossyOutput):
        console.file = cast("IO[str]", _LossyOutput(console.file))
    return console


class RunConsole:
    """Prints one run's progress: lines, and a bar on terminals. What cannot be printed is lost.

    Args:
        kind: of the task, the first word of each line.
        epochs, total_steps: of the complete run.
        console: None prints to standard output.
    """

    def __init__(
        self, kind: str, epochs: int, total_steps: int, console: Console | None = None
    ) -> None:
        self.kind, self.epochs, self.total_steps = kind, epochs, total_steps
        self.console = lossy(console or Console())
        self._last_line = -math.inf

    @contextmanager
    def progress_bar(self) -> Iterator[Callable[[int, float | None], None]]:
        """Show the bar within the block; yields a function that moves it.

        That function takes the number of completed steps and the loss of the last one that was
        read, or None. Without a terminal it prints a line when it gets the first loss, and then
        where no line came for a minute.
        """
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with progress:
            bar = progress.add_task(self.kind, total=self.total_steps, loss="")
            self._last_line = -math.inf

            def move(step: int, loss: float | None) -> None:
                text = "" if loss is None else f"loss {loss:.4f}"
                # phases = "auto" may have shortened the run.
                progress.update(bar, completed=step, total=self.total_steps, loss=text)
                if text and not self.console.is_terminal and self._is_line_due():
                    self._print(f"{self.kind} step {step}/{self.total_steps}  {text}")

            yield move

    def print_start(
        self, num_train: int, device: str, step: int, changes: Sequence[str] = ()
    ) -> None:
        """Print the size of the run before its first step.

        Args:
            num_train: training images.  step: completed steps of a resumed run.
            changes: differences to the recipe of the run that is resumed.
        """
        where = f"from step {step} of" if step else "for"
        self._print(
            f"{self.kind}: training on {counted(num_train, 'image')} with {device}, {where} "
            f"{counted(self.total_steps, 'step')}, {counted(self.epochs, 'epoch')}"
        )
        if changes:
            self._print(f"changed since the run began: {', '.join(changes)}")

    def print_preparation(self, what: str, done: int, total: int) -> None:
        """Print how far the work before the first step is, at most every minute."""
        if self._is_line_due():
            self._print(f"{self.kind}: {done} of {total} {what}")

    def print_step(self, line: Mapping[str, float]) -> None:
        """Print the most important values of a line of the file of steps."""
        self._last_line = time.monotonic()
        losses = {
            key.removeprefix("loss/"): value
            for key, value in line.items()
            if key.startswith("loss/")
        }
        text = f"{self.kind} step {line['step']:.0f}/{self.total_steps}  {_losses(losses)}"
        text += _use_of_codes(line)
        text += f"  lr {line['optim/learning_rate']:.2e}"
        if "schedule/subnet_probability" in line:
            text += f"  p {line['schedule/subnet_probability']:.2f}"
        text += f"  {line['speed/images_per_second']:,.0f} images/s"
        if "speed/mfu" in line:
            text += f", MFU {line['speed/mfu']:.1%}"
        if line["data/share_waited"] >= 0.01:
            text += f", {line['data/share_waited']:.0%} of the time waiting for data"
        self._print(f"{text}  about {duration(line['time/seconds_left'])} left")

    def print_note(self, text: str) -> None:
        """Print a line about the run as a whole."""
        self._print(f"{self.kind}: {text}")

    def print_epoch(self, entry: Mapping[str, Any]) -> None:
        """Print the losses of a finished epoch, an entry of the run's history."""
        line = f"{self.kind} epoch {entry['epoch']}/{self.epochs}  train: "
        line += _losses(entry["train"])
        if "held_out" in entry:
            line += f"  held out: {_losses(entry['held_out'])}"
        if "ema_held_out" in entry:
            line += f"  of the moving average: {_losses(entry['ema_held_out'])}"
        seconds, step = entry["seconds"], entry["step"]
        remaining = seconds / step * (self.total_steps - step)
        line += f"  {duration(seconds)}, about {duration(remaining)} left"
        self._print(line)
        if ENDED in entry:
            self._print(
                f"{self.kind}: the {entry[ENDED]} phase ends with epoch {entry['epoch']}, because "
                "the held-out loss has stopped falling"
            )
        if "held_out_by_scale" in entry:
            self._print(f"  held out by scale: {_rows(entry['held_out_by_scale'])}")

    def print_unwritten(self, step: int, error: Exception) -> None:
        """Print why a file could not be written after ``step`` steps, and that the run goes on."""
        reason = " ".join(str(error).split())
        self._print(
            f"{self.kind} step {step}: {reason}; the run goes on, and the files of before stay"
        )

    def print_stop(self, step: int, resume_command: str) -> None:
        """Print that the run stopped after ``step`` steps, and the command that resumes it."""
        self._print(
            f"stopped after step {step} of {self.total_steps}; everything is saved. "
            f"Resume with: {resume_command}"
        )

    def _is_line_due(self) -> bool:
        now = time.monotonic()
        is_due = now - self._last_line >= LINE_EVERY
        if is_due:
            self._last_line = now
        return is_due

    def _print(self, text: str) -> None:
        # Names of files may hold brackets, or a word between colons.
        self.console.print(
            printable(text), soft_wrap=True, highlight=False, markup=False, emoji=False
        )


def _losses(losses: Mapping[str, float]) -> str:
    """``full 3.8842 | depth 4 3.8850 | depth 2 3.8861``; a name of digits is a subnet's depth."""
    return _rows({name: [loss] for name, loss in losses.items()}, digits=4)


def _rows(rows: Mapping[str, Sequence[float]], digits: int = 2) -> str:
    """The same with several numbers for a name."""
    depths = sorted((name for name in rows if name.isdigit()), key=int, reverse=True)
    labels = {name: name for name in rows if not name.isdigit()}
    labels |= {depth: f"depth {depth}" for depth in depths}
    texts = {name: " ".join(f"{number:.{digits}f}" for number in rows[name]) for name in labels}
    return " | ".join(f"{label} {texts[name]}" for name, label in labels.items())


def _use_of_codes(line: Mapping[str, float]) -> str:
    """``  codes used 25 78 100 %``, scale by scale; empty where no codes are counted."""
    start = "codes_used/"
    scales = sorted(int(key.removeprefix(start)) for key in line if key.startswith(start))
    shares = [f"{100 * line[f'{start}{k}']:.0f}" for k in scales]
    return f"  codes used {' '.join(shares)} %" if shares else ""


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
