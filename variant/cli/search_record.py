"""What ``variant search`` writes about itself: everything that it found, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from variant.bench.environment import environment
from variant.cli.search_job import Job
from variant.engine.planning import schedule_row
from variant.search.compare import Row
from variant.search.tree import Found, Result
from variant_kernels.plans.depth_schedule import schedule_name

FORMAT = "variant-search-1"


def record(
    job: Job,
    result: Result,
    rows: Sequence[Row],
    best: Found,
    latency: dict[str, float] | None,
    seconds: float,
) -> dict[str, Any]:
    """The fronts, the comparison, and all that they were made from.

    Args:
        latency: of ``best``, see :meth:`Job.measured_latency`.  seconds: of the search.
    """
    inside, besides = job.evaluated(result)
    return {
        "format": FORMAT,
        "model": job.command.model,
        "data": job.data,
        "images": job.losses.count,
        "images_compared": job.compared.count,
        "weights": job.weights,
        "budget": job.budgets,
        "depths": list(job.depths),
        "sets": [list(layers) for layers in job.sets],
        "influence": job.influence,
        "full_loss": job.full_loss,
        "exact": result.exact,
        "schedules": result.schedules,
        "evaluated": inside,
        "evaluated_besides": besides,
        "best": _schedule(job, best),
        "front": {name: [_schedule(job, one) for one in result.front(name)] for name in best.costs},
        "comparison": [
            {
                "cost": row.cost,
                "share": row.share,
                "with": row.name,
                "searched": schedule_name(row.searched.depths),
                "other": schedule_name(row.other.depths),
                "difference": row.difference,
                "standard_error": None if row.error != row.error else row.error,
                "verdict": row.verdict,
            }
            for row in rows
        ],
        "seconds_per_scale": job.seconds,
        "latency_measured": latency,
        "seconds": round(seconds, 2),
        "environment": environment(),
    }


def _schedule(job: Job, found: Found) -> dict[str, Any]:
    """A schedule with its loss and costs."""
    schedule = job.schedule_of(found)
    row = schedule_row(job.config, schedule, 1, job.model.var.head.weight.dtype)
    return {
        "name": schedule.name,
        "loss": found.loss,
        "difference_to_full": found.loss - job.full_loss,
        "costs": dict(found.costs),
        "kv_bytes": row.ours,
        "layers": [list(layers) for layers in found.schedule],
    }
