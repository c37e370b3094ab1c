"""Which settings of a recipe may differ between a run and its continuation.

Those that change no number of the training: names, folders, threads, how often is saved, and the
settings of the other task. The number of epochs may change too: the steps that remain then follow
the schedule of the new number, the completed ones stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from variant.differences import change_texts, differences, listed
from variant.errors import UserError
from variant.models.config import parse_dataclass
from variant.training.recipe import Recipe
from variant_kernels.wording import counted

# Keys that change no number; the contents of the data folders are compared by their digest.
FREE = (
    "name",
    "description",
    "data.train",
    "data.held_out",
    "data.train_labels",
    "data.held_out_labels",
    "data.tokens",
    "data.workers",
    "data.max_bad",
    "logging.",
    "output.",
    "parallel.",
)
# Keys that change the rounding of numbers alone.
ROUNDING = ("memory.", "compile.blocks")
# Keys that a task does not use, or compares by the contents of the file that they name.
UNUSED = {
    "var": ("vae_training.", "model.weights"),
    "vae": (
        "model.",
        "optim.",
        "schedule.",
        "memory.",
        "compile.",
        "ema.",
        "vae_training.start_weights",
        "vae_training.perceptual.vgg_weights",
        "vae_training.perceptual.lpips_weights",
        "data.copies",
        "data.mixup",
    ),
}
# Keys of the number of epochs.
EPOCHS = {
    "var": ("schedule.joint", "schedule.transition", "schedule.refinement"),
    "vae": ("vae_training.epochs",),
}
# Keys that may differ as long as the completed steps keep their probability of a subnet.
LATER = {"var": ("schedule.final_probability",), "vae": ()}
SHOWN = 5  # differing keys in a message


def num_epochs(recipe: Recipe, kind: str) -> int:
    """Epochs of a complete run of the task ``kind``, "var" or "vae"."""
    return recipe.vae_training.epochs if kind == "vae" else recipe.schedule.phase_lengths.total


def read_recipe(saved: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in a checkpoint.  Raises: UserError, if it is none."""
    try:
        return parse_dataclass(Recipe, saved, f"{where}: is damaged: recipe")
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())[:500]) from None


def compare_recipes(old: Recipe, new: Recipe, kind: str, where: str) -> list[str]:
    """Compare the recipe of a run with the one that continues it.

    Args:
        where: names the checkpoint in errors.
    Returns:
        the allowed differences, as ``data.workers 2 -> 4``.
    Raises:
        UserError: naming keys that must not differ, with both values.
    """
    refused, allowed = [], []
    for change in differences(_comparable(old), _comparable(new)):
        key = change[0]
        is_allowed = (
            _starts(key, FREE + ROUNDING + UNUSED[kind]) or key in EPOCHS[kind] + LATER[kind]
        )
        (allowed if is_allowed else refused).append(change)
    if refused:
        raise UserError(
            f"{where}: was written with other settings: {listed(change_texts(refused), SHOWN)}; "
            "resume with the first value of each, or train into another folder"
        )
    return change_texts(allowed)


def compare_schedules(
    old: Recipe, new: Recipe, kind: str, step: int, steps_per_epoch: int, where: str
) -> None:
    """Check that a run of ``step`` steps can go on with the epochs of another recipe.

    Raises:
        UserError: they are too few, or change the schedule of the completed steps.
    """
    before, after = num_epochs(old, kind), num_epochs(new, kind)
    if after < before and step >= after * steps_per_epoch:
        raise UserError(
            f"{where}: has completed {step / steps_per_epoch:g} of {counted(before, 'epoch')}; "
            f"the recipe now has {after}. Give more epochs ({', '.join(EPOCHS[kind])})"
        )
    epoch = step / steps_per_epoch
    if kind == "var" and not new.schedule.agrees_until(old.schedule, epoch):
        was, now = old.schedule.phase_lengths, new.schedule.phase_lengths
        before, after = old.schedule.final_probability, new.schedule.final_probability
        raise UserError(
            f"{where}: has completed {counted(epoch, 'epoch')} with schedule.joint {was.joint}, "
            f"schedule.transition {was.transition} and schedule.final_probability {before:g}; got "
            f"{now.joint}, {now.transition} and {after:g}, which change their schedule. Only "
            "refinement may change now"
        )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values, with the phases written out where it takes those of the paper."""
    values = recipe.to_dict()
    phases = recipe.schedule.phase_lengths
    values["schedule"] |= {
        "joint": phases.joint,
        "transition": phases.transition,
        "refinement": phases.refinement,
    }
    return values


def _starts(key: str, names: tuple[str, ...]) -> bool:
    """Whether the key is one of the names, or is in a section whose name ends with a dot."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
