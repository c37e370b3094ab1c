"""The study's verdicts: hand cases, and metrics that do not flag the control."""

import math
import statistics

import pytest
from study_results import control, run, seeds, study_of

from benchmarks.study import report
from benchmarks.study.report_claims import CONTROL, control_claims, usable_metrics
from benchmarks.study.report_data import (
    FASHION_FD,
    FULL,
    LOSS,
    LOSS_PER_TOKEN,
    METRICS,
    PRECISION,
    Run,
    Study,
    mean_and_error,
)
from benchmarks.study.report_verdicts import (
    All,
    Below,
    Evidence,
    Point,
    Some,
    Verdict,
    better,
    chance_within,
    combine,
    decide,
    judge,
    needed_errors,
)

HOLDS, FAILS = Verdict.HOLDS, Verdict.DOES_NOT_HOLD
OPEN, MISSING = Verdict.NOT_RESOLVED, Verdict.NOT_RUN


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sums", "verdict", "mean", "error"),
    [
        # mean -2, deviations 0, -1, 1: error sqrt(2 / 2 / 3)
        ([-2.0, -3.0, -1.0], HOLDS, -2.0, math.sqrt(1 / 3)),
        ([2.0, 3.0, 1.0], FAILS, 2.0, math.sqrt(1 / 3)),
        # mean 1, deviations -3, 0, 3: error sqrt(18 / 2 / 3)
        ([-2.0, 1.0, 4.0], OPEN, 1.0, math.sqrt(3)),
        ([2.0, -1.0, -4.0], OPEN, -1.0, math.sqrt(3)),
        # exactly two standard errors count: mean -2, error abs(-1 - -3) / 2 = 1
        ([-1.0, -3.0], HOLDS, -2.0, 1.0),
        ([-1.0 + 1e-9, -3.0], OPEN, -2.0 + 5e-10, 1.0 + 5e-10),
        ([0.0, 0.0, 0.0], OPEN, 0.0, 0.0),
        ([-5.0], OPEN, -5.0, None),
        ([5.0], OPEN, 5.0, None),
        ([], MISSING, None, None),
    ],
)
def test_a_verdict_needs_two_standard_errors_and_two_seeds(sums, verdict, mean, error):
    evidence = decide(sums)
    assert evidence.verdict is verdict
    assert evidence.seeds == len(sums)
    for value, wanted in ((evidence.mean, mean), (evidence.error, error)):
        assert value == wanted if wanted is None else value == pytest.approx(wanted, abs=1e-15)


def test_the_standard_error_is_that_of_the_statistics_module():
    values = [2.627, 2.643, 2.75, 2.604]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values), rel=1e-15)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(4), rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        decide([1.0, bad])
    with pytest.raises(ValueError, match="finite"):
        mean_and_error([bad])


@pytest.mark.parametrize(
    ("verdicts", "every", "some"),
    [
        ((HOLDS, HOLDS), HOLDS, HOLDS),
        ((HOLDS, FAILS), FAILS, HOLDS),
        ((FAILS, FAILS), FAILS, FAILS),
        ((HOLDS, OPEN), OPEN, HOLDS),
        ((FAILS, OPEN), FAILS, OPEN),
        ((HOLDS, MISSING), MISSING, HOLDS),
        ((FAILS, MISSING), FAILS, MISSING),
        ((OPEN, MISSING), MISSING, MISSING),
    ],
)
def test_what_decides_alone_decides(verdicts, every, some):
    for order in (verdicts, verdicts[::-1]):
        parts = [Evidence(verdict) for verdict in order]
        assert combine(parts, all_must_hold=True).verdict is every
        assert combine(parts, all_must_hold=False).verdict is some


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8])
def test_chances_are_those_of_students_t(seeds):
    stats = pytest.importorskip("scipy.stats")
    for errors in (0.3, 2.0, 9.0):
        expected = 1 - 2 * stats.t.sf(errors, seeds - 1)
        assert chance_within(errors, seeds) == pytest.approx(expected, rel=1e-12)
    for count in (2, 4, 8):
        expected = max(2.0, stats.t.isf(0.05 / count / 2, seeds - 1))
        assert needed_errors(seeds, count) == pytest.approx(expected, rel=1e-9)
    assert needed_errors(seeds, 1) == 2.0


# Five standard errors of three seeds: sqrt(3) x 5 above zero, deviations -1, 0, 1.
FIVE = [5 / math.sqrt(3) + deviation for deviation in (-1, 0, 1)]
RARE = [20 / math.sqrt(3) + deviation for deviation in (-1, 0, 1)]


def test_one_of_several_differences_decides_only_if_it_is_rare(tmp_path):
    """Of two differences with three seeds, one needs 6.2 standard errors to decide alone."""
    runs = seeds("base", [0.0] * 3) + seeds("five", FIVE) + seeds("rare", RARE)
    study = study_of(tmp_path, ratios=runs)
    base, five, rare = Point("base"), Point("five"), Point("rare")
    fails, fails_rarely = better(five, base), better(rare, base)
    holds, holds_rarely = better(base, five), better(base, rare)

    def verdict(statement):
        return judge(statement, study, METRICS).verdict

    assert verdict(All((fails, holds))) is OPEN
    assert verdict(All((fails_rarely, holds))) is FAILS
    assert verdict(Some((holds, fails))) is OPEN
    assert verdict(Some((holds_rarely, fails))) is HOLDS
    # The verdict that every part must support, and a single difference, need two.
    assert verdict(All((holds, holds))) is HOLDS
    assert verdict(Some((fails, fails))) is FAILS
    assert verdict(All((holds,))) is HOLDS
    assert verdict(fails) is FAILS
    # Both of a pair must fail, for one of two pairs: two can decide.
    pair = Some((fails, fails))
    assert verdict(All((pair, holds_rarely))) is OPEN
    assert verdict(All((pair,))) is FAILS


def test_differences_are_paired_by_seed(tmp_path):
    """The seeds differ by far more than the runs do; seed 2 of one of them is missing."""
    a = [run("p0.2", seed, loss=10.0 * seed + 0.01 * seed) for seed in (0, 1, 3)]
    b = [run("p0.8", seed, loss=10.0 * seed + 1.0) for seed in (0, 1, 2, 3)]
    study = study_of(tmp_path, ratios=a + b)
    evidence = judge(better(Point("p0.2"), Point("p0.8")), study, METRICS)
    assert (evidence.verdict, evidence.seeds) == (HOLDS, 3)
    assert evidence.mean == pytest.approx(-1 + 0.04 / 3)
    assert judge(better(Point("p0.8"), Point("p0.2")), study, METRICS).verdict is FAILS


def test_a_metric_where_higher_is_better_turns_the_sign(tmp_path):
    def of(name, precision):
        cells = {FULL: {"n": 5000, "precision": precision}}
        return [run(name, seed, loss=1.0, generated=cells) for seed in (0, 1)]

    study = study_of(tmp_path, ratios=of("p0.2", 0.9) + of("p0.8", 0.8))
    good, bad = (Point(name, metric=PRECISION) for name in ("p0.2", "p0.8"))
    assert judge(better(good, bad), study, METRICS).verdict is HOLDS
    assert judge(better(bad, good), study, METRICS).verdict is FAILS


def test_missing_runs_and_schedules_are_not_run_yet(tmp_path):
    study = study_of(tmp_path, ratios=seeds("p0.2", [1.0, 1.1]))
    for other in (Point("p0.8"), Point("p0.2", "d2"), Point("p0.2", metric=FASHION_FD)):
        missing = better(Point("p0.2", metric=other.metric), other)
        assert judge(missing, study, METRICS) == Evidence(MISSING)
    assert judge(better(Point("p0.2"), Point("p0.8")), Study(), METRICS).verdict is MISSING


def test_a_metric_that_is_not_usable_decides_nothing(tmp_path):
    study = study_of(tmp_path, ratios=seeds("p0.2", [1.0, 1.1]) + seeds("p0.8", [2.0, 2.2]))
    claim = better(Point("p0.2"), Point("p0.8"))
    assert judge(claim, study, [LOSS]).verdict is HOLDS
    for usable in ([], [FASHION_FD]):
        evidence = judge(claim, study, usable)
        assert evidence.verdict is OPEN
        assert "held-out loss has not flagged the control" in evidence.reason
        assert judge(Some((claim,)), study, usable).verdict is OPEN
        assert judge(All((better(Point("p0.8"), Point("p0.2")),)), study, usable).verdict is OPEN


def test_a_sum_of_two_metrics_is_refused():
    with pytest.raises(ValueError, match="one metric"):
        Below(((1.0, Point("p0")), (-1.0, Point("p0", metric=FASHION_FD))))


def test_the_loss_per_layer_token_is_that_of_the_skipped_layers(tmp_path):
    losses = {FULL: 2.0, "d4@early": 2.2, "d4@late": 2.4}
    zones = Run("zones", "zones", 0, run("zones", 0, loss=losses))
    assert zones.value(LOSS_PER_TOKEN, "d4@early") == pytest.approx(0.2 / 20)
    assert zones.value(LOSS_PER_TOKEN, "d4@late") == pytest.approx(0.4 / 400)
    assert zones.value(LOSS_PER_TOKEN, FULL) is None


def test_curves_are_read_near_the_moment_or_not_at_all():
    data = run("p1", 0, loss=1.0, curve=[[24, {FULL: 3.0}], [100, {FULL: 2.0}]])
    p1 = Run("ratios", "p1", 0, data)
    assert p1.value(LOSS, FULL, 0.25) == 3.0
    assert p1.value(LOSS, FULL, 1.0) == 2.0
    assert p1.value(LOSS, FULL, 0.5) is None
    assert p1.value(LOSS, "d2", 1.0) is None
    assert p1.value(FASHION_FD, FULL, 1.0) is None


# --- the control --------------------------------------------------------------------------------


def test_metrics_that_flag_the_control_are_usable(tmp_path):
    study = control(tmp_path, [2.0, 2.2, 2.1], [0.12, 0.10, 0.11])
    assert usable_metrics(study) == {LOSS}
    found = control_claims(study)
    assert found[LOSS][FULL].verdict is HOLDS
    assert found[FASHION_FD][FULL].verdict is OPEN
    assert found[PRECISION][FULL].verdict is MISSING
    text = report.page(study)
    assert "flag the control (labels permuted): held-out loss. " in text
    assert "Metrics that do not: fashion-FD, precision, recall, accuracy." in text


@pytest.mark.parametrize("broken", [[0.5, 0.6, 0.4], [2.0], [1.0, 1.1, 1.2]])
def test_a_control_that_is_better_alone_or_equal_flags_nothing(tmp_path, broken):
    study = control(tmp_path, broken, [0.1] * len(broken))
    assert usable_metrics(study) == set()
    one_seed = "has run with one seed: no metric decides" in report.page(study)
    assert one_seed == (len(broken) == 1)


def test_a_metric_must_flag_the_control_at_every_schedule(tmp_path):
    good = [run("base", seed, loss={FULL: 1.0 + seed / 10, "d2": 1.0}) for seed in (0, 1)]
    same = [run(CONTROL, seed, loss={FULL: 2.0, "d2": 1.0}) for seed in (0, 1)]
    assert usable_metrics(study_of(tmp_path, base=good, control=same)) == set()
    worse = [run(CONTROL, seed, loss={FULL: 2.0, "d2": 1.5 + seed / 10}) for seed in (0, 1)]
    assert usable_metrics(study_of(tmp_path, base=good, control=worse)) == {LOSS}


def test_without_the_control_no_metric_is_usable(tmp_path):
    study = study_of(tmp_path, ratios=seeds("p0.2", [1.0, 1.1]) + seeds("p0.5", [2.0, 2.2]))
    assert usable_metrics(study) == set()
    assert "The control (labels permuted) has not run" in report.page(study)
