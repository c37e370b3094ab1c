"""Seeds that another machine made join the result files.

Such a seed has a VQ-VAE, tokens, classifiers and a base run of its own. Differences are paired by
seed, so all that a difference compares is of one machine; an error over seeds then holds what
another VQ-VAE changes too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.study.collect import collect, pair_of, rounded, write_result
from benchmarks.study.settings import Study
from variant.errors import UserError

Values = dict[str, Any]
# Of a part: what a joined seed has of its own.
ABOUT = ("machine", "versions", "data")


def join(study: Study, out: Path, results: Path) -> list[Path]:
    """Add the complete runs of a folder to result files that lack their seeds.

    Seeds that joined before are replaced. ``collect`` writes files without them.

    Args:
        study: settings whose seeds are others than those of the result files.
        out: folder of the runs.
        results: folder of the result files.
    Raises:
        UserError: the folder has no complete run; a part has no result file, or one of other
            settings; a seed is in it and did not join.
    """
    with TemporaryDirectory() as temporary:
        own = [json.loads(path.read_text()) for path in collect(study, out, Path(temporary))]
    paths = [results / f"{values['part']}.json" for values in own]
    joined = [_joined(path, values) for path, values in zip(paths, own, strict=True)]
    for path, values in zip(paths, joined, strict=True):
        write_result(path, values)
    return paths


def _joined(path: Path, own: Values) -> Values:
    try:
        found: Values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"study: {path} cannot be read: {error}; collect its seeds first"
        ) from error
    if found.get("settings") != own["settings"]:
        raise UserError(f"study: {path} is of other settings than the runs that are to join it")
    before = found.get("joined", {})
    seeds = sorted({run["seed"] for run in own["runs"]})
    for seed in {run["seed"] for run in found["runs"]}.intersection(seeds):
        if str(seed) not in before:
            raise UserError(
                f"study: {path} has runs of seed {seed} that did not join; the seeds that join "
                "must be others"
            )
    about = {key: own[key] for key in ABOUT}
    result = {key: value for key, value in found.items() if key not in ("runs", "pairs", "flagged")}
    result["joined"] = before | {str(seed): about for seed in seeds}
    result["runs"] = [run for run in found["runs"] if run["seed"] not in seeds] + own["runs"]
    result["pairs"] = list(_pairs(found["pairs"], own["pairs"], seeds))
    if "flagged" in own:
        result["flagged"] = found.get("flagged", {}) | own["flagged"]
    return result


def _pairs(found: list[Values], own: list[Values], seeds: list[int]) -> Iterable[Values]:
    """The pairs of both, in the order of ``found``."""

    def key(pair: Values) -> tuple[str, str, str]:
        return pair["run"], pair["against"], pair["schedule"]

    others = {key(pair): pair for pair in own}
    for name in dict.fromkeys(map(key, [*found, *own])):
        first = next((pair for pair in found if key(pair) == name), None)
        known = dict[int, tuple[float, float | None]]()
        for pair in (first, others.get(name)):
            if pair is not None:
                known |= {
                    seed: (mean, error)
                    for seed, mean, error in zip(
                        pair["seeds"], pair["by_seed"], pair["se_by_seed"], strict=True
                    )
                    if pair is not first or seed not in seeds
                }
        if known:
            yield rounded(pair_of(*name, known))
