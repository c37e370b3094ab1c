"""The progressive training schedule: which configuration each optimiser step trains.

Pure functions of integers and floats: a resumed run and every rank of a distributed run compute the
same values without communication.
Source: VARiant, section 3.3, algorithm 1 and table 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from variant.models.config import STRICT, require, require_plain_numbers
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
        """Epochs of all three phases."""
        return self.joint + self.transition + self.refinement


def paper_phases(depths: Sequence[int]) -> Phases:
    """The phases of table 7; of several depths, with the longest refinement among them.

    Args:
        depths: of the subnets.
    Raises:
        ValueError: no depth, or one that is not in the table.
    """
    unknown = [depth for depth in depths if depth not in REFINEMENT_EPOCHS]
    if unknown or not depths:
        raise ValueError(
            f"paper_phases: depths must be among {sorted(REFINEMENT_EPOCHS)}, those of the paper; "
            f"got {list(depths)}. Give the three phases explicitly for others"
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
    """Draw the depth of the subnet that an optimiser step trains; None is the full network.

    The result is a function of the arguments. The draws of different steps are independent.

    Args:
        probability: of a subnet.  depths: of the subnets, drawn uniformly.
    """
    if not depths:
        return None
    # Both numbers are always drawn, so that the depth does not depend on the probability.
    u_subnet, u_depth = np.random.default_rng((seed, step)).random(2)
    return depths[int(u_depth * len(depths))] if u_subnet < probability else None


@dataclass(frozen=True)
class ScheduleSection:
    """The subnets and the three phases of training.

    depths: of the subnets; a step that trains a subnet draws one of them.
    bridge: number of first scales at which every layer runs.
    selection: how the layers of a subnet are selected.
    joint_probability: that a step of the first phase trains a subnet.
    joint, transition, refinement: epochs of the phases; without all three, those of the paper's
        table 7.
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
        require_plain_numbers(self)
        require(len(set(self.depths)) == len(self.depths), "depths must not repeat", self.depths)
        p0 = self.joint_probability
        require(0 <= p0 <= 1, "joint_probability must be in [0, 1]", p0)
        lengths = (self.joint, self.transition, self.refinement)
        require(
            None not in lengths or lengths == (None, None, None),
            "joint, transition and refinement must be given together or not at all",
            lengths,
        )
        require(self.phases.total >= 1, "the phases must have at least one epoch", self.phases)

    @property
    def phases(self) -> Phases:
        """The lengths of the phases, from this section or from the paper's table 7."""
        if self.joint is None or self.transition is None or self.refinement is None:
            return paper_phases(self.depths)
        return Phases(self.joint, self.transition, self.refinement)

    def agrees_until(self, other: ScheduleSection, epoch: float) -> bool:
        """Whether both give every step before ``epoch`` (fractional) the same probability.

        Only the phases are compared. Without subnets the probability has no effect.
        """
        own, others = self.phases, other.phases
        if not self.depths or epoch <= min(own.joint, others.joint):
            return True
        return (own.joint, own.transition) == (others.joint, others.transition)
