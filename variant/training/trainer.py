"""The training loop that the VQ-VAE and the transformer share.

A run is a function of its recipe and seed: order, augmentation, configuration and learning rate
of every step follow from (seed, step), everything else is in the checkpoint. On the CPU, stopping
and resuming therefore gives the very weights of a run that never stopped (same machine, same number
of threads); on a GPU, whose sums come in no fixed order, about the same.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from variant.checkpoints.model_folder import load_state
from variant.data.images import epoch_order
from variant.errors import UserError
from variant.files import atomic_write, save_pickle
from variant.training.interrupt import Interrupt
from variant.training.optim import OptimSection, decay_groups, learning_rate
from variant.training.random_state import random_state, set_random_state
from variant.training.recipe import EvalSection, OutputSection, Recipe, load_recipe, recipe_names
from variant.training.run_setup import FORMAT, RunSetup
from variant.training.task import Summary, Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resume_hint(command: str, recipe: Recipe, folder: Path) -> str:
    """How to resume a run of a packaged recipe; of any other, what to add to the command."""
    packaged = load_recipe(recipe.name) if recipe.name in recipe_names() else None
    if packaged is None or load_recipe(recipe.name, seed=recipe.seed) != recipe:
        return "the same command and --resume"
    seed = "" if packaged.seed == recipe.seed else f" --seed {recipe.seed}"
    where = shlex.quote(str(folder))
    return f"{command} --recipe {recipe.name} --out {where}{seed} --resume"


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Trainer:
    """Runs a :class:`Task` for its epochs, with checkpoints, metrics and progress.

    Files in ``folder``, named after the task's kind: ``KIND-last.pt`` (everything a resumed run
    needs), ``KIND-best.safetensors`` (weights of the best held-out loss), ``KIND-metrics.jsonl``.

    Args:
        setup: of this task's kind.
        resume_command: what is printed when the run is stopped.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        optim: OptimSection,
        epochs: int,
        folder: Path,
        setup: RunSetup,
        resume_command: str,
        console: Console | None = None,
    ) -> None:
        self.task, self.recipe, self.optim, self.epochs = task, recipe, optim, epochs
        self.evaluation: EvalSection = recipe.eval
        self.output: OutputSection = recipe.output
        self.folder, self.setup, self.resume_command = folder, setup, resume_command
        self.console = console or Console()
        self.steps_per_epoch = task.data.num_train // optim.batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.device = next(task.module.parameters()).device
        self.optimizer = torch.optim.AdamW(
            decay_groups(task.module, optim.weight_decay),
            lr=optim.learning_rate,
            betas=optim.betas,
            fused=True if self.device.type == "cuda" else None,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=optim.precision == "fp16")
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, tuple[float, int]] = {}
        self.history: list[dict[str, Any]] = []
        self._cached_order: tuple[int, np.ndarray] | None = None

    # --- files ------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A file of this run."""
        return self.folder / f"{self.task.kind}-{name}"

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it, or the best weights beside it, are damaged or of another model.
        """
        last = self.setup.last
        load_state(self.task.module, state["module"], str(last))
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_moments()
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
            self.history = state["history"]
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            has_best = any("held_out_mean" in entry for entry in self.history)
            set_random_state(state["random"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            raise UserError(f"{last}: is damaged: {' '.join(str(e).split())[:200]}") from None
        if has_best:
            self._check_best()
        with atomic_write(self.path("metrics.jsonl")) as temporary:
            temporary.write_text(lines)

    def _check_moments(self) -> None:
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError(f"optimizer: {name} is {tuple(moments[name].shape)}")

    def _check_best(self) -> None:
        path = self.path("best.safetensors")
        try:
            with safe_open(path, "pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: is missing or damaged: {error}") from None
        state = self.task.module.state_dict()
        if found != {key: tuple(value.shape) for key, value in state.items()}:
            raise UserError(f"{path}: does not hold the weights of this run's model")

    def save(self) -> None:
        """Write the checkpoint; the previous one stays until the new one is whole."""
        save_pickle(
            self.path("last.pt"),
            {
                "format": FORMAT,
                "kind": self.task.kind,
                "recipe": self.recipe.to_dict(),
                "inputs": self.setup.inputs,
                "step": self.step,
                "total_steps": self.total_steps,
                "seconds": self.seconds,
                "module": self.task.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "sums": self.sums,
                "history": self.history,
                "random": random_state(),
            },
        )

    def best_entry(self) -> dict[str, Any]:
        """The epoch of the lowest mean held-out loss; the earlier of equals."""
        evaluated = [entry for entry in self.history if "held_out_mean" in entry]
        return min(evaluated, key=lambda entry: entry["held_out_mean"])

    def load_best(self) -> None:
        """Put the best weights into the module."""
        self.task.module.load_state_dict(load_file(self.path("best.safetensors")))

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> Summary:
        """Train to the end, or until a signal; then the module has the best weights.

        Raises:
            UserError: see :meth:`restore`; a loss or gradient that is not finite.
            SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with everything saved.
        """
        if self.setup.state is not None:
            self.restore(self.setup.state)
            self.setup.state = None  # the optimiser's moments need not stay in memory twice
        else:
            self.path("metrics.jsonl").write_text("")
        self.task.prepare()
        with Interrupt().listening() as interrupt, self._progress() as progress:
            bar = progress.add_task(self.task.kind, total=self.total_steps, loss="")
            while self.step < self.total_steps:
                started = time.monotonic()
                loss = self._train_step()
                self.step += 1
                is_epoch_end = self.step % self.steps_per_epoch == 0
                if is_epoch_end:
                    self._end_epoch(started)
                else:
                    self.seconds += time.monotonic() - started
                progress.update(bar, completed=self.step, loss=f"loss {loss:.4f}")
                if interrupt.signum is not None:
                    self._stop(interrupt.signum)
        best = self.best_entry()
        self.load_best()
        self.task.module.eval()
        with torch.no_grad(), self._autocast():
            train_loss = self.task.train_losses()
        return Summary(
            folder=self.folder,
            steps=self.step,
            epochs=self.epochs,
            seconds=self.seconds,
            train_loss=train_loss,
            held_out_loss=best["held_out"],
            best_epoch=best["epoch"],
        )

    def _train_step(self) -> float:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0:
            self.sums = {}
        size = self.optim.batch_size
        indices = self._order(epoch)[position * size : (position + 1) * size]
        self.task.module.train()
        self.task.before_step(indices, epoch, self.step)
        rate = learning_rate(self.optim, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in np.split(indices, self.optim.accumulate):
            with self._autocast():
                loss = self.task.loss(part, epoch, self.step) / self.optim.accumulate
            self.scaler.scale(loss).backward()
            total += loss.item()
        self._require_finite(total, "loss", epoch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.task.module.parameters(), self.optim.clip)
        if not self.scaler.is_enabled():  # the scaler skips such a step and scales down
            self._require_finite(norm.item(), "gradient", epoch)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        name = self.task.name_of_step(self.step)
        before, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (before + total, count + 1)
        return total

    def _require_finite(self, value: float, what: str, epoch: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"{self.recipe.name}: the {what} is not finite at step {self.step} (epoch {epoch});"
                " try a lower learning_rate or precision fp32"
            )

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached_order is None or self._cached_order[0] != epoch:
            order = epoch_order(self.recipe.seed, epoch, self.task.data.num_train)
            self._cached_order = (epoch, order)
        return self._cached_order[1]

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.optim.precision]
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16 if dtype is torch.float32 else dtype,
            enabled=dtype is not torch.float32,
        )

    def _end_epoch(self, started: float) -> None:
        epoch = self.step // self.steps_per_epoch
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "train": {name: total / count for name, (total, count) in sorted(self.sums.items())},
        }
        is_last = self.step == self.total_steps
        if epoch % self.evaluation.every == 0 or is_last:
            self.task.module.eval()
            with torch.no_grad(), self._autocast():
                entry["held_out"] = self.task.held_out_losses()
            entry["held_out_mean"] = sum(entry["held_out"].values()) / len(entry["held_out"])
            self._require_finite(entry["held_out_mean"], "held-out loss", epoch - 1)
            evaluated = [e["held_out_mean"] for e in self.history if "held_out_mean" in e]
            if all(entry["held_out_mean"] < other for other in evaluated):
                self._save_best()
        self.seconds += time.monotonic() - started
        entry["seconds"] = round(self.seconds, 1)
        self.history.append(entry)
        with self.path("metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._print_epoch(entry)
        if epoch % self.output.checkpoint_every == 0 or is_last:
            self.save()

    def _save_best(self) -> None:
        state = {
            key: value.detach().cpu().contiguous()
            for key, value in self.task.module.state_dict().items()
        }
        with atomic_write(self.path("best.safetensors")) as temporary:
            save_file(state, temporary)

    def _stop(self, signum: int) -> None:
        if self.step < self.total_steps:
            self.save()
            self.console.print(
                f"stopped after step {self.step} of {self.total_steps}; everything is saved. "
                f"Resume with: {self.resume_command}",
                soft_wrap=True,
                highlight=False,
            )
            raise SystemExit(128 + signum)

    def _print_epoch(self, entry: Mapping[str, Any]) -> None:
        def losses(values: Mapping[str, float]) -> str:
            return "  ".join(f"{name} {value:.4f}" for name, value in values.items())

        line = f"{self.task.kind} epoch {entry['epoch']}/{self.epochs}  train: "
        line += losses(entry["train"])
        if "held_out" in entry:
            line += f"  held out: {losses(entry['held_out'])}"
        remaining = self.seconds / self.step * (self.total_steps - self.step)
        line += f"  {self.seconds:.0f} s, about {remaining:.0f} s left"
        self.console.print(line, soft_wrap=True, highlight=False)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
