"""The progressive training schedule: which configuration each optimiser step trains.

Pure functions of integers and floats, so that a resumed run and every rank agree without talking.
Source: VARiant, section 3.3, algorithm 1 and table 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from variant.models.config import STRICT, require
from variant_kernels.plans.depth_schedule import Selection

# Epochs of subnet refinement by subnet depth (table 7): shallow subnets need longer.
REFINEMENT_EPOCHS = {16: 5, 8: 8, 4: 12, 2: 15}
JOINT_EPOCHS = 5
TRANSITION_EPOCHS = 15


@dataclass(frozen=True)
class Phases:
    """Lengths in epochs: joint training, transition, refinement."""

    joint: int
    transition: int
    refinement: int

    def __post_init__(self) -> None:
        for name in ("joint", "transition", "refinement"):
            if getattr(self, name) < 0:
                raise ValueError(f"Phases: {name} must be >= 0; got {getattr(self, name)}")

    @property
    def total(self) -> int:
        """Epochs of all three."""
        return self.joint + self.transition + self.refinement


def paper_phases(depths: Sequence[int]) -> Phases:
    """Table 7's phases for one subnet depth; for several, the longest refinement among them.

    Raises:
        ValueError: no depth, or one that the table does not list.
    """
    unknown = [depth for depth in depths if depth not in REFINEMENT_EPOCHS]
    if unknown or not depths:
        raise ValueError(
            f"paper_phases: depths must be among {sorted(REFINEMENT_EPOCHS)}, which the paper "
            f"lists; got {list(depths)}. Give the three phases explicitly for others"
        )
    refinement = max(REFINEMENT_EPOCHS[depth] for depth in depths)
    return Phases(JOINT_EPOCHS, TRANSITION_EPOCHS, refinement)


def subnet_probability(epoch: float, p0: float, t1: float, t2: float) -> float:
    """Probability that a step trains a subnet.

        p(e) = p0 for e < t1;  p0 + (1 - p0) * (e - t1) / t2 until t1 + t2;  1 after that

    Args:
        epoch: fractional, 0 at the first step.
        p0: probability of the joint phase, in [0, 1].
        t1, t2: epochs of the joint phase and of the transition, >= 0.
    Raises:
        ValueError: a value out of range.
    """
    if not 0 <= p0 <= 1:
        raise ValueError(f"subnet_probability: p0 must be in [0, 1]; got {p0}")
    if not (epoch >= 0 and t1 >= 0 and t2 >= 0):
        raise ValueError(
            f"subnet_probability: epoch, t1 and t2 must be >= 0; got {epoch}, {t1}, {t2}"
        )
    if epoch < t1:
        return p0
    if epoch >= t1 + t2:
        return 1.0
    return p0 + (1 - p0) * (epoch - t1) / t2


def choose_depth(seed: int, step: int, probability: float, depths: Sequence[int]) -> int | None:
    """The depth that this optimiser step trains; None is the full network.

    A subnet with the given probability, uniformly one of ``depths``. Depends on the arguments
    alone; steps are independent of each other.
    """
    if not depths:
        return None
    # One draw of both numbers whatever the outcome: the depth does not shift when p changes.
    subnet, which = np.random.default_rng((seed, step)).random(2)
    return depths[int(which * len(depths))] if subnet < probability else None


@dataclass(frozen=True)
class ScheduleSection:
    """Which subnets are trained, and the three phases in epochs.

    depths: subnet depths; each subnet step draws one of them.  bridge: scales that run every layer.
    joint_probability: of a subnet step in the first phase.
    joint, transition, refinement: epochs; all three or none, which takes the paper's table.
    """

    depths: tuple[int, ...]
    bridge: int
    selection: Selection = "nested"
    joint_probability: float = 0.2
    joint: int | None = None
    transition: int | None = None
    refinement: int | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(len(set(self.depths)) == len(self.depths), "depths must not repeat", self.depths)
        p0 = self.joint_probability
        require(0 <= p0 <= 1, "joint_probability must be in [0, 1]", p0)
        given = [value is not None for value in (self.joint, self.transition, self.refinement)]
        require(
            all(given) or not any(given),
            "joint, transition and refinement must be given together or not at all",
            (self.joint, self.transition, self.refinement),
        )
        require(self.phases.total >= 1, "the phases must have at least one epoch", self.phases)

    @property
    def phases(self) -> Phases:
        """The three lengths, explicit or from the paper's table."""
        if self.joint is None or self.transition is None or self.refinement is None:
            return paper_phases(self.depths)
        return Phases(self.joint, self.transition, self.refinement)
