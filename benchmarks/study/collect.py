"""The compact result files: every run that is complete, and paired differences.

    {"part", "title", "command", "machine", "versions", "data", "runs": [...], "pairs": [...]}

A pair is the mean over images of the difference of the losses of two runs of the same seed, with
its standard error over images, and over the seeds the mean and its standard error. A negative
difference is better than ``against``. ``settings`` is an identity of what all runs share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.finished import Finished
from benchmarks.study.kept import Kept, settings_identity
from benchmarks.study.metrics import flagged, image_losses, standard_error
from benchmarks.study.settings import BASE, Part, Run, Study
from benchmarks.study.stages import files, shared
from variant.errors import UserError
from variant.files import atomic_write

RESULTS = Path(__file__).parent / "results"
FORMAT = "variant-study-1"
COMMAND = "python -m benchmarks.study run --out FOLDER"
DIGITS = 6  # of the numbers in the files


def collect(study: Study, out: Path, results: Path, *, keep: bool = False) -> list[Path]:
    """Write the result file of every part that has a run that is complete under these settings.

    The file of a part that has none is removed: its numbers are of other settings.

    Args:
        out: folder of the runs.
        results: folder of the result files.
        keep: take what the folder lacks from the present result files, if it is of the same
            settings, VQ-VAE, classifiers and base run: see :class:`benchmarks.study.kept.Kept`.
    Raises:
        UserError: no run is complete; or, when all files are written, a metric does not flag the
            run that is broken.
    """
    written, missed = [], list[str]()
    finished = Finished(study, out)
    kept = _kept(finished, results) if keep else None
    for part in study.parts:
        own = [_row(finished, run) for run in part.runs]
        if kept is not None:
            found = [kept.row(part.name, run) for run in part.runs]
            own = [_fuller(*both) for both in zip(own, found, strict=True)]
        rows = [row for row in own if row is not None]
        if not rows:
            continue
        result = {
            "format": FORMAT,
            "part": part.name,
            "title": part.title,
            "command": COMMAND,
            "settings": settings_identity(study),
            **made_on(rows),
            "data": _data(finished),
            "runs": rows,
            "pairs": list(_pairs(finished, part, kept)),
        }
        if part.name == "control":
            result["flagged"] = _control(finished, rows, kept)
            missed = [
                f"{name}, seed {seed}"
                for seed, found in result["flagged"].items()
                for name, is_flagged in found.items()
                if not is_flagged
            ]
        path = results / f"{part.name}.json"
        write_result(path, rounded(result))
        written.append(path)
    if written:
        for part in study.parts:
            path = results / f"{part.name}.json"
            if path not in written:
                path.unlink(missing_ok=True)
    else:
        raise UserError(f"study: {out} holds no complete run of these settings")
    if missed:
        raise UserError(
            f"study: permuted labels must be flagged by every metric; not by {'; '.join(missed)}"
        )
    return written


def write_result(path: Path, values: dict[str, Any]) -> None:
    """Write a result file."""
    with atomic_write(path) as temporary:
        temporary.write_text(f"{json.dumps(values, indent=1, allow_nan=False)}\n")


def _kept(finished: Finished, results: Path) -> Kept:
    def base_row(seed: int) -> dict[str, Any] | None:
        return _row(finished, finished.study.find(BASE, seed))

    return Kept(finished.study, results, _data(finished), base_row, rounded)


def _fuller(own: dict[str, Any] | None, kept: dict[str, Any] | None) -> dict[str, Any] | None:
    """The row of the folder, unless the kept one has images of more schedules."""
    if own is None or kept is None:
        return own or kept
    return own if len(own["generated"] or ()) >= len(kept["generated"] or ()) else kept


def made_on(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The machines and versions that made rows: kept ones may be of others."""
    made = [row["made"] for row in rows]
    machines = dict.fromkeys(f"{one['cpu']} ({one['isa']})" for one in made)
    return {
        "machine": f"{' and '.join(machines)}, one thread per run",
        "versions": {
            name: " and ".join(dict.fromkeys(one[name] for one in made))
            for name in ("python", "torch")
        },
    }


def _data(finished: Finished) -> dict[str, Any]:
    study = finished.study
    vae, real, values = finished.vae() or {}, finished.real() or {}, study.values
    networks = {name: finished.classifier(name) for name in shared.CLASSIFIERS}
    return {
        **{key: study.recipe["data"].get(key) for key in ("kind", "dataset")},
        "held_out": values["images"],
        "generated": values["generated"],
        "patch_nums": study.recipe["vae"]["patch_nums"],
        "sampling": {"cfg": values["cfg"], "top_p": values["top_p"]},
        "floor": real.get("floor"),
        "reconstruction_floor": real.get("reconstruction_floor"),
        "vae_reconstruction": vae.get("reconstruction"),
        "classifier_accuracy": {n: found and found["accuracy"] for n, found in networks.items()},
        "depth": study.recipe["model"]["depth"],
        "width": study.recipe["model"]["embed_dim"],
    }


def _row(finished: Finished, run: Run) -> dict[str, Any] | None:
    """A run's row; None as long as its losses are missing, or those of other settings."""
    if run.search:
        return _search_row(finished, run)
    source, real, losses = finished.own(run), finished.real(), finished.losses(run)
    if losses is None:
        return None
    generated: dict[str, Any] = {}
    for name in run.generate:
        found = finished.generated(run, name)
        if found is not None and real is not None:
            generated[name] = {
                **found["row"],
                "floor": real["floor"]["fashion_fd"],
                "seconds": found["seconds"],
            }
    trained = finished.trained(run) if source.trains else None
    trained = trained or {}
    return {
        "name": run.name,
        "seed": run.seed,
        "commit": (trained or losses)["commit"],
        "settings": run.overrides(),
        "steps": trained.get("steps", 0),
        "work": trained.get("work", 0.0),
        "seconds": trained.get("seconds", 0.0),
        "phases": trained.get("phases"),
        "losses": {name: losses["losses"][name] for name in run.schedules},
        "layer_tokens": {name: losses["layer_tokens"][name] for name in run.schedules},
        "generated": generated or None,
        "gradient_norms": trained.get("gradient_norms"),
        "curve": trained.get("curve"),
        "made": _made(losses),
    }


def _search_row(finished: Finished, run: Run) -> dict[str, Any] | None:
    found = finished.search(run)
    if found is None:
        return None
    names = ("losses", "schedules", "exact", "searched", "images", "images_compared", "seconds")
    return {
        "name": run.name,
        "seed": run.seed,
        "commit": found["commit"],
        "settings": run.overrides(),
        **{name: found[name] for name in names},
        "generated": None,
        "made": _made(found),
    }


def _made(values: dict[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in ("date", "cpu", "isa", "python", "torch")}


def _pairs(finished: Finished, part: Part, kept: Kept | None) -> Any:
    """Every paired difference of which at least one seed is complete."""
    study = finished.study
    seeds = study.values["seeds"]
    for name, other in part.pairs:
        own = {run.seed: run for run in part.runs if run.name == name}
        against = {run.seed: run for run in part.runs if run.name == other}
        if not against:
            against = {seed: study.find(other, seed) for seed in seeds}
        if not own:
            continue
        common = [s for s in next(iter(own.values())).schedules if s in against[seeds[0]].schedules]
        for schedule in common:
            known = dict[int, tuple[float, float | None]]()
            for seed in seeds:
                found = _difference(finished, own[seed], against[seed], schedule)
                if found is None and kept is not None:
                    found = kept.pair(part.name, own[seed], against[seed], schedule)
                if found is not None:
                    known[seed] = found
            if known:
                # Rounded first: what is kept from a file is.
                means = {seed: (rounded(mean), error) for seed, (mean, error) in known.items()}
                yield pair_of(name, other, schedule, means)


def pair_of(
    run: str, against: str, schedule: str, known: dict[int, tuple[float, float | None]]
) -> dict[str, Any]:
    """A paired difference, of the mean of each seed and its standard error over images."""
    means = np.array([mean for mean, _ in known.values()])
    return {
        "run": run,
        "against": against,
        "schedule": schedule,
        "seeds": list(known),
        "by_seed": means.tolist(),
        "se_by_seed": [error for _, error in known.values()],
        "mean": float(means.mean()),
        "se": standard_error(means) if len(means) > 1 else None,
    }


def _difference(
    finished: Finished, run: Run, against: Run, schedule: str
) -> tuple[float, float] | None:
    """The mean over images of a run's loss minus another's, and its standard error."""
    losses = []
    for one in (run, against):
        folder = files.run_folder(finished.out, finished.own(one))
        record = finished.losses(one)
        if record is None or not (folder / "losses.npz").is_file():
            return None
        with np.load(folder / "losses.npz") as arrays:
            if schedule not in arrays:
                return None
            losses.append(image_losses(arrays[schedule], record["tokens"]))
    difference_N = losses[0] - losses[1]
    return float(difference_N.mean()), standard_error(difference_N)


def _control(
    finished: Finished, rows: Sequence[dict[str, Any]], kept: Kept | None
) -> dict[str, dict[str, bool]]:
    """By seed and metric, whether the broken run is flagged."""
    result = {}
    for row in rows:
        base = finished.study.find(BASE, row["seed"])
        right = _row(finished, base)
        if kept is not None:
            right = _fuller(right, kept.row(BASE, base))
        if right is None or (row["generated"] and not right["generated"]):
            continue
        result[str(row["seed"])] = flagged(row, right)
    return result


def rounded(value: Any) -> Any:
    """Numbers with six significant digits, to keep the files small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
