"""Checkpoints of a training run, written and read by one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variant.checkpoints.model_folder import load_state
from variant.errors import UserError
from variant.files import read_pickle, read_safetensors, save_pickle, save_safetensors
from variant.tensor_files import stored_safetensors
from variant.training.random_state import random_state, set_random_state
from variant.training.run_state import RunState

FORMAT = "variant-train-2"
# The keys of a checkpoint besides "format" and "kind", and the types of their values.
CONTENTS = {
    "recipe": dict,
    "inputs": dict,
    "step": int,
    "total_steps": int,
    "seconds": float,
    "module": dict,
    "optimizer": dict,
    "scaler": dict,
    "sums": dict,
    "history": list,
    "random": dict,
}


class Checkpointer:
    """Writes and reads the checkpoint and the best weights of one run.

    Files are named after the task's kind: ``KIND-last.pt`` holds everything that a resumed run
    needs, ``KIND-best.safetensors`` the weights of the lowest held-out loss. A file is replaced
    only when the new one is complete.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.last = folder / f"{kind}-last.pt"
        self.best = folder / f"{kind}-best.safetensors"

    def read(self) -> dict[str, Any]:
        """The checkpoint's contents; the shapes of its tensors are not checked here.

        Raises:
            UserError: missing, damaged, or not a checkpoint of this kind.
        """
        saved = read_pickle(self.last)
        if saved.get("format") != FORMAT or saved.get("kind") != self.kind:
            raise UserError(
                f'{self.last}: is not a checkpoint of this program: "format" and "kind" must be '
                f'"{FORMAT}" and "{self.kind}"; got {saved.get("format")!r} and '
                f"{saved.get('kind')!r}"
            )
        wrong = [key for key, kind in CONTENTS.items() if not isinstance(saved.get(key), kind)]
        if wrong:
            raise UserError(
                f"{self.last}: is damaged: {', '.join(wrong)} missing or of another type"
            )
        return saved

    def save(
        self,
        state: RunState,
        *,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Any],
        total_steps: int,
    ) -> None:
        """Write the checkpoint, random generators included.

        Args:
            recipe: as plain values.  inputs: values that identify the training data.
            total_steps: optimiser steps of the complete run.
        Raises:
            UserError: the file cannot be written.
        """
        save_pickle(
            self.last,
            {
                "format": FORMAT,
                "kind": self.kind,
                "recipe": dict(recipe),
                "inputs": dict(inputs),
                "step": state.step,
                "total_steps": total_steps,
                "seconds": state.seconds,
                "module": state.module.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "sums": state.loss_sums,
                "history": state.history,
                "random": random_state(),
            },
        )

    def restore(self, state: RunState, saved: Mapping[str, Any]) -> None:
        """Load a checkpoint's contents into ``state`` and into the random generators.

        Raises:
            UserError: it, or the best weights beside it, are damaged or of another model.
        """
        load_state(state.module, saved["module"], str(self.last))
        try:
            state.optimizer.load_state_dict(saved["optimizer"])
            _check_moments(state.optimizer)
            state.scaler.load_state_dict(saved["scaler"])
            state.step, state.seconds = saved["step"], saved["seconds"]
            state.loss_sums = {name: (pair[0], pair[1]) for name, pair in saved["sums"].items()}
            state.history = saved["history"]
            json.dumps(state.history)  # raises TypeError if the metrics file cannot hold it
            best_entry = state.best_entry()
            set_random_state(saved["random"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            raise UserError(f"{self.last}: is damaged: {' '.join(str(e).split())[:200]}") from None
        if best_entry is not None:
            self._check_best(state)

    def save_best(self, state: RunState) -> None:
        """Write the module's present weights as the best ones."""
        weights = {
            key: value.detach().cpu().contiguous()
            for key, value in state.module.state_dict().items()
        }
        save_safetensors(self.best, weights)

    def load_best(self, state: RunState) -> None:
        """Load the best weights into the module."""
        state.module.load_state_dict(read_safetensors(self.best))

    def _check_best(self, state: RunState) -> None:
        """Compare the shapes in the file of the best weights with the module's."""
        shapes = {key: tuple(value.shape) for key, value in stored_safetensors(self.best).items()}
        weights = state.module.state_dict()
        if shapes != {key: tuple(value.shape) for key, value in weights.items()}:
            raise UserError(f"{self.best}: does not hold the weights of this run's model")


def _check_moments(optimizer: Any) -> None:
    """Check that AdamW's moments have the shapes of their parameters; load_state_dict does not."""
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameter.shape:
                raise ValueError(f"optimizer: {name} is {tuple(moments[name].shape)}")
