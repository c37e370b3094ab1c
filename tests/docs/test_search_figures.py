"""The time of a search in docs/search.md is that of the committed file."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "search.md").read_text().split())
STUDY = json.loads((ROOT / "benchmarks" / "study" / "results" / "search.json").read_text())


def test_the_time_of_a_search():
    runs = [run for run in STUDY["runs"] if str(run["seed"]) not in STUDY["joined"]]
    seeds = {run["seed"] for run in runs}  # of this machine
    seconds = [run["seconds"] for run in runs]
    assert STUDY["machine"].startswith("AMD EPYC (avx512")
    assert (
        f"A search of the study ({min(r['searched'] for r in runs)} to "
        f"{max(r['searched'] for r in runs)} schedules, {runs[0]['images']} images choose and "
        f"{runs[0]['images_compared']} compare) took {min(seconds):.0f} to {max(seconds):.0f} s of "
        f"one core of an AMD EPYC with AVX-512 (seeds {min(seeds)} to {max(seeds)})."
    ) in TEXT
