"""The configurations that a recipe trains: the full network and its subnets, as depth schedules.

Plain Python on integers; every process of a run finds the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variant.models.config import VARConfig
from variant.training.phase_ends import PhaseEnds
from variant.training.recipe import Recipe
from variant.training.schedule import choose_bridge, choose_depth, num_layers
from variant_kernels import DepthSchedule
from variant_kernels.plans.depth_schedule import schedule_name

FULL = "full"


@dataclass(frozen=True)
class Configuration:
    """What one step trains, and one row of an evaluation.

    name: "full", the depth of a subnet as "4", or the depths by scale as "8x4-4-2": depth 8 at four
        scales, then 4, then 2.
    schedule: its layers at each scale.
    """

    name: str
    schedule: DepthSchedule

    @property
    def is_full(self) -> bool:
        """Whether every layer runs at every scale."""
        return self.name == FULL


def name_of(depths: Sequence[int | Sequence[int]]) -> str:
    """The name of one of ``schedules``; of lists of layers it ends in a digest of them."""
    name = schedule_name([num_layers(depth) for depth in depths])
    if all(isinstance(depth, int) for depth in depths):
        return name
    layers = [depth if isinstance(depth, int) else list(depth) for depth in depths]
    return f"{name}-layers{hashlib.sha256(repr(layers).encode()).hexdigest()[:6]}"


class Configurations:
    """The configurations of a recipe, and which of them a step trains.

    Args:
        recipe: its seed and its sections schedule, model and vae are used.
        steps_per_epoch: optimiser steps of an epoch.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.seed, self.section = recipe.seed, recipe.schedule
        self.config, self.steps_per_epoch = recipe.var_config, steps_per_epoch
        self.ends = PhaseEnds.of(self.section)
        self._subnets: dict[tuple[int, int], Configuration] = {}
        self.full = full_configuration(self.config)
        self.by_scale = {
            depths: Configuration(name_of(depths), self._by_scale(depths))
            for depths in self.section.schedules
        }

    def evaluated(self) -> tuple[Configuration, ...]:
        """The full network, every depth at the model's bridge, every schedule."""
        depths = [self.subnet(depth, self.section.bridge) for depth in self.section.depths]
        return (self.full, *depths, *self.by_scale.values())

    def trained(self) -> tuple[Configuration, ...]:
        """Every configuration that a step may train."""
        section = self.section
        bridges = section.bridges or (section.bridge,)
        depths = [self.subnet(depth, bridge) for depth in section.depths for bridge in bridges]
        return (self.full, *depths, *self.by_scale.values())

    def of_step(self, step: int) -> Configuration:
        """The configuration that a step trains, a function of (seed, step)."""
        section = self.section
        chosen = choose_depth(
            self.seed, step, self.probability(step), (*section.depths, *section.schedules)
        )
        if chosen is None:
            return self.full
        if isinstance(chosen, tuple):
            return self.by_scale[chosen]
        bridges = section.bridges or (section.bridge,)
        return self.subnet(chosen, choose_bridge(self.seed, step, bridges))

    def probability(self, step: int) -> float:
        """Probability that a step trains a subnet."""
        return self.ends.probability(self.section, step / self.steps_per_epoch)

    def observe(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Take the phases that the epochs of a run's history have ended early."""
        self.ends = PhaseEnds.of(self.section, history)

    def subnet(self, depth: int, bridge: int) -> Configuration:
        """The subnet of a depth with so many first scales at which every layer runs."""
        if (depth, bridge) not in self._subnets:  # most steps ask for one of a few
            config, scales = self.config, len(self.config.patch_nums)
            if depth == config.depth:
                schedule = DepthSchedule.full(depth, scales)
            else:
                schedule = DepthSchedule(config.depth, scales, config.subnets[depth], bridge)
            self._subnets[depth, bridge] = Configuration(str(depth), schedule)
        return self._subnets[depth, bridge]

    def _by_scale(self, depths: Sequence[int | Sequence[int]]) -> DepthSchedule:
        return self.section.by_scale(depths, self.config.depth)


def full_configuration(config: VARConfig) -> Configuration:
    """Every layer at every scale."""
    return Configuration(FULL, DepthSchedule.full(config.depth, len(config.patch_nums)))
