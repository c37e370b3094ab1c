"""Phases that end when the held-out losses stop falling (``phases = "auto"``).

A phase ends with the third evaluation in a row whose loss is not 0.1 % below its best one. The
joint phase is judged by the mean over all configurations, the two others by the mean over the
subnets, which they train more and more. An end is recorded in the entry of its epoch; everything
else follows from these entries, so that a resumed run decides as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variant.training.schedule import ScheduleSection, subnet_probability

PHASES = ("joint", "transition", "refinement")
ENDED = "phase_ended"  # key of a history entry: the phase that its epoch ends early
PATIENCE = 3  # evaluations in a row without progress
TOLERANCE = 1e-3  # of the best loss, which progress must exceed


@dataclass(frozen=True)
class PhaseEnds:
    """The epoch at which each phase ends, counted from the start of the run."""

    joint: int
    transition: int
    refinement: int

    @classmethod
    def of(cls, section: ScheduleSection, history: Sequence[Mapping[str, Any]] = ()) -> PhaseEnds:
        """The ends after the epochs of ``history``; phases that go on end as the section says."""
        early = {entry[ENDED]: entry["epoch"] for entry in history if ENDED in entry}
        lengths = section.phase_lengths
        joint = early.get("joint", lengths.joint)
        transition = early.get("transition", joint + lengths.transition)
        return cls(joint, transition, early.get("refinement", transition + lengths.refinement))

    def phase_at(self, epoch: int) -> str | None:
        """The phase of the epoch that follows ``epoch`` completed ones; None after the last."""
        ends = (self.joint, self.transition, self.refinement)
        return next((name for name, end in zip(PHASES, ends, strict=True) if epoch < end), None)

    def probability(self, section: ScheduleSection, epoch: float) -> float:
        """Probability that a step at that fractional epoch trains a subnet."""
        if epoch >= self.transition:
            return section.final_probability
        return subnet_probability(
            epoch,
            section.joint_probability,
            self.joint,
            section.phase_lengths.transition,
            section.final_probability,
        )


def ended_phase(section: ScheduleSection, history: Sequence[Mapping[str, Any]]) -> str | None:
    """The phase that the last epoch of ``history`` ends by a plateau; None if it goes on.

    Args:
        history: entries of completed epochs; "held_out" has the losses of an evaluated one.
    """
    if section.phases != "auto" or not history or "held_out" not in history[-1]:
        return None
    epoch = history[-1]["epoch"]
    ends = PhaseEnds.of(section, history)
    name = ends.phase_at(epoch - 1)
    planned = {"joint": ends.joint, "transition": ends.transition, "refinement": ends.refinement}
    if name is None or epoch >= planned[name]:
        return None  # it ends here anyway
    start = {"joint": 0, "transition": ends.joint, "refinement": ends.transition}[name]
    losses = [
        _mean(entry["held_out"], subnets_only=name != "joint")
        for entry in history
        if entry["epoch"] > start and "held_out" in entry
    ]
    return name if _has_stopped_falling(losses) else None


def _mean(losses: Mapping[str, float], *, subnets_only: bool) -> float:
    """The mean over all configurations, or over the subnets where there are any."""
    chosen = [loss for name, loss in losses.items() if name != "full"] if subnets_only else []
    chosen = chosen or list(losses.values())
    return sum(chosen) / len(chosen)


def _has_stopped_falling(losses: Sequence[float]) -> bool:
    best, without_progress = float("inf"), 0
    for loss in losses:
        if loss < best * (1 - TOLERANCE):
            best, without_progress = loss, 0
        else:
            without_progress += 1
    return without_progress >= PATIENCE
