"""The progressive training schedule: which configuration each optimiser step trains.

Pure functions of integers and floats: a resumed run and every rank of a distributed run compute the
same values without communication.
Source: VARiant, section 3.3, algorithm 1 and table 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import ConfigDict

from variant.models.config import (
    LIMITS,
    STRICT,
    ZoneKind,
    check_zone_options,
    require,
    require_plain_numbers,
)
from variant.models.ranges import CountOrZero, Positive, Share, Within
from variant_kernels.arguments import integers, shown
from variant_kernels.plans.depth_schedule import DepthSchedule, Selection

# Epochs of subnet refinement by subnet depth (table 7): shallow subnets need longer.
REFINEMENT_EPOCHS = {16: 5, 8: 8, 4: 12, 2: 15}
JOINT_EPOCHS = 5
TRANSITION_EPOCHS = 15

Subnet = TypeVar("Subnet")
# Their bounds are those of the model, and are checked with it.
Bridge: TypeAlias = Annotated[int, Within(words="in [0, number of scales]")]
DepthOrLayer: TypeAlias = Annotated[
    int, Within(words="depths in [2, model.depth] or layers in [0, model.depth - 1]")
]


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
        TypeError: no list of integers.
        ValueError: no depth, or one that is not in the table.
    """
    depths = integers("paper_phases", "depths", depths)
    unknown = [depth for depth in depths if depth not in REFINEMENT_EPOCHS]
    if unknown or not depths:
        raise ValueError(
            f"paper_phases: depths must be among {sorted(REFINEMENT_EPOCHS)}, those of the paper; "
            f"got {shown(list(depths))}. Give the three phases explicitly for others"
        )
    refinement = max(REFINEMENT_EPOCHS[depth] for depth in depths)
    return Phases(JOINT_EPOCHS, TRANSITION_EPOCHS, refinement)


def subnet_probability(epoch: float, p0: float, t1: float, t2: float, p1: float = 1.0) -> float:
    """Probability that a step trains a subnet.

        p(e) = p0 for e < t1;  p0 + (p1 - p0) * (e - t1) / t2 until t1 + t2;  p1 after that

    Args:
        epoch: fractional, 0 at the first step.
        p0, p1: probability of the joint phase and that of the refinement, in [0, 1]; the paper's
            p1 is 1.
        t1, t2: epochs of the joint phase and of the transition, >= 0.
    Raises:
        ValueError: a value out of range.
    """
    for name, p in (("p0", p0), ("p1", p1)):
        if not 0 <= p <= 1:
            raise ValueError(f"subnet_probability: {name} must be in [0, 1]; got {p}")
    if not (epoch >= 0 and t1 >= 0 and t2 >= 0):
        raise ValueError(
            f"subnet_probability: epoch, t1 and t2 must be >= 0; got {epoch}, {t1}, {t2}"
        )
    if epoch < t1:
        return p0
    if epoch >= t1 + t2:
        return p1
    return p0 + (p1 - p0) * (epoch - t1) / t2


def choose_depth(
    seed: int, step: int, probability: float, depths: Sequence[Subnet]
) -> Subnet | None:
    """Draw the subnet that an optimiser step trains; None is the full network.

    The result is a function of the arguments. The draws of different steps are independent.

    Args:
        probability: of a subnet.  depths: the subnets (or their depths), drawn uniformly.
    """
    if not depths:
        return None
    u_subnet, u_depth, _ = _draws(seed, step)
    return depths[int(u_depth * len(depths))] if u_subnet < probability else None


def choose_bridge(seed: int, step: int, bridges: Sequence[int]) -> int:
    """Draw the bridge of the subnet that an optimiser step trains, uniformly.

    The result is a function of the arguments, independent of the subnet that the step draws.
    """
    if len(bridges) == 1:
        return bridges[0]
    return bridges[int(_draws(seed, step)[2] * len(bridges))]


def _draws(seed: int, step: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) of a step: for the choice of a subnet, which one, its bridge.

    All are always drawn, so that no choice depends on the arguments of another.
    """
    u_subnet, u_depth, u_bridge = np.random.default_rng((seed, step)).random(3)
    return u_subnet, u_depth, u_bridge


def num_layers(depth: int | Sequence[int]) -> int:
    """Of a depth, or of a list of layers."""
    return depth if isinstance(depth, int) else len(depth)


@dataclass(frozen=True)
class ScheduleSection:
    """The subnets and the three phases of training.

    A step that trains a subnet draws one of ``depths`` and ``schedules``.

    depths: depths of the subnets; [] with no schedules trains the full network only.
    bridge: number of first scales at which every layer of a subnet of ``depths`` runs; recorded in
        the model, and used by the evaluation.
    selection: how the layers of a subnet are selected: "nested" (each depth within the next larger
        of 16, 8, 4, 2) or "equidistant".
    joint_probability: probability of a subnet step in the first phase.
    final_probability: probability of a subnet step in the last phase, which the second phase
        approaches linearly; the paper has 1.
    joint: epochs of the first phase; without all three, those of the paper's table 7.
    transition: epochs of the second phase.
    refinement: epochs of the third phase.
    phases: "planned", or "auto": a phase ends early when three evaluations in a row lower its
        best held-out loss by less than 0.1 %, and its epochs are the most that it lasts.
    bridges: bridges of which every subnet step of ``depths`` draws one, in place of ``bridge``; []
        is always ``bridge``.
    schedules: further subnets, each a list of one depth per scale, which never rises, as
        [8, 8, 8, 4, 4, 2], or of a list of layers per scale; or the file of a schedule, or such
        depths as "8x3-4x2-2".
    teacher: the loss of a subnet step has the divergence from a teacher, the full network with
        other weights: "frozen", those that model.weights names; "ema", the moving average; "none"
        has no teacher.
    teacher_weight: weight of that divergence, KL(teacher || subnet) in nats a token.
    zone_weights: "shared" trains one set of weights; else the full network is frozen and every
        step trains a subnet's own weights for the flexible zone: "adaln", "lora" or "copies".
    lora_rank: rank of the low-rank additions of "lora".
    zone_adaln: with "lora": train an adaLN projection of the zone too.
    """

    depths: tuple[Annotated[int, Within(words="in [2, model.depth]")], ...]
    bridge: Bridge
    selection: Selection = "nested"
    joint_probability: Share = 0.2
    final_probability: Share = 1.0
    joint: CountOrZero | None = None
    transition: CountOrZero | None = None
    refinement: CountOrZero | None = None
    phases: Literal["planned", "auto"] = "planned"
    bridges: tuple[Bridge, ...] = ()
    schedules: tuple[tuple[DepthOrLayer | tuple[DepthOrLayer, ...], ...], ...] = ()
    teacher: Literal["none", "frozen", "ema"] = "none"
    teacher_weight: Positive = 1.0
    zone_weights: ZoneKind = "shared"
    lora_rank: CountOrZero = 0
    zone_adaln: bool = True

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        for name in ("depths", "bridges", "schedules"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{name} must not repeat", values)
        require(
            len(self.schedules) <= LIMITS["subnets"],
            f"schedules must be at most {LIMITS['subnets']}",
            len(self.schedules),
        )
        for depths in self.schedules:
            sizes = map(num_layers, depths)
            falls = all(a >= b for a, b in itertools.pairwise(sizes))
            require(falls, "schedules must have depths that never rise", list(depths))
        lengths = (self.joint, self.transition, self.refinement)
        require(
            None not in lengths or lengths == (None, None, None),
            "joint, transition and refinement must be given together or not at all",
            lengths,
        )
        require(
            self.phase_lengths.total >= 1,
            "joint, transition and refinement must have at least one epoch together",
            self.phase_lengths.total,
        )
        check_zone_options(self.zone_weights, self.lora_rank, self.zone_adaln)
        if self.has_zone_weights:
            self._check_zone_weights()

    def _check_zone_weights(self) -> None:
        why = f'zone_weights "{self.zone_weights}" train subnets at every step'
        require(self.has_subnets, f"{why}: depths or schedules must not be empty", self.depths)
        require(
            (self.joint or 0) == (self.transition or 0) == 0,
            f"{why}: joint and transition must be 0",
            (self.joint, self.transition),
        )
        final = self.final_probability
        require(final == 1, f"{why}: final_probability must be 1", final)

    @property
    def has_subnets(self) -> bool:
        """Whether any step can train a subnet."""
        return bool(self.depths or self.schedules)

    @property
    def has_zone_weights(self) -> bool:
        """Whether the subnets have weights of their own, which alone are trained."""
        return self.zone_weights != "shared"

    @property
    def phase_lengths(self) -> Phases:
        """The lengths of the phases, from this section or from the paper's table 7.

        Zone weights are trained in the third phase only, in which every step trains a subnet.
        """
        if self.joint is None or self.transition is None or self.refinement is None:
            paper = paper_phases(
                (*self.depths, *(num_layers(depths[-1]) for depths in self.schedules if depths))
            )
            return Phases(0, 0, paper.refinement) if self.has_zone_weights else paper
        return Phases(self.joint, self.transition, self.refinement)

    def probability(self, epoch: float) -> float:
        """Probability that a step at that fractional epoch trains a subnet."""
        phases = self.phase_lengths
        return subnet_probability(
            epoch,
            self.joint_probability,
            phases.joint,
            phases.transition,
            self.final_probability,
        )

    def by_scale(self, depths: Sequence[int | Sequence[int]], full_depth: int) -> DepthSchedule:
        """The layers of one of ``schedules`` in a model of ``full_depth`` layers.

        Raises:
            ValueError: a depth is out of range, or a scale has layers that the previous one has
                not.
        """
        return DepthSchedule.from_depths(depths, full_depth=full_depth, selection=self.selection)

    def agrees_until(self, other: ScheduleSection, epoch: float) -> bool:
        """Whether both give every step before ``epoch`` (fractional) the same probability.

        Only the phases and the final probability are compared. Without subnets the probability has
        no effect.
        """
        own, others = self.phase_lengths, other.phase_lengths
        if "auto" in (self.phases, other.phases):
            # Completed phases may have ended before the planned epochs.
            same = (own.joint, own.transition) == (others.joint, others.transition)
            return epoch == 0 or (same and self.final_probability == other.final_probability)
        if not self.has_subnets or epoch <= min(own.joint, others.joint):
            return True
        if {self.final_probability, other.final_probability} == {self.joint_probability}:
            return True
        return (own.joint, own.transition, self.final_probability) == (
            others.joint,
            others.transition,
            other.final_probability,
        )
