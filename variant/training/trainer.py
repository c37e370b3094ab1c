"""The training loop that the VQ-VAE and the transformer share.

A run is a function of its recipe and seed: order, augmentation, configuration and learning rate
of every step follow from (seed, step), everything else is in the checkpoint. On the CPU, stopping
and resuming therefore gives exactly the weights of a run that never stopped (same machine, same
number of threads). On a GPU the weights agree approximately, because sums are not ordered there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from variant.data.images import epoch_order
from variant.data.loader import Plan, num_workers, reading_ahead
from variant.errors import UserError
from variant.training.checkpoint_schedule import CheckpointSchedule
from variant.training.console import RunConsole
from variant.training.ema import EMA
from variant.training.interrupt import Interrupt
from variant.training.late_values import LateValues, require_finite
from variant.training.loss_scale import LossScaler
from variant.training.metrics import MetricsFile
from variant.training.optim import (
    PRECISIONS,
    autocast,
    clipped_step,
    decay_groups,
    gradient_norm,
    learning_rate,
)
from variant.training.parallel import chosen_mode, parallelize, unsharded
from variant.training.phase_ends import ENDED
from variant.training.run_setup import RunSetup
from variant.training.run_state import ADVERSARIAL, RunState, best_of, is_better
from variant.training.step_log import StepLog
from variant.training.task import Summary, Task, split_scales


class Trainer:
    """Runs a :class:`Task` for its epochs, with checkpoints, metrics and progress.

    Files in the run's folder: those of :class:`Checkpointer` and :class:`MetricsFile`.

    Args:
        setup: of this task's kind.
        console: to print to; None is standard output.
    """

    def __init__(
        self, task: Task, setup: RunSetup, epochs: int, console: Console | None = None
    ) -> None:
        self.task, self.setup, self.epochs = task, setup, epochs
        self.recipe, self.optim = setup.recipe, setup.optim
        self.steps_per_epoch = setup.steps_per_epoch
        self.total_steps = epochs * self.steps_per_epoch
        self.ranks = setup.ranks
        self.device = next(task.module.parameters()).device
        # Before the optimiser, as FSDP2 exchanges the parameters.
        self.parallel = parallelize(
            task.module,
            self.ranks,
            chosen_mode(self.recipe.parallel, _num_parameters(task.module), self.device),
            self.device,
            blocks=task.blocks,
            dtype=PRECISIONS[self.optim.precision],
            uses_every_parameter=task.uses_every_parameter,
        )
        task.network = self.parallel.network
        optimizer = torch.optim.AdamW(
            decay_groups(task.module, self.optim.weight_decay),
            lr=self.optim.learning_rate,
            betas=self.optim.betas,
            fused=True,
        )
        self.scaler = LossScaler(self.device.type, enabled=self.optim.precision == "fp16")
        task.scaler = self.scaler
        ema = EMA(task.module, task.ema_decay) if task.ema_decay else None
        task.choose_teacher(ema)
        self.state = RunState(
            task.module, optimizer, self.scaler, ema=ema, adversary=task.adversary
        )
        self.checkpointer = setup.checkpointer
        self.schedule = CheckpointSchedule(self.recipe.output, self.steps_per_epoch)
        self._saved_step: int | None = None
        self.metrics = MetricsFile(setup.folder, task.kind)
        if not self.ranks.is_first:
            console = Console(quiet=True)
        self.console = RunConsole(task.kind, epochs, self.total_steps, console)
        self.log = StepLog(task, setup, self.state, self.scaler, self.total_steps, self.console)
        # Of each step that has not been read: its loss and the norm of its gradients.
        self._values: LateValues[tuple[str, int]] = LateValues(self.device)
        self._last_loss: float | None = None

    def run(self) -> Summary:
        """Train to the end, or until a signal; then the module has the best weights.

        Raises:
            UserError: the checkpoint or the best weights of a resumed run are damaged or of another
                model; a loss or gradient is not finite; a file cannot be written.
            SystemExit: 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), with everything saved.
        """
        state = self.state
        with self.ranks.one_after_another():  # the first puts the files in order
            if self.setup.saved is not None:
                self.checkpointer.restore(state, self.setup.saved)
                self.setup.saved = None  # frees the second copy of the optimiser's moments
            else:
                self.checkpointer.check_best({})
        self.ranks.require_same("data and weights to start from", _json(self.setup.common_inputs))
        self.ranks.require_same("recipe", _json(self.recipe.to_dict()))
        self.ranks.require_same("completed steps", str(state.step))
        self._follow_phases()
        if self.ranks.is_first:
            self.metrics.rewrite(state.history)
        self.console.print_start(
            self.task.data.num_train, str(self.device), state.step, self.setup.changes
        )
        for note in self.task.notes:
            self.console.print_note(note)
        self.task.prepare(self.console.print_preparation)
        with (
            Interrupt().listening() as interrupt,
            closing(self.checkpointer),
            self.log.opened(),
            self._reading_ahead(),
            self.console.progress_bar() as move_bar,
        ):
            while state.step < self.total_steps:
                with self._going_on():
                    self.checkpointer.poll()
                started = time.monotonic()
                self._train_step()
                state.step += 1
                if state.step % self.steps_per_epoch == 0:
                    self._read_values(everything=True)
                    self._end_epoch(started)
                else:
                    self._read_values(everything=self.log.is_due())
                    state.seconds += time.monotonic() - started
                    self.log.write_if_due()
                # Clocks differ; a signal comes to one rank only, or to each in another step; a file
                # that cannot be read is found by one rank.
                minutes_are_over, signum, found_bad = self.ranks.largest(
                    self.schedule.minutes_are_over,
                    interrupt.signum or 0,
                    len(self.task.data.bad.unshared),
                )
                if found_bad:
                    self.task.share_bad_items(self.ranks)
                is_due = self.schedule.is_due(state.step, bool(minutes_are_over))
                is_due = is_due or state.step == self.total_steps
                self._read_values(everything=bool(is_due or signum))
                if is_due:
                    self._save()
                move_bar(state.step, self._last_loss)
                if signum:
                    self._stop(signum)
        return self._summary()

    @contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """The task fetches its samples from workers within the block."""
        plan = _plan(self.setup, self.task.data.num_train, self.state.step, self.total_steps)
        workers = num_workers(self.recipe.data)
        pin = self.device.type == "cuda"
        try:
            with reading_ahead(self.task.data, plan, workers, pin=pin) as self.task.loader:
                yield
        finally:
            self.task.loader = None

    def _train_step(self) -> float | None:
        """One step; returns the last loss that was read: on a CPU that of this step."""
        state = self.state
        self.log.begin_step()
        epoch, position = divmod(state.step, self.steps_per_epoch)
        if position == 0:
            state.loss_sums = {}
        size, name = self.optim.batch_size, self.task.name_of_step(state.step)
        if self.ranks.size > 1:
            # FSDP2 does not notice when ranks run different layers.
            text = f"{self.task.describe_step(state.step)} (step {state.step})"
            self.ranks.require_same("configuration", text)
        order = _order(self.recipe.seed, epoch, self.task.data.num_train)
        indices = order[position * size : (position + 1) * size]
        self.task.module.train()
        replaced = self.task.before_step(indices, epoch, state.step)
        if replaced and state.ema is not None:
            state.ema.take_rows(replaced)
        rate = learning_rate(self.optim, state.step, self.total_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.device)
        parts = self.ranks.parts(indices, self.optim.accumulate)
        for number, part in enumerate(parts, 1):
            with self.parallel.part(is_last=number == len(parts)):
                # Entered anew for every part: autocast keeps its casts of the weights until then.
                with self._autocast():
                    loss = self.task.loss(part, epoch, state.step) * (len(part) / size)
                # The gradients of the ranks are averaged, those of the parts are added.
                state.scaler.scale(loss * self.ranks.size).backward()
                loss_sum += loss.detach()
        state.scaler.unscale_(state.optimizer)
        self.log.before_clip(name)
        norm = gradient_norm(self.task.module)
        second = self.task.after_backward(state.step, rate)
        values = [loss_sum, unsharded(norm)]
        if second is not None:
            values.append(second)
            norm = norm.where(second.isfinite(), second)
        self._values.add((name, state.step), values)
        self._read_values()
        clipped_step(state.optimizer, state.scaler, norm, self.optim.clip)
        self.scaler.update()
        self.scaler.require_progress(self.recipe.name, state.step + 1)
        if state.ema is not None:
            state.ema.update()
        self.log.end_step(name, norm)
        return self._last_loss

    def _read_values(self, *, everything: bool = False) -> None:
        """Check and add the loss and the norm of each step; on a GPU not yet those of the last one.

        ``everything`` reads these too: needed before anything of the run is evaluated or written.
        Raises UserError if one is not finite; such a gradient has not reached the weights.
        """
        for (name, step), (loss, norm, *second) in self._values.read(everything=everything):
            (total,) = self.ranks.sums([loss])
            where = self.recipe.name, step, step // self.steps_per_epoch
            require_finite(total, "loss", *where)
            if not self.scaler.is_enabled():  # it skips such a step and lowers the scale
                require_finite(norm, "gradient", *where)
            for value in second:  # float32 in every precision, so that no scale is too high
                require_finite(value, "gradient of the discriminator", *where)
            self.state.add_loss(name, total)
            self.log.add_loss(name, total)
            self._last_loss = total

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.optim.precision)

    def _end_epoch(self, started: float) -> None:
        """Evaluate and record.  Args: started: when the epoch's last step began."""
        state = self.state
        self.log.close_interval()
        epoch = state.step // self.steps_per_epoch
        is_last = state.step == self.total_steps
        entry: dict[str, Any] = {"epoch": epoch, "step": state.step, "train": state.mean_losses()}
        if epoch % self.recipe.eval.every == 0 or is_last:
            if self.task.is_adversarial(state.step):
                entry[ADVERSARIAL] = True
            entry |= self._evaluate(epoch)
            self._keep_if_best(entry)
        state.history.append(entry)
        ended = self.task.ended_phase(state.history)
        if ended is not None:
            entry[ENDED] = ended
        self._follow_phases()  # after which this may be the last epoch
        self.log.draw_samples(epoch, is_last=state.step == self.total_steps)
        state.seconds += time.monotonic() - started
        entry["seconds"] = round(state.seconds, 1)
        if self.ranks.is_first:
            with self._going_on():
                self.metrics.append(entry)
        self.log.write(entry)
        self.console.print_epoch(entry)

    def _follow_phases(self) -> None:
        """Take the number of epochs that the task's phases add up to by now."""
        epochs = self.task.epochs_by(self.state.history)
        if epochs is not None:
            self.epochs = self.console.epochs = epochs
            self.total_steps = epochs * self.steps_per_epoch
            self.console.total_steps = self.log.total_steps = self.total_steps

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        """The losses of the weights and, where there is one, of their moving average."""
        entry = self._evaluate_weights("held_out", epoch)
        if self.state.ema is not None:
            with self.state.ema.in_place_of_weights():
                entry |= self._evaluate_weights("ema_held_out", epoch)
        return entry

    def _evaluate_weights(self, name: str, epoch: int) -> dict[str, Any]:
        self.task.module.eval()
        with torch.no_grad(), self._autocast():
            losses, by_scale = split_scales(self.task.held_out_losses(self.ranks))
        mean = self.task.mean_loss(losses)
        require_finite(mean, "held-out loss", self.recipe.name, self.state.step, epoch - 1)
        entry: dict[str, Any] = {name: losses, f"{name}_mean": mean}
        return entry | ({f"{name}_by_scale": by_scale} if by_scale else {})

    def _keep_if_best(self, entry: dict[str, Any]) -> None:
        """Write the weights, or their moving average, if none before had a lower loss."""
        if is_better(entry, self.state.best_entry()):
            not_kept = True
            with self._going_on():
                self.checkpointer.save_best(self.state, averaged=best_of(entry)[1])
                not_kept = False
            if self.ranks.largest(not_kept)[0]:  # the ranks keep the same history
                entry["best_not_kept"] = True

    def _save(self) -> None:
        self.schedule.restart_clock()
        with self._going_on():
            self._write_checkpoint(wait=self.state.step == self.total_steps)

    def _write_checkpoint(self, *, wait: bool) -> None:
        self.state.log = self.log.saved()
        self.checkpointer.save(
            self.state,
            recipe=self.recipe.to_dict(),
            inputs=self.setup.inputs,
            total_steps=self.total_steps,
            wait=wait,
        )
        self._saved_step = self.state.step

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A file that cannot be written does not end the run, except after its last step."""
        try:
            yield
        except (OSError, UserError) as error:
            if self.state.step == self.total_steps:
                raise
            self.console.print_unwritten(self.state.step, error)

    def _stop(self, signum: int) -> None:
        if self.state.step < self.total_steps:
            if self._saved_step != self.state.step:
                self._write_checkpoint(wait=True)
            self.checkpointer.wait()
            self.console.print_stop(self.state.step, self.setup.resume_command)
            raise SystemExit(128 + signum)

    def _summary(self) -> Summary:
        """Load the best weights, and evaluate them on training images."""
        best = self.state.best_entry()
        assert best is not None, "the last epoch is always evaluated"
        self.ranks.barrier()  # rank 0 may still be writing them
        averaged = best_of(best)[1]
        self.checkpointer.load_best(self.state)
        self.task.module.eval()
        with torch.no_grad(), self._autocast():
            train_loss, _ = split_scales(self.task.train_losses(self.ranks))
        self.task.share_bad_items(self.ranks)
        return Summary(
            folder=self.setup.folder,
            steps=self.state.step,
            epochs=self.epochs,
            seconds=self.state.seconds,
            train_loss=train_loss,
            held_out_loss=best["ema_held_out" if averaged else "held_out"],
            best_epoch=best["epoch"],
            averaged=averaged,
        )


# The same in every step of an epoch.
_order = lru_cache(maxsize=1)(epoch_order)


def _plan(setup: RunSetup, num_train: int, first_step: int, total_steps: int) -> Plan:
    """The samples that this process needs from one step on, before another one."""
    size, per_epoch = setup.optim.batch_size, setup.steps_per_epoch
    parts = partial(setup.ranks.parts, count=setup.optim.accumulate)
    return Plan(setup.recipe.seed, num_train, size, parts, first_step, total_steps, per_epoch)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
