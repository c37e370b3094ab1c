"""The work of a run: how many epochs make it worth so many steps of the full network.

A step of a subnet costs less than one of the full network, so that runs of equal work have
different numbers of steps. Work is counted in FLOP of the layers over the tokens that they see,
attention and head included; the teacher's forward pass counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from variant.models.flops import training_flop
from variant.training.configurations import Configurations
from variant.training.recipe import Recipe
from variant_kernels import DepthSchedule

# A forward pass over that of a training step.
FORWARD = 1 / 3


def phase_epochs(phases: Sequence[int], epochs: int) -> dict[str, int]:
    """Epochs of the three phases, in about the proportions of ``phases``, together ``epochs``."""
    total = sum(phases)
    joint = round(epochs * phases[0] / total)
    until = round(epochs * (phases[0] + phases[1]) / total)
    return {"joint": joint, "transition": until - joint, "refinement": epochs - until}


class Work:
    """The work of the steps of a recipe, in steps of the full network.

    Subnets with weights of their own count as if every layer that they run had a backward pass,
    although the frozen ones have a shorter one.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.configurations = Configurations(recipe, steps_per_epoch)
        config = recipe.var_config
        self._full = training_flop(config, DepthSchedule.full(config.depth, len(config.patch_nums)))
        self._known: dict[DepthSchedule, float] = {}

    def of_step(self, step: int) -> float:
        """The work of one step."""
        configuration = self.configurations.of_step(step)
        schedule = configuration.schedule
        if schedule not in self._known:
            flop = training_flop(self.configurations.config, schedule)
            self._known[schedule] = flop / self._full
        has_teacher = self.recipe.schedule.teacher != "none" and not configuration.is_full
        return self._known[schedule] + FORWARD * has_teacher

    def of_steps(self, steps: int) -> float:
        """The work of the first so many steps."""
        return math.fsum(self.of_step(step) for step in range(steps))


def choose_epochs(
    values: dict[str, Any], make: Any, phases: Sequence[int], steps_per_epoch: int, work: float
) -> tuple[Recipe, float]:
    """The recipe whose steps are worth ``work``, as nearly as whole epochs can be.

    Args:
        values: changed keys of the recipe, without the phases.
        make: makes a recipe of changed keys.
    Returns:
        the recipe, and its work.
    """

    def of(epochs: int) -> tuple[Recipe, float]:
        schedule = {**values.get("schedule", {}), **phase_epochs(phases, epochs)}
        recipe = make({**values, "schedule": schedule})
        return recipe, Work(recipe, steps_per_epoch).of_steps(epochs * steps_per_epoch)

    # No step is worth more than one and a third: the number grows until the work is reached.
    low = max(1, int(work / steps_per_epoch / (1 + FORWARD)))
    high = low
    while of(high)[1] < work:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle)[1] < work else (low, middle)
    return min((of(low), of(high)), key=lambda found: abs(found[1] - work))
