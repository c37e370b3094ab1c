"""What a checkpoint must hold: types and ranges of its entries, without the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from variant.training.phase_ends import ENDED, PHASES
from variant.training.run_state import ADVERSARIAL, has_best
from variant_kernels.wording import counted

# The keys of a checkpoint besides "format" and "kind", and the types of their values.
CONTENTS: dict[str, type | tuple[type, ...]] = {
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
    "best_sha256": (str, type(None)),
    "random": dict,
}
# Of the history. "best_not_kept" marks an epoch whose weights were the best, but not written.
ENTRY = {"epoch", "step", "seconds", "train", "best_not_kept", ENDED, ADVERSARIAL}
EVALUATIONS = ("held_out", "ema_held_out")
ENTRY |= {name + end for name in EVALUATIONS for end in ("", "_mean", "_by_scale")}
# Of the measurements that go on, besides "meters".
LOG = {"steps": int, "seconds": float, "flop": int, "waited": float, "waited_before": float}
MAX_STEPS = 2**53


def check_contents(saved: Mapping[str, Any]) -> None:
    """Check the entries of a checkpoint, as far as they do not depend on the model.

    Raises:
        ValueError: naming the entry that is missing, of another type or out of range.
    """
    wrong = [key for key, kind in CONTENTS.items() if not _is(saved.get(key, Ellipsis), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} missing or of another type")
    step, total = saved["step"], saved["total_steps"]
    _require(1 <= total <= MAX_STEPS, f"total_steps is {total}")
    _require(0 <= step <= total, f"step is {step}, of {counted(total, 'step')}")
    for name, value in saved["inputs"].items():
        _require(_is(name, str) and _is_input(value), f"inputs: {name!r:.100}")
    _require(_is_number(saved["seconds"]) and saved["seconds"] >= 0, "seconds is out of range")
    _check_tensors("module", saved["module"])
    if saved.get("ema") is not None:  # without one: of a run that keeps no average
        _require(_is(saved["ema"], dict), "ema is of another type")
        _check_tensors("ema", saved["ema"])
    _check_optimizer(saved["optimizer"])
    if saved.get("adversary") is not None:  # without one: of a run that trains no discriminator
        adversary = saved["adversary"]
        _require(_is(adversary, dict), "adversary is of another type")
        _require(adversary.keys() == {"module", "optimizer"}, "adversary: its entries")
        _require(all(_is(part, dict) for part in adversary.values()), "adversary: its entries")
        _check_tensors("adversary", adversary["module"])
        _check_optimizer(adversary["optimizer"])
    for name, value in saved["scaler"].items():
        _require(_is(name, str) and _is_number(value), f"scaler: {name!r:.100} is no number")
    for name, pair in saved["sums"].items():
        is_pair = _is(name, str) and _is(pair, tuple) and len(pair) == 2 and _is(pair[1], int)
        _require(is_pair and _is_number(pair[0]) and pair[1] >= 1, f"sums: {name!r:.100}")
    _check_history(saved["history"], step)
    if saved.get("log", {}) != {}:
        _check_log(saved["log"])
    evaluated = any(has_best(entry) for entry in saved["history"])
    _require(
        evaluated == (saved["best_sha256"] is not None),
        "best_sha256 and history do not agree on whether there are best weights",
    )


def check_epochs(saved: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Check that the history ends at the epoch of the checkpoint's step.

    Raises:
        ValueError: it does not.
    """
    step, history = saved["step"], saved["history"]
    _require(
        len(history) == step // steps_per_epoch,
        f"history has {counted(len(history), 'epoch')}, but step {step} is in epoch "
        f"{step // steps_per_epoch} of {counted(steps_per_epoch, 'step')} each",
    )
    _require(
        all(entry["step"] == entry["epoch"] * steps_per_epoch for entry in history),
        f"history: its epochs do not end every {counted(steps_per_epoch, 'step')}",
    )
    # The sums are those of the present epoch, or of the one that has just ended.
    in_sums = sum(count for _, count in saved["sums"].values())
    in_epoch = step % steps_per_epoch or min(step, steps_per_epoch)
    _require(in_sums == in_epoch, f"sums has {counted(in_sums, 'step')}; the epoch has {in_epoch}")


def _check_tensors(what: str, tensors: Mapping[Any, Any]) -> None:
    for name, tensor in tensors.items():
        _require(_is(name, str) and _is(tensor, Tensor), f"{what}: {name!r:.100} is no tensor")


def _check_optimizer(optimizer: Mapping[Any, Any]) -> None:
    _require(
        _is(optimizer.get("state"), dict) and _is(optimizer.get("param_groups"), list),
        "optimizer has no state or no param_groups",
    )
    for group in optimizer["param_groups"]:
        _require(_is(group, dict) and _is(group.get("params"), list), "optimizer: param_groups")
    for moments in optimizer["state"].values():
        _require(_is(moments, dict), "optimizer: state")


def _check_history(history: list[Any], step: int) -> None:
    for number, entry in enumerate(history, 1):
        where = f"history[{number - 1}]"
        _require(_is(entry, dict) and entry.keys() <= ENTRY, f"{where} is no epoch")
        _require(_is(entry.get("epoch"), int) and entry["epoch"] == number, f"{where}: epoch")
        _require(_is(entry.get("step"), int) and 0 < entry["step"] <= step, f"{where}: step")
        _require(_is_number(entry.get("seconds")), f"{where}: seconds")
        _require(_are_losses(entry.get("train")), f"{where}: train")
        _require(entry.get(ENDED, PHASES[0]) in PHASES, f"{where}: {ENDED}")
        for name in EVALUATIONS:
            if name in entry or f"{name}_mean" in entry:
                _require(_are_losses(entry.get(name)), f"{where}: {name}")
                _require(_is_number(entry.get(f"{name}_mean")), f"{where}: {name}_mean")
            by_scale = entry.get(f"{name}_by_scale", {})
            _require(_is(by_scale, dict), f"{where}: {name}_by_scale")
            for losses in by_scale.values():
                is_row = _is(losses, list) and all(map(_is_number, losses))
                _require(is_row, f"{where}: {name}_by_scale")
        _require("held_out" in entry or "ema_held_out" not in entry, f"{where}: ema_held_out")


def _check_log(log: Any) -> None:
    _require(_is(log, dict) and log.keys() == {*LOG, "meters"}, "log: its entries")
    for name, kind in LOG.items():
        _require(_is(log[name], kind) and _is_number(log[name]) and log[name] >= 0, f"log: {name}")
    _require(_is(log["meters"], dict), "log: meters")
    for key, row in log["meters"].items():
        is_row = _is(key, str) and _is(row, list) and len(row) > 1
        _require(is_row and all(map(_is_number, row)) and row[-1] >= 0, f"log: {key!r:.100}")


def _is_input(value: object) -> bool:
    """Whether the value is a number, a digest, None, or digests by name."""
    if isinstance(value, dict):
        return all(_is(name, str) and _is(digest, str) for name, digest in value.items())
    return value is None or _is(value, (int, str))


def _are_losses(value: object) -> bool:
    """Whether the value is a dictionary of finite losses by name, with at least one."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(_is(name, str) and _is_number(loss) for name, loss in value.items())
    )


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance, but a boolean is no integer."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is(value, (int, float)) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
