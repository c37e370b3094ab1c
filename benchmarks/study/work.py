"""The work of a run: how many epochs make it worth so many steps of the full network.

A step of a subnet costs less than one of the full network, so that runs of equal work have
different numbers of steps. Work is counted in FLOP of the layers over the tokens that they see,
attention and head included; the teacher's forward pass counts, and what is frozen counts for the
passes that it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from variant.models.config import VARConfig
from variant.models.flops import linears, training_flop
from variant.training.configurations import Configurations
from variant.training.recipe import Recipe
from variant_kernels import DepthSchedule

BLOCK_LINEARS = ("mat_qkv", "proj", "fc1", "fc2")
# The parts of a training step's work, each a third: the forward pass, and in the backward pass the
# gradients of the inputs and those of the weights.
FORWARD, FROZEN = 1 / 3, 2 / 3


def phase_epochs(phases: Sequence[int], epochs: int) -> dict[str, int]:
    """Epochs of the three phases, in about the proportions of ``phases``, together ``epochs``."""
    total = sum(phases)
    joint = round(epochs * phases[0] / total)
    until = round(epochs * (phases[0] + phases[1]) / total)
    return {"joint": joint, "transition": until - joint, "refinement": epochs - until}


class Work:
    """The work of the steps of a recipe, in steps of the full network."""

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
            self._known[schedule] = step_flop(self.configurations.config, schedule) / self._full
        has_teacher = self.recipe.schedule.teacher != "none" and not configuration.is_full
        return self._known[schedule] + FORWARD * has_teacher

    def of_steps(self, steps: int) -> float:
        """The work of the first so many steps."""
        return math.fsum(self.of_step(step) for step in range(steps))


def step_flop(config: VARConfig, schedule: DepthSchedule) -> float:
    """FLOP of a training step of one image.

    Where subnets have weights of their own, everything else is frozen: the layers of the bridge
    have a forward pass only, the head and the frozen layers of the flexible zone (LoRA, adaLN) have
    no gradients of weights. Attention has no weights.
    """
    if config.zone_weights == "shared":
        return training_flop(config, schedule)
    zones = {layers for layers in config.subnets.values() if len(layers) < config.depth}
    is_flexible = [schedule.active_layers(k) in zones for k in range(schedule.num_scales)]
    flop, scale = 0.0, 0
    for x in linears(config, schedule, 1, guidance=False):
        if x.name == "head":  # the last one of its scale
            flop += 3 * x.flop * FROZEN
            scale += 1
        elif x.name in BLOCK_LINEARS and is_flexible[scale]:
            trained = 1.0 if config.zone_weights == "copies" else FROZEN
            flop += 3 * x.flop * trained
            flop += 3 * 2 * x.rows * config.lora_rank * (x.inputs + x.outputs)
        elif x.name == "ada_lin":  # the bridge's, and that of the flexible zone
            own = config.zone_adaln and any(x.layer in layers for layers in zones)
            flop += x.flop + 3 * x.flop * own
        else:
            flop += x.flop
    tokens, layout = config.layout.tokens, config.layout
    for k, flexible in enumerate(is_flexible):
        pairs = len(schedule.active_layers(k)) * tokens[k] * layout.visible(k)
        flop += 4 * config.embed_dim * pairs * (3 if flexible else 1)
    return flop


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
