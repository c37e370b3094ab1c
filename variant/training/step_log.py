"""What a run measures while it trains, and the lines of its steps.

Values are collected on the device and read once a line, so that no step waits for the device. A
line is written every ``[logging] every`` steps and at the end of each epoch. Its keys are listed in
docs/training.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from variant.errors import UserError
from variant.training.console import RunConsole
from variant.training.gpu_peaks import peak_rate
from variant.training.gradient_norms import GradientNorms
from variant.training.loss_scale import LossScaler
from variant.training.memory_use import memory_use
from variant.training.meters import Meters
from variant.training.parallel import unsharded
from variant.training.run_setup import RunSetup
from variant.training.run_state import RunState
from variant.training.sample_grid import draw_grid, pixels, sample_name, save_grid
from variant.training.steps_file import StepsFile
from variant.training.task import Task
from variant.training.tensorboard import TensorBoard


class StepLog:
    """Collects the values of the steps, and writes a line of them from time to time.

    The trainer calls :meth:`begin_step`, :meth:`before_clip` and :meth:`end_step` in each step,
    :meth:`add_loss` when its loss is known, and :meth:`write_if_due` or, at the end of an epoch,
    :meth:`close_interval` and :meth:`write` after it. An interval is what one line reports: the
    steps since the last line.

    Args:
        state, scaler: of the run.  total_steps: optimiser steps of the complete run.
    """

    def __init__(
        self,
        task: Task,
        setup: RunSetup,
        state: RunState,
        scaler: LossScaler,
        total_steps: int,
        console: RunConsole,
    ) -> None:
        self.task, self.state, self.scaler, self.console = task, state, scaler, console
        self.ranks = setup.ranks
        self.total_steps, self.steps_per_epoch = total_steps, setup.steps_per_epoch
        self.batch_size, self.every = setup.optim.batch_size, setup.recipe.logging.every
        self.file = StepsFile(setup.folder, task.kind)
        self.folder = setup.folder / "tensorboard" / task.kind
        self.tensorboard: TensorBoard | None = None
        self.uses_tensorboard = setup.recipe.logging.tensorboard and self.ranks.is_first
        self.samples_every = setup.recipe.logging.samples_every
        self.peak, self.no_peak = peak_rate(setup.device, setup.optim.precision)
        self.norms = GradientNorms(task.layer_groups())
        self.meters = task.meters = Meters(next(task.module.parameters()).device)
        # Of the present interval.
        self._steps, self._seconds, self._waited_before, self._flop = 0, 0.0, 0.0, 0
        self._started: float | None = None
        self._values: dict[str, float] = {}
        # Of this process, for the time that is left.
        self._first_step, self._opened = 0, 0.0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Continue the files at the state's step; they are open within the block."""
        self._load(self.state.log)
        if self.ranks.is_first:
            self.file.keep_until(self.state.step)
        self._first_step, self._opened = self.state.step, time.monotonic()
        if self.uses_tensorboard and self.ranks.is_first:
            self.tensorboard = TensorBoard(self.folder, self.state.step)
        if self.no_peak and self.meters.device.type == "cuda" and self.task.flop_of_step(0):
            self.console.print_note(f"no MFU is reported: {self.no_peak}")
        try:
            yield
        finally:
            with self._writing():
                if self.tensorboard is not None:
                    self.tensorboard.close()

    def begin_step(self) -> None:
        """Call before a step's data are fetched."""
        if self._started is None:
            self._started = time.monotonic()

    def before_clip(self, name: str) -> None:
        """Call when the gradients are complete and unscaled, before they are clipped.

        Args:
            name: of the configuration that the step trains.
        """
        for group, norm in self.norms.measure().items():
            self._add_norm(f"gradient_norm/{name}/{group}", norm)

    def end_step(self, name: str, norm: Tensor) -> None:
        """Call after the optimiser's step.

        Args:
            norm: of all gradients, before they were clipped.
        """
        self.task.after_step(self.state.step)
        self._add_norm(f"gradient_norm/{name}/all", unsharded(norm))
        self._steps += 1
        self._flop += self.task.flop_of_step(self.state.step) * self.batch_size

    def add_loss(self, name: str, loss: float) -> None:
        """Call when the loss of a step is known, before the line that reports the step."""
        self._add_of_all_ranks(f"loss/{name}", loss)

    def is_due(self) -> bool:
        """Whether :meth:`write_if_due` writes a line now."""
        return self.state.step % self.every == 0

    def write_if_due(self) -> None:
        """Call after a step within an epoch: writes a line every few steps."""
        if self.is_due():
            self.close_interval()
            self._started = time.monotonic()
            self.write()

    def close_interval(self) -> None:
        """Read the values of the steps since the last line; the clock stops until the next step."""
        # Waits for the device, so it comes before the clock is read.
        values = self.meters.means(self.ranks.sums)
        self._stop_clock()
        step = self.state.step
        values["optim/learning_rate"] = self.state.optimizer.param_groups[0]["lr"]
        if self.scaler.is_enabled():
            values["optim/loss_scale"] = self.scaler.get_scale()
            values["optim/skipped_steps"] = self.scaler.skipped
        values |= self.task.values_of_step(step - 1)
        seconds = max(self._seconds, 1e-9)
        values["speed/images_per_second"] = self._steps * self.batch_size / seconds
        if self._flop and self.peak is not None:
            values["speed/mfu"] = self._flop / seconds / (self.peak * self.ranks.size)
        # Of the rank that waited longest, or needed most memory.
        waited, since = self.task.seconds_waited, self.task.seconds_waited - self._waited_before
        memory = memory_use(self.meters.device)
        largest = self.ranks.largest(round(waited * 1e6), round(since * 1e6), *memory.values())
        values["data/seconds_waited"] = largest[0] / 1e6
        values["data/share_waited"] = largest[1] / 1e6 / seconds
        values |= dict(zip(memory, largest[2:], strict=True))
        done = step - self._first_step
        left = (time.monotonic() - self._opened) / max(done, 1) * (self.total_steps - step)
        values["time/seconds_left"] = left
        self._values = values
        self._steps, self._seconds, self._flop = 0, 0.0, 0
        self._waited_before = self.task.seconds_waited

    def write(self, epoch: Mapping[str, Any] | None = None) -> None:
        """Write the line of the closed interval.

        Args:
            epoch: the entry of the run's history, at the end of an epoch.
        """
        if not self.ranks.is_first:
            return
        step = self.state.step
        line = {"step": step, "epoch": step / self.steps_per_epoch}
        line |= {"time/seconds": self.state.seconds} | self._values | held_out_values(epoch or {})
        line = {key: value for key, value in line.items() if math.isfinite(value)}
        with self._writing():
            self.file.append(line)
        with self._writing():
            if self.tensorboard is not None:
                self.tensorboard.scalars(line)
        if epoch is None:
            self.console.print_step(line)

    def draw_samples(self, epoch: int, *, is_last: bool) -> None:
        """Write a picture of samples where the recipe asks for one after this epoch."""
        if not self.samples_every or (epoch % self.samples_every and not is_last):
            return
        self.task.module.eval()
        try:
            with torch.no_grad():
                rows = self.task.samples(self.ranks)
            if not self.ranks.is_first:
                return
            picture = draw_grid(rows)
            save_grid(picture, self.file.path.parent / sample_name(self.task.kind, epoch))
        except (MemoryError, torch.OutOfMemoryError, UserError) as error:
            self.console.print_unwritten(self.state.step, error)
            return
        with self._writing():
            if self.tensorboard is not None:
                self.tensorboard.image("samples", pixels(picture), self.state.step)

    def saved(self) -> dict[str, Any]:
        """The part of a checkpoint that continues the measurements.

        Waits for the device, and stops the clock until the next step.
        """
        meters = self.meters.totals(self.ranks.sums)
        self._stop_clock()
        with self._writing():
            if self.tensorboard is not None:
                self.tensorboard.flush()
        return {
            "meters": meters,
            "steps": self._steps,
            "seconds": self._seconds,
            "flop": self._flop,
            "waited": self.task.seconds_waited,
            "waited_before": self._waited_before,
        }

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A line or curve that cannot be written does not end the run."""
        try:
            yield
        except OSError as error:
            self.console.print_unwritten(self.state.step, error)

    def _stop_clock(self) -> None:
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
            self._started = None

    def _load(self, saved: Mapping[str, Any]) -> None:
        """Continue from a value of :meth:`saved`; {} begins anew."""
        if saved:
            meters = saved["meters"]
            if not self.ranks.is_first:  # they are the sums of all ranks, and are added once
                meters = {key: [0.0] * len(values) for key, values in meters.items()}
            self.meters.load(meters)
            self._steps, self._seconds = saved["steps"], saved["seconds"]
            self._flop = saved["flop"]
            self.task.seconds_waited = saved["waited"]
            self._waited_before = saved["waited_before"]

    def _add_norm(self, key: str, norm: Tensor) -> None:
        if self.scaler.is_enabled():  # a norm that overflowed does not count
            is_finite = norm.isfinite()
            self._add_of_all_ranks(key, norm.where(is_finite, 0), is_finite.float())
        else:
            self._add_of_all_ranks(key, norm)

    def _add_of_all_ranks(
        self, key: str, value: Tensor | float, weight: Tensor | float = 1.0
    ) -> None:
        """Add a value that every rank has and adds: of all together it has this weight.

        So a step weighs the same in an interval that goes on with another number of processes.
        """
        self.meters.add(key, value, weight / self.ranks.size)


def held_out_values(epoch: Mapping[str, Any]) -> dict[str, float]:
    """The held-out losses of an epoch's entry by the keys of a line."""
    values = {}
    for kind in ("held_out", "ema_held_out"):
        values |= {f"{kind}/{name}": loss for name, loss in epoch.get(kind, {}).items()}
        for name, losses in epoch.get(f"{kind}_by_scale", {}).items():
            values |= {f"{kind}_by_scale/{name}/{k}": loss for k, loss in enumerate(losses)}
    return values
