"""``variant search`` on the model of a run, and its schedules beside others at equal cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Run, Study, identity
from benchmarks.study.stages.files import (
    begin,
    is_done,
    provenance,
    run_folder,
    vae_file,
    write_json,
)
from benchmarks.study.stages.measuring import load_models, measured_identity
from benchmarks.study.stages.shared import PHASES
from variant.cli.options import Search
from variant.cli.search_job import Job
from variant.files import atomic_write
from variant.paths import file_sha256
from variant.search.compare import Row
from variant.supernet import VARiant
from variant.training.recipe_reference import recipe_toml
from variant_kernels.plans.depth_schedule import schedule_name

# Nothing is left out: the comparison has budgets of its own below these.
BUDGETS = {"kv": 1.0, "work": 1.0}
OTHERS = {"depth and bridge": "grid", "equidistant or trained layers": "even"}


def schedule_key(kind: str, cost: str, share: float) -> str:
    """The name of the best schedule of a kind within a budget, as ``searched kv=0.5``."""
    return f"{kind} {cost}={share:g}"


def search_file(out: Path, run: Run) -> Path:
    """What a search has found."""
    return run_folder(out, run) / "search.json"


def search_identity(study: Study, out: Path, run: Run) -> str:
    """What a search and its comparison depend on."""
    weights = [measured_identity(study, out, run), file_sha256(vae_file(out))]
    return identity("search-1", weights, study.recipe["data"], study.recipe["seed"], run.search)


def measure_search(study: Study, out: Path, run: Run, report: Callable[[str], None]) -> None:
    """Search, and measure the best schedules within each budget on the images that did not choose.

    A search that was killed goes on from the losses that it had written.
    """
    wanted, path = search_identity(study, out, run), search_file(out, run)
    if is_done(path, wanted):
        return
    folder = run_folder(out, run) / "search"
    begin(folder, wanted)
    recipe = study.recipe_of({"schedule": PHASES})
    data = folder / "data.toml"
    with atomic_write(data) as temporary:
        temporary.write_text(recipe_toml(recipe, every_key=False))
    command = Search(
        model=run.name, data=str(data), images=run.search, out=folder / "losses", resume=True
    )
    command.out.mkdir(exist_ok=True)
    started = time.process_time()
    job = Job(command, VARiant(*load_models(study, out, run)), BUDGETS)
    try:
        result = job.run(report)
        rows = job.compare(result)
    finally:
        job.save()
    write_json(
        path,
        {
            "identity": wanted,
            **_compared(job, rows),
            "exact": result.exact,
            "searched": result.schedules,
            "images": job.losses.count,
            "images_compared": job.compared.count,
            "seconds": time.process_time() - started,
            **provenance(),
        },
    )


def _compared(job: Job, rows: list[Row]) -> dict[str, Any]:
    """Losses of the best schedules of each kind within each budget, and the schedules' names."""
    losses: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in rows:
        for kind, found in (("searched", row.searched), (OTHERS[row.name], row.other)):
            key = schedule_key(kind, row.cost, row.share)
            loss_N = job.compared.of_schedule(found.schedule)
            error = float(loss_N.std(ddof=1) / len(loss_N) ** 0.5)
            losses[key] = {"mean": float(loss_N.mean()), "se": error}
            names[key] = schedule_name(found.depths)
    return {"losses": losses, "schedules": names}
