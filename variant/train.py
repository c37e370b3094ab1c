"""The training loop that the VQ-VAE and the transformer share.

A run is a function of its recipe and seed: order, augmentation, configuration and learning rate
of every step follow from (seed, step), everything else is in the checkpoint. On the CPU, stopping
and resuming therefore gives the very weights of a run that never stopped (same machine, same number
of threads); on a GPU, whose sums come in no fixed order, about the same.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from torch import Tensor, nn

from variant.checkpoints.model_folder import load_state
from variant.data import ImageData, Indices, epoch_order
from variant.errors import UserError
from variant.files import replacing, save_pickle
from variant.recipe import (
    EvalSection,
    OptimSection,
    OutputSection,
    Recipe,
    load_recipe,
    recipe_names,
)
from variant.train_start import FORMAT, Start

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE_SEED = 0  # of the training images that are evaluated at the end
# Parameters that weight decay spares though they have two or more axes: embeddings and gains.
UNDECAYED = ("pos_start", "pos_1LC", "ada_gss", "scale_mul")


@dataclass(frozen=True)
class Summary:
    """What a training run gave.

    folder: where its files are.  steps, epochs: how far it went.  seconds: of all its sittings.
    train_loss, held_out_loss: by configuration, of the best weights in eval mode, on a fixed sample
        of training images and on as many held-out ones.
    best_epoch: the epoch of the best held-out mean, counted from 1.
    """

    folder: Path
    steps: int
    epochs: int
    seconds: float
    train_loss: dict[str, float]
    held_out_loss: dict[str, float]
    best_epoch: int


class Task(ABC):
    """What is trained: a module, its losses, and what happens around a step."""

    kind: str
    module: nn.Module
    data: ImageData
    recipe: Recipe

    @abstractmethod
    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        """The loss of one part of a batch."""

    @abstractmethod
    def name_of_step(self, step: int) -> str:
        """Under which name the step's loss is averaged, e.g. the subnet's depth."""

    @abstractmethod
    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        """Mean losses over some images, without mixup and dropped labels; draws nothing.

        held_out: which part the indices are of; training images are augmented as in epoch 0.
        """

    @property
    def num_evaluated(self) -> int:
        """How many images an evaluation takes."""
        count = self.data.num_held_out
        return min(count, self.recipe.eval.limit or count)

    def held_out_losses(self) -> dict[str, float]:
        """Losses on held-out images; their mean chooses the best weights."""
        return self._mean_losses(np.arange(self.num_evaluated), held_out=True)

    def train_losses(self) -> dict[str, float]:
        """The same losses on a fixed sample of as many training images."""
        order = np.random.default_rng(SAMPLE_SEED).permutation(self.data.num_train)
        return self._mean_losses(order[: self.num_evaluated], held_out=False)

    def _mean_losses(self, indices: np.ndarray, *, held_out: bool) -> dict[str, float]:
        totals: dict[str, float] = {}
        size = self.recipe.eval.batch_size
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            for name, loss in self.evaluate(part, held_out=held_out).items():
                totals[name] = totals.get(name, 0.0) + loss * len(part)
        return {name: total / len(indices) for name, total in totals.items()}

    def prepare(self) -> None:
        """Called once before the first step of a sitting; must not draw from global generators."""
        return

    def before_step(self, indices: Indices, epoch: int, step: int) -> None:
        """Called before the forward pass of each step."""
        return


def resume_hint(command: str, recipe: Recipe, folder: Path) -> str:
    """How to resume a run of a packaged recipe; of any other, what to add to the command."""
    packaged = load_recipe(recipe.name) if recipe.name in recipe_names() else None
    if packaged is None or load_recipe(recipe.name, seed=recipe.seed) != recipe:
        return "the same command and --resume"
    seed = "" if packaged.seed == recipe.seed else f" --seed {recipe.seed}"
    where = shlex.quote(str(folder))
    return f"{command} --recipe {recipe.name} --out {where}{seed} --resume"


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: no decay for biases, norms, embeddings and gains."""
    embeddings = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters()
    }
    decayed, spared = [], []
    for name, parameter in module.named_parameters():
        is_spared = (
            parameter.ndim < 2
            or id(parameter) in embeddings
            or any(part in name for part in UNDECAYED)
        )
        (spared if is_spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """The rate of a step: linear warm-up, then constant or a half cosine to its final ratio."""
    warm_steps = optim.warmup * total_steps
    rate = optim.learning_rate * min(1.0, (step + 1) / max(warm_steps, 1.0))
    if optim.schedule == "cosine":
        done = step / total_steps
        falling = 0.5 * (1 + math.cos(math.pi * done))
        rate *= optim.final_ratio + (1 - optim.final_ratio) * falling
    return rate


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, as plain values."""
    legacy: Any = np.random.get_state()  # noqa: NPY002  (the global one, for whoever draws from it)
    algorithm, keys, position, has_gauss, cached = legacy
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.copy()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    random.setstate(state["python"])
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy(), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Interrupt:
    """Ctrl-C or SIGTERM asks for a stop after the running step; a second one stops at once."""

    signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Catch both signals within the block (in the main thread; elsewhere Python cannot)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {
            number: signal.getsignal(number) or signal.SIG_DFL
            for number in (signal.SIGINT, signal.SIGTERM)
        }

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def request(signum: int, frame: object) -> None:
            self.signum = signum
            restore()

        for number in previous:
            signal.signal(number, request)
        try:
            yield self
        finally:
            restore()


class Trainer:
    """Runs a :class:`Task` for its epochs, with checkpoints, metrics and progress.

    Files in ``folder``, named after the task's kind: ``KIND-last.pt`` (everything a resumed run
    needs), ``KIND-best.safetensors`` (weights of the best held-out loss), ``KIND-metrics.jsonl``.

    Args:
        start: of this task's kind.
        resume_command: what is printed when the run is stopped.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        optim: OptimSection,
        epochs: int,
        folder: Path,
        start: Start,
        resume_command: str,
        console: Console | None = None,
    ) -> None:
        self.task, self.recipe, self.optim, self.epochs = task, recipe, optim, epochs
        self.evaluation: EvalSection = recipe.eval
        self.output: OutputSection = recipe.output
        self.folder, self.start, self.resume_command = folder, start, resume_command
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
        last = self.start.last
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
        with replacing(self.path("metrics.jsonl")) as temporary:
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
                "inputs": self.start.inputs,
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
        if self.start.state is not None:
            self.restore(self.start.state)
            self.start.state = None  # the optimiser's moments need not stay in memory twice
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
        with replacing(self.path("best.safetensors")) as temporary:
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
