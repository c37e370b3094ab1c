"""The figures of docs/search.md about the study: each is what the committed file gives."""

import json
import math
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "search.md").read_text().split())
STUDY = json.loads((ROOT / "benchmarks" / "study" / "results" / "search.json").read_text())
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the sentences about the study


def span(values, digits=3):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def differences(run, other, cost):
    """share -> the losses of the others minus those of the searched schedules, one of each seed."""
    runs = [one for one in STUDY["runs"] if one["name"] == run]
    assert len(runs) > 1
    return {
        share: [
            one["losses"][f"{other} {cost}={share:g}"]["mean"]
            - one["losses"][f"searched {cost}={share:g}"]["mean"]
            for one in runs
        ]
        for share in SHARES
    }


def resolved(by_seed):
    """Whether the searched schedules lose less, as the study's page decides it."""
    error = statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    return statistics.mean(by_seed) > 0 and statistics.mean(by_seed) >= 2 * error


def count(run, other, cost):
    return sum(map(resolved, differences(run, other, cost).values()))


def test_the_time_of_a_search():
    runs = STUDY["runs"]
    assert STUDY["machine"].startswith("AMD EPYC (avx512")
    assert (
        f"A search of the study ({min(r['searched'] for r in runs)} to "
        f"{max(r['searched'] for r in runs)} schedules, {runs[0]['images']} images choose and "
        f"{runs[0]['images_compared']} compare) took {span([r['seconds'] for r in runs], 0)} s of "
        "one core of an AMD EPYC with AVX-512."
    ) in TEXT


def test_the_studys_full_network():
    run = "search-untrained"
    assert "the searched schedules of three seeds lose less than the best" in TEXT
    for other in ("grid", "even"):
        assert {len(seeds) for seeds in differences(run, other, "kv").values()} == {3}
    means = {
        cost: {s: statistics.mean(d) for s, d in differences(run, "grid", cost).items()}
        for cost in ("kv", "work")
    }
    assert all(mean > 0 for by_share in means.values() for mean in by_share.values())
    by_kv = differences(run, "grid", "kv")
    unresolved = [share for share in SHARES if not resolved(by_kv[share])]
    assert unresolved == [min(SHARES, key=lambda share: means["kv"][share])]
    assert count(run, "grid", "work") == len(SHARES)
    assert (
        f"at every budget from 0.4 to 0.9, of K/V (by {span(means['kv'].values(), 2)} nats per "
        f"token; the smallest difference, at {unresolved[0]}, is not resolved) and of work (by "
        f"{span(means['work'].values(), 2)})."
    ) in TEXT
    assert count(run, "even", "work") == 0
    assert (
        "the three seeds resolve a difference at "
        f"{count(run, 'even', 'kv')} of 6 budgets of K/V and at none of work."
    ) in TEXT


def test_the_studys_supernet():
    run = "search-supernet"
    assert "On the study's supernet (two seeds)" in TEXT
    by_cost = {cost: differences(run, "grid", cost) for cost in ("kv", "work")}
    same = [s for by_share in by_cost.values() for s in by_share.values() if s == [0, 0]]
    assert (
        f"they beat depth and bridge at {count(run, 'grid', 'kv')} of 6 budgets of K/V and at "
        f"{count(run, 'grid', 'work')} of 6 of work, are the same schedules at {len(same)} of the "
        "12, and beat evenly chosen or trained layers at none:"
    ) in TEXT
    assert count(run, "even", "kv") == count(run, "even", "work") == 0
