"""The claims that the study's page judges: one row each.

A row with ``paper`` names where the paper says it; the others are questions of ours. The held-out
loss judges each row, and the fashion-FD of generated images those of ``with_distance`` too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from benchmarks.study.report_data import (
    FASHION_FD,
    FULL,
    LOSS,
    LOSS_PER_TOKEN,
    METRICS,
    Metric,
    Study,
)
from benchmarks.study.report_verdicts import (
    All,
    Below,
    Evidence,
    Point,
    Some,
    Statement,
    Verdict,
    better,
    judge,
)

D4, D2 = "d4", "d2"
# Names of runs in the study's settings.
PROGRESSIVE = "progressive"
FIXED = ("p0.2", "p0.5", "p0.8", "p1")
BRIDGES, USUAL_BRIDGE = tuple(f"bridge{scales}" for scales in range(6)), 3
CONTROL, CONTROL_REFERENCE = "labels-permuted", "base"
# Parts of the training steps at which the curves are read as "early" and "late".
EARLY, HALF, LATE = 0.25, 0.5, 1.0


@dataclass(frozen=True)
class Claim:
    """One row of a table of verdicts.

    part: the section of the page.  text: what is claimed.  paper: where the paper claims it; None:
    a question of ours.  measure: the number that is compared.
    """

    part: str
    text: str
    statement: Statement
    paper: str | None = None
    measure: str = LOSS.name


def at(run: str, schedule: str = FULL, part: str | None = None) -> Point:
    """The held-out loss of a run at a schedule after its training."""
    return Point(run, schedule, part=part)


def below(*terms: tuple[int, Point]) -> Below:
    """The weighted sum of losses is below zero."""
    return Below(tuple((float(weight), point) for weight, point in terms))


def by(statement: Statement, metric: Metric) -> Statement:
    """The same statement about another metric."""
    if isinstance(statement, Below):
        sign = metric.sign * statement.metric.sign
        return Below(tuple((sign * w, replace(p, metric=metric)) for w, p in statement.terms))
    return replace(statement, parts=tuple(by(part, metric) for part in statement.parts))


def with_distance(*claims: Claim) -> list[Claim]:
    """The claims, each once more by the fashion-FD."""
    return [
        row
        for claim in claims
        for row in (
            claim,
            replace(claim, statement=by(claim.statement, FASHION_FD), measure=FASHION_FD.name),
        )
    ]


def _zones() -> list[Claim]:
    def costs(depth: str, cheap: str, dear: str) -> Statement:
        return better(at("zones", f"{depth}@{cheap}"), at("zones", f"{depth}@{dear}"))

    table_1 = "Table 1, section 3.2.1"
    rows = [
        Claim("zones", f"Untrained, {depth} costs more at {dear} scales than at {cheap} ones",
              costs(depth, cheap, dear), table_1 if depth == D4 else None)
        for depth in (D4, D2)
        for cheap, dear in (("late", "early"), ("late", "middle"), ("middle", "early"))
    ]  # fmt: skip
    token = "A layer that an early token skips costs more than one that a late token skips"
    return with_distance(*rows) + [
        Claim("zones", f"{token} ({depth})", by(costs(depth, "late", "early"), LOSS_PER_TOKEN),
              "section 3.2.1" if depth == D4 else None, LOSS_PER_TOKEN.name)
        for depth in (D4, D2)
    ]  # fmt: skip


def _training_free() -> list[Claim]:
    rows = []
    for depth in (D4, D2):
        joint = f"joint-{depth}"
        rows += with_distance(
            Claim("training-free", f"Joint training makes {depth} better",
                  better(at(joint, depth), at("training-free", depth)), "Table 4"),
            # Against equal work at full depth: the base has trained less than either.
            Claim("training-free", f"Joint training with {depth} makes the full network worse",
                  better(at("p0"), at(joint)), "Table 4, section 3.3.1"),
            Claim("training-free",
                  f"Joint training with {depth} leaves the full network worse than its start, "
                  "`base`", better(at("training-free"), at(joint))),
        )  # fmt: skip
    rows += with_distance(
        Claim("training-free",
              "Trained on alone (`p0`), the full network becomes worse than its start, `base`",
              better(at("training-free"), at("p0"))),
    )  # fmt: skip
    return rows + with_distance(
        Claim("training-free", "The shallower subnet costs the full network more",
              better(at(f"joint-{D4}"), at(f"joint-{D2}")), "Table 4"),
        Claim("training-free", "Joint training leaves d2 worse than d4",
              better(at(f"joint-{D4}", D4), at(f"joint-{D2}", D2)), "Table 4"),
    )  # fmt: skip


def _bridges() -> list[Claim]:
    none, usual = BRIDGES[0], BRIDGES[USUAL_BRIDGE]
    wider = All(tuple(better(at(b, D2), at(a, D2)) for a, b in pairwise(BRIDGES)))
    first = (1, at(BRIDGES[0], D2)), (-1, at(BRIDGES[1], D2))
    last = (1, at(BRIDGES[-2], D2)), (-1, at(BRIDGES[-1], D2))
    saturates = below(*last, *((-weight, point) for weight, point in first))
    rows = with_distance(
        Claim("bridges", "The subnet is better with a bridge than without",
              better(at(usual, D2), at(none, D2)), "Table 5"),
        Claim("bridges", "The full network is better with a bridge than without",
              better(at(usual), at(none)), "Table 5"),
        Claim("bridges", "Each further scale of the bridge makes the subnet better", wider,
              "Table 8"),
        Claim("bridges", "The last scale of the bridge gains less than the first", saturates,
              "Table 8, section 6.3"),
    )  # fmt: skip
    return [
        *rows,
        Claim("bridges", "At the same bridge, training with it beats training without one",
              better(at(usual, D2), at(none, f"{D2}@b{USUAL_BRIDGE}"))),
    ]  # fmt: skip


def _ratios() -> list[Claim]:
    star = at(PROGRESSIVE), at(PROGRESSIVE, D2)
    fixed = [(at(name), at(name, D2)) for name in FIXED]
    full_rises = All(tuple(better(a[0], b[0]) for a, b in pairwise(fixed)))
    subnet_falls = All(tuple(better(b[1], a[1]) for a, b in pairwise(fixed)))
    not_beaten = All(tuple(Some((better(star[0], f), better(star[1], s))) for f, s in fixed))
    beats = Some(tuple(All((better(star[0], f), better(star[1], s))) for f, s in fixed))

    def change(name: str, since: float, until: float) -> list[tuple[int, Point]]:
        return [(1, Point(name, at=until)), (-1, Point(name, at=since))]

    def minus(terms: list[tuple[int, Point]]) -> list[tuple[int, Point]]:
        return [(-weight, point) for weight, point in terms]

    # The change of the full loss is more negative at the low ratio ...
    stagnates = below(*change(FIXED[0], HALF, LATE), *minus(change(FIXED[-1], HALF, LATE)))
    # ... and what the high ratio costs over the low one becomes less.
    costs_less = below(*change("p0.8", EARLY, LATE), *minus(change("p0.2", EARLY, LATE)))
    rows = with_distance(
        Claim("ratios", "The more often the subnet is trained, the worse the full network",
              full_rises, "Figure 2a"),
        Claim("ratios", "The more often the subnet is trained, the better the subnet",
              subnet_falls, "Figure 2a"),
        Claim("ratios", "No fixed ratio beats the progressive schedule at both depths",
              not_beaten, "Figure 2a, section 3.3.2"),
        Claim("ratios", "The progressive schedule beats some fixed ratio at both depths",
              beats, "Figure 2a, section 3.3.2"),
    )  # fmt: skip
    rows += [
        Claim("ratios", "In the second half of the steps, the full network's loss falls less, or "
              "rises more, at p = 1 than at p = 0.2", stagnates, "Figure 2b"),
        Claim("ratios", "p = 0.2 leaves the subnet worse than the progressive schedule",
              better(star[1], fixed[0][1]), "Figure 2b"),
        Claim("ratios", "p = 0.8 instead of 0.2 costs the full network more early than late",
              costs_less, "Figure 2c"),
        *(Claim("ratios", f"{name} beats the progressive schedule at both depths",
                All((better(full, star[0]), better(subnet, star[1]))))
          for name, (full, subnet) in zip(FIXED, fixed, strict=True)),
    ]  # fmt: skip
    endings = {
        f"{PROGRESSIVE}-end0.5": "an end at p = 0.5",
        f"{PROGRESSIVE}-end0.8": "an end at p = 0.8",
        f"{PROGRESSIVE}-rate0": "a learning rate that falls to 0",
    }
    falling = {
        f"{name}-rate0": f"a fixed p = {name[1:]} and a learning rate that falls to 0"
        for name in ("p0.5", "p0.8")
    }
    return [
        *rows,
        *_against(PROGRESSIVE, "the progressive schedule", endings, "ratios"),
        *_against(f"{PROGRESSIVE}-rate0", "the progressive schedule and that rate",
                  falling, "ratios"),
    ]  # fmt: skip


EXTRAS = {
    "several": "depths 4 and 2 trained at once",
    "bridges-sampled": "a bridge sampled at every step",
    "teacher-frozen": "distillation from the frozen start",
    "teacher-ema": "distillation from the moving average",
}
# Subnets with weights of their own; the full network is frozen.
ZONE_WEIGHTS = {
    "copies": "its own copies of its layers",
    "lora8-adaln": "its own adaLN and low-rank changes (8)",
    "lora4": "its own low-rank changes (4)",
    "lora16": "its own low-rank changes (16)",
    "adaln": "its own adaLN",
}


def _extras() -> list[Claim]:
    rows = _against(PROGRESSIVE, "the progressive schedule", EXTRAS, "extras")
    wider = f"{D2}@b5"
    several = {"several-p0.8": "a fixed p = 0.8 and depths 4 and 2"}
    return [
        *rows,
        *(Claim("extras", f"The full network, frozen in `{name}`, is better than with the "
                "progressive schedule", better(at(name), at(PROGRESSIVE)))
          for name in ZONE_WEIGHTS),
        *_against(PROGRESSIVE, "the progressive schedule", ZONE_WEIGHTS, "extras", (D2,)),
        Claim("extras", "At a bridge of 5, sampled bridges in training beat a fixed one",
              better(at("bridges-sampled", wider), at("bridge5", D2))),
        *_against("several", "the progressive schedule and both depths", several, "extras",
                  (FULL, D4, D2)),
    ]  # fmt: skip


def _against(
    reference: str,
    name: str,
    others: dict[str, str],
    part: str,
    schedules: tuple[str, ...] = (FULL, D2),
) -> list[Claim]:
    """Is each of the others better than the reference?"""
    whom = {FULL: "the full network", D4: "d4", D2: "d2"}
    return [
        Claim(part, f"With {what}, {whom[schedule]} is better than with {name}",
              better(at(other, schedule), at(reference, schedule)))
        for other, what in others.items()
        for schedule in schedules
    ]  # fmt: skip


def _augmentation() -> list[Claim]:
    kinds = {
        "hflip": "horizontal flips",
        "distort": "rotation, zoom, shift and shear",
        "mixup": "mixup",
    }
    rows = [
        Claim("augmentation", f"Training with {what} makes {whom} better",
              better(at(kind, schedule), at("none", schedule, "augmentation")))
        for kind, what in kinds.items()
        for schedule, whom in ((FULL, "the full network"), (D2, "d2"))
    ]  # fmt: skip
    return with_distance(*rows)


def _kv8() -> list[Claim]:
    whom = {FULL: "the full network", D4: "d4", D2: "d2"}
    return with_distance(*(
        Claim("kv8", f"8-bit K/V make {name} worse",
              better(at("exact", depth), at("kv8", depth)))
        for depth, name in whom.items()
    ))  # fmt: skip


# The grid has the depths that the model offers, and no others, as 7 after a bridge.
GRID = "the best of depths 8, 4 and 2 after a bridge"
# Budgets that every kind of schedule reaches.
SEARCH_BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def _search() -> list[Claim]:
    models = {"search-untrained": "the untrained", "search-supernet": "the trained"}
    others = {"grid": GRID, "even": "evenly chosen or trained layers"}
    costs = {"kv": "K/V bytes", "work": "work"}
    rows = []
    for name, model in models.items():
        for cost, what in costs.items():
            for kind, other in others.items():
                parts = tuple(
                    better(
                        at(name, f"searched {cost}={share:g}"), at(name, f"{kind} {cost}={share:g}")
                    )
                    for share in SEARCH_BUDGETS
                )
                text = f"at equal {what} the search beats {other}"
                rows.append(
                    Claim("search", f"On {model} subnets, {text} at every budget", All(parts))
                )
    return rows


CLAIMS = (
    *_zones(), *_training_free(), *_bridges(), *_ratios(), *_extras(), *_augmentation(), *_kv8(),
    *_search(),
)  # fmt: skip


# --- the control --------------------------------------------------------------------------------


def control_claims(study: Study) -> dict[Metric, dict[str, Evidence]]:
    """For each metric and schedule of the control: is the reference better than the broken run?"""
    schedules = dict.fromkeys(
        schedule for run in study.runs(CONTROL, "control").values() for schedule in run.schedules
    )
    found: dict[Metric, dict[str, Evidence]] = {}
    for metric in METRICS:
        for schedule in schedules or (FULL,):
            statement = better(
                Point(CONTROL_REFERENCE, schedule, metric),
                Point(CONTROL, schedule, metric, "control"),
            )
            found.setdefault(metric, {})[schedule] = judge(statement, study, METRICS)
    return found


def usable_metrics(study: Study) -> frozenset[Metric]:
    """The metrics that flag the control at every schedule at which it was measured."""
    flagged = set()
    for metric, by_schedule in control_claims(study).items():
        measured = [e.verdict for e in by_schedule.values() if e.verdict is not Verdict.NOT_RUN]
        if measured and all(verdict is Verdict.HOLDS for verdict in measured):
            flagged.add(metric)
    return frozenset(flagged)


def judged(
    claims: Sequence[Claim], study: Study, usable: Collection[Metric]
) -> list[tuple[Claim, Evidence]]:
    """Every claim with its evidence."""
    return [(claim, judge(claim.statement, study, usable)) for claim in claims]
