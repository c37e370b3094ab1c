"""Checkpoints of a training run: one file of one process, or a folder of several."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from variant.checkpoints.model_folder import load_state
from variant.errors import UserError
from variant.files import (
    atomic_write,
    put_in_place,
    read_pickle,
    read_safetensors,
    save_safetensors,
)
from variant.paths import file_sha256
from variant.training.checkpoint_contents import check_contents
from variant.training.checkpoint_files import BEST_NAME, CheckpointFiles
from variant.training.checkpoint_folder import (
    FolderWriter,
    check_folder,
    is_checkpoint_folder,
    read_contents,
    stored_tensors,
)
from variant.training.checksum import append_checksum, check_checksum
from variant.training.parallel import local_part, sharded_like, whole
from variant.training.random_state import random_state, set_random_state
from variant.training.run_state import RunState
from variant.training.state_tensors import EMA, MODULE, named_tensors, part_of, read_state

FORMAT = "variant-train-3"
SECONDS_TO_CLOSE = 10.0
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW stores for a parameter


class Checkpointer:
    """Writes and reads the checkpoints and the best weights of one run.

    Files are named after the task's kind: ``KIND-last.pt`` holds everything that a resumed run
    needs, ``KIND-best.safetensors`` the weights of the lowest held-out loss. A file is replaced
    only when the new one is complete and on the disk. Older checkpoints that are kept, and the
    folders that several processes write: :class:`CheckpointFiles`. Any number of processes resumes
    from either form.

    The checkpoint has a checksum of itself and that of the best weights. New best weights wait in a
    file of their own until the checkpoint that records them is written, so that the two files agree
    whenever a run is killed.

    Args:
        keep: number of checkpoints that are kept.
        writes: whether this process writes files. With several processes each calls the functions
            that write, because weights may be sharded, and one of them writes.
        shared: whether several processes write each checkpoint: a folder, in the background.
    Attributes:
        path: the newest checkpoint, from which a run resumes.
        best_sha256: SHA-256 of the best weights in hexadecimal; None before the first evaluation.
    """

    def __init__(
        self, folder: Path, kind: str, keep: int = 1, *, writes: bool = True, shared: bool = False
    ) -> None:
        self.kind, self.keep, self.writes = kind, keep, writes
        self.files = CheckpointFiles(folder, kind)
        self.last, self.best, self.next_best = (
            self.files.last,
            self.files.best,
            self.files.next_best,
        )
        self.best_sha256: str | None = None
        self._in_place: str | None = None  # SHA-256 of the file ``best``
        self._writer = FolderWriter() if shared else None
        self._error: UserError | None = None  # of a checkpoint in the background

    @property
    def path(self) -> Path:
        return self.files.newest() or self.last

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint."""
        return self.files.newest() is not None

    def read(self) -> dict[str, Any]:
        """The checkpoint's contents; the shapes of its tensors are not checked here.

        Raises:
            UserError: missing, damaged, or not a checkpoint of this kind.
        """
        path = self.path
        try:
            return self.read_from(path)
        except UserError as error:
            older = [other.name for other in self.files.older() if other != path]
            if not older:
                raise
            raise UserError(
                f"{error}; {older[-1]} is an older checkpoint: remove {path.name} to resume from it"
            ) from None

    def read_from(self, path: Path) -> dict[str, Any]:
        """As :meth:`read`, of a certain checkpoint."""
        if is_checkpoint_folder(path):
            if self.writes:  # one process is enough
                check_folder(path)
            tensors = stored_tensors(path)
            saved = {
                **read_contents(path),
                "module": part_of(tensors, MODULE),
                "optimizer": {"state": {}, "param_groups": []},  # restore reads them
                "ema": part_of(tensors, EMA) or None,
            }
        else:
            check_checksum(path)
            saved = read_pickle(path)
        if saved.get("format") != FORMAT or saved.get("kind") != self.kind:
            raise UserError(
                f'{path}: is not a checkpoint of this program: "format" and "kind" must be '
                f'"{FORMAT}" and "{self.kind}"; got {saved.get("format")!r:.100} and '
                f"{saved.get('kind')!r:.100}"
            )
        try:
            check_contents(saved)
        except ValueError as error:
            raise UserError(f"{path}: is damaged: {error}") from None
        return saved

    def save(
        self,
        state: RunState,
        *,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Any],
        total_steps: int,
        wait: bool = True,
    ) -> None:
        """Write the checkpoint, random generators included.

        Args:
            recipe: as plain values.  inputs: values that identify the training data.
            total_steps: optimiser steps of the complete run.
            wait: False returns while several processes still write; :meth:`poll` tells how it went.
        Raises:
            UserError: the file cannot be written.
        """
        contents = {
            "format": FORMAT,
            "kind": self.kind,
            "recipe": dict(recipe),
            "inputs": dict(inputs),
            "step": state.step,
            "total_steps": total_steps,
            "seconds": state.seconds,
            "scaler": state.scaler.state_dict(),
            "sums": state.loss_sums,
            "history": state.history,
            "log": state.log,
            "best_sha256": self.best_sha256,
            "random": random_state(),
        }
        if self._writer is not None:
            self._start(self._writer, state, copy.deepcopy(contents))
            if wait:
                self._error = None  # of the one before, which this one replaces
                self._writer.wait()
            return
        contents["module"] = state.module.state_dict()
        contents["optimizer"] = state.optimizer.state_dict()
        if state.ema is not None:
            contents["ema"] = dict(state.ema.averages)
        if state.adversary is not None:
            contents["adversary"] = {
                "module": state.adversary.module.state_dict(),
                "optimizer": state.adversary.optimizer.state_dict(),
            }
        with atomic_write(self.last, durable=True) as temporary:
            torch.save(contents, temporary)
            append_checksum(temporary)
            if self.keep > 1:
                self.files.archive_last(self._in_place)
        self._keep_next_best()
        self.files.remove_older(self.keep - 1)

    def _start(self, writer: FolderWriter, state: RunState, contents: dict[str, Any]) -> None:
        self._settle()

        def finish() -> None:
            if self.keep > 1:
                self.files.archive_last(self._in_place)
            with suppress(FileNotFoundError):
                self.last.unlink()
            self._keep_next_best()
            self.files.remove_older(self.keep - 1)

        best = self.next_best if self.next_best.exists() else self.best
        has_link = self.keep > 1 and self.best_sha256 is not None
        writer.start(
            self.files.path_of(state.step),
            named_tensors(state),
            contents,
            links={BEST_NAME: best} if has_link else {},
            finish=finish,
        )

    def poll(self) -> None:
        """Raises: UserError, once, if a checkpoint in the background could not be written."""
        if self._writer is not None and not self._writer.is_busy:
            self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the checkpoint in the background.

        Raises:
            UserError: it could not be written.
        """
        self._settle()
        self.poll()

    def close(self) -> None:
        """Before the process ends, by an error perhaps: give a checkpoint a moment to complete."""
        if self._writer is not None:
            with suppress(UserError):
                self._writer.wait(SECONDS_TO_CLOSE)

    def _settle(self) -> None:
        """Wait for the checkpoint in the background, and keep its error for :meth:`poll`."""
        if self._writer is not None:
            try:
                self._writer.wait()
            except UserError as error:
                self._error = error

    def restore(self, state: RunState, saved: Mapping[str, Any]) -> None:
        """Load a checkpoint's contents into ``state`` and into the random generators.

        Args:
            saved: of :meth:`read`.
        Raises:
            UserError: it, or the best weights beside it, are damaged or of another model.
        """
        path = self.path
        is_folder = is_checkpoint_folder(path)
        if is_folder:
            read_state(path, state)
        else:
            _load_module(state.module, saved["module"], str(path))
        try:
            if not is_folder:
                if state.ema is not None:
                    state.ema.load(saved.get("ema") or {})
                _load_optimizer(state.optimizer, saved["optimizer"], saved["step"])
                if state.adversary is not None:
                    second, own = saved.get("adversary") or {}, state.adversary
                    _load_module(own.module, second["module"], f"{path}: adversary")
                    _load_optimizer(own.optimizer, second["optimizer"], saved["step"])
            state.scaler.load_state_dict(saved["scaler"])
            state.step, state.seconds = saved["step"], saved["seconds"]
            state.loss_sums = {name: (pair[0], pair[1]) for name, pair in saved["sums"].items()}
            state.history = list(saved["history"])
            state.log = dict(saved.get("log", {}))  # a run of an earlier version has none
            set_random_state(saved["random"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            reason = f"it has no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
            raise UserError(f"{path}: is damaged: {reason}") from None
        self.check_best(saved)

    def check_best(self, saved: Mapping[str, Any]) -> None:
        """Compare the best weights with the checkpoint; finish or undo a replacement of them.

        Args:
            saved: of :meth:`read`; an empty one, of a new run, has no best weights.
        Raises:
            UserError: they are missing, or not those that the checkpoint records.
        """
        self.best_sha256, self._in_place = saved.get("best_sha256"), None
        if self.next_best.is_file():
            if file_sha256(self.next_best) == self.best_sha256:  # killed before it was renamed
                self._keep_next_best()
            else:  # of an epoch after the checkpoint
                with suppress(OSError):
                    self.next_best.unlink()
        if self.best_sha256 is None:
            return
        if not self.best.is_file() or file_sha256(self.best) != self.best_sha256:
            self.files.restore_best(self.path)  # those of a newer checkpoint, which was removed
        if not self.best.is_file():
            raise UserError(f"{self.best}: is missing or damaged: no such file")
        if file_sha256(self.best) != self.best_sha256:
            raise UserError(
                f"{self.best}: is missing or damaged: it is not the file whose SHA-256 "
                f"{self.path.name} records"
            )
        self._in_place = self.best_sha256

    def save_best(self, state: RunState, *, averaged: bool = False) -> None:
        """Write the present weights as the best ones; :meth:`save` puts them in place.

        Args:
            averaged: write the moving average in place of the weights.
        Raises:
            UserError: the file cannot be written; the best weights stay those of before.
        """
        assert state.ema is not None or not averaged
        self._settle()  # a checkpoint in the background puts the best weights before in place
        with state.ema.in_place_of_weights() if state.ema and averaged else nullcontext():
            weights = whole(state.module.state_dict(), keep=self.writes)
            if not self.writes:
                return
            weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_safetensors(self.next_best, weights, durable=True)
        self.best_sha256 = file_sha256(self.next_best)

    def load_best(self, state: RunState) -> None:
        """Load the best weights into the module."""
        _load_module(state.module, read_safetensors(self.best), str(self.best))

    def _keep_next_best(self) -> None:
        try:
            if self.next_best.exists():
                put_in_place(self.next_best, self.best)
                self._in_place = self.best_sha256
        except OSError as error:
            raise UserError(f"{self.best}: cannot be written: {error.strerror or error}") from error


def _load_module(module: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    own = module.state_dict()
    parts = {
        key: sharded_like(value, own[key]) if _has_shape(value, own.get(key)) else value
        for key, value in weights.items()
    }
    load_state(module, parts, where)


def _has_shape(value: object, tensor: Tensor | None) -> bool:
    return isinstance(value, Tensor) and tensor is not None and value.shape == tensor.shape


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], step: int) -> None:
    """Load AdamW's moments; its settings stay those of the recipe and of this device.

    Args:
        step: of the checkpoint; AdamW's own counts are at most that.
    Raises:
        ValueError: the moments are not those of the optimiser's parameters.
    """
    for moments in saved["state"].values():
        if set(moments) != set(MOMENTS) or not all(isinstance(v, Tensor) for v in moments.values()):
            found = ", ".join(f"{key} {type(value).__name__}" for key, value in moments.items())
            raise ValueError(f"optimizer: must have tensors {', '.join(MOMENTS)}; has {found}")
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": old["params"]}
        for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            name: sharded_like(value, parameters[number])
            if _has_shape(value, parameters[number])
            else value
            for name, value in moments.items()
        }
        for number, moments in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if value.shape != shape:
                raise ValueError(f"optimizer: {name} is {tuple(value.shape)}")
            if not value.is_floating_point() or not torch.isfinite(local_part(value)).all():
                raise ValueError(f"optimizer: {name} is not finite")
        if not 0 <= moments["step"].item() <= step:
            raise ValueError(f"optimizer: step is {moments['step'].item()}, of {step}")
