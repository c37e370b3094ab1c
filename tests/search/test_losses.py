"""Losses of prefixes against the model's own forward pass; what is saved of them; times; pairs."""

import math

import numpy as np
import pytest
import torch
from small_models import small_model
from zone_models import KINDS, VARIATIONS, zone_model

from variant.errors import UserError
from variant.search.compare import Row, compare, paired
from variant.search.latency import measure_seconds, read_seconds
from variant.search.losses import ForcedLosses, loss_of
from variant.search.saved import SavedLosses, losses_file
from variant.search.space import Space
from variant.search.tree import Found
from variant_kernels import DepthSchedule

SETS = [(0, 1, 3), (0, 2, 3), (0, 3)]
SPACE = Space(4, 3, SETS)
LABELS = torch.tensor([1, 4, 0, 2, 5])


def images_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LABELS, torch.randint(24, (len(LABELS), 14), generator=generator)


def reference(model, labels_N, tokens_NL, schedule):
    by_scale = DepthSchedule.from_depths(schedule, full_depth=4)
    with torch.no_grad():
        x_teacher = model.vae.teacher_input(tokens_NL)
        loss = model.var(labels_N, x_teacher, by_scale, targets_BL=tokens_NL)
    return loss.losses_BL.double().mean(1).numpy()


MODELS = [
    *(pytest.param(lambda o=o: small_model(**o), id=f"shared {o}") for o in VARIATIONS),
    *(pytest.param(lambda k=k: zone_model(k), id=k) for k in KINDS),
]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("cache_bytes", [0, 2**30], ids=["nothing kept", "all kept"])
def test_the_sum_over_prefixes_is_the_loss_of_the_forward_pass(make, cache_bytes):
    model = make()
    labels_N, tokens_NL = images_of(model)
    losses = ForcedLosses(
        model.var, model.vae, labels_N, tokens_NL, part=2, cache_bytes=cache_bytes
    )
    schedules = list(SPACE.schedules())
    assert len(schedules) == SPACE.count()[0]
    for schedule in schedules[:: 4 if cache_bytes else 9]:
        expected = reference(model, labels_N, tokens_NL, schedule)
        assert loss_of(losses, schedule) == pytest.approx(expected, abs=2e-5)


def test_each_prefix_runs_once_where_there_is_memory():
    model = small_model()
    losses = ForcedLosses(model.var, model.vae, *images_of(model))
    ran = []
    run = losses._run
    losses._run = lambda number, prefix, *rest: (ran.append(prefix), run(number, prefix, *rest))[1]
    for schedule in SPACE.schedules():
        for end in range(1, 4):
            if schedule[:end] not in ran:
                losses(schedule[:end])
    assert len(ran) == len(set(ran)) == SPACE.count()[1]


def test_influence_is_one_minus_the_cosine_around_a_layer():
    model = small_model()
    with torch.no_grad():  # layer 2 changes nothing
        for name, weight in model.var.blocks[2].named_parameters():
            if name.startswith("ada_lin.1"):
                weight.zero_()
    influence = ForcedLosses(model.var, model.vae, *images_of(model), part=3).influence()
    assert len(influence) == 4
    assert influence[2] == pytest.approx(0, abs=1e-12)
    assert all(influence[layer] > 1e-14 for layer in (0, 1, 3))


def test_losses_are_read_again_and_not_computed_again(tmp_path):
    calls = []

    def losses(prefix):
        calls.append(prefix)
        return np.array([len(prefix), len(prefix[-1]) / 3, 0.1])

    sizes = {"count": 3, "num_scales": 3, "full_depth": 4}
    path = losses_file(tmp_path, "w", LABELS, LABELS)
    saved = SavedLosses(losses, path, **sizes, read=True)
    schedules = list(SPACE.schedules())
    values = {schedule: saved.of_schedule(schedule) for schedule in schedules}
    assert len(calls) == SPACE.count()[1] == saved.computed
    saved.save()
    again = SavedLosses(losses, path, **sizes, read=True)
    assert all((again.of_schedule(s) == value).all() for s, value in values.items())
    assert again.computed == 0
    assert not SavedLosses(losses, path, **sizes, read=False).known
    others = [losses_file(tmp_path, *x) for x in (("v", LABELS, LABELS), ("w", LABELS, LABELS + 1))]
    assert len({path, *others}) == 3


def test_a_damaged_or_foreign_file_of_losses_is_refused(tmp_path):
    sizes = {"count": 2, "num_scales": 3, "full_depth": 4}
    saved = SavedLosses(lambda prefix: np.ones(2), tmp_path / "a", **sizes, read=True)
    saved(((0, 3),))
    saved.save()
    for change in ({"count": 3}, {"num_scales": 2}, {"full_depth": 5}):
        with pytest.raises(UserError, match=r"a: holds no losses of this model"):
            SavedLosses(saved.losses, tmp_path / "a", **{**sizes, **change}, read=True)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-3])
    with pytest.raises(UserError, match=str(tmp_path)):
        SavedLosses(saved.losses, tmp_path / "a", **sizes, read=True)


def test_a_schedules_time_is_the_sum_of_its_scales():
    model = small_model()
    sets = [(0, 1, 2, 3), (0, 3)]
    reports = []
    seconds = measure_seconds(model.engine(), sets, repeats=2, report=lambda: reports.append(1))
    assert {depth: len(row) for depth, row in seconds.items()} == {4: 3, 2: 3}
    assert all(x > 0 for row in seconds.values() for x in row)
    assert len(reports) == 6


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "{", '{"format": "variant-latency-1"}',
        '{"format": "variant-latency-1", "seconds": {"a": [1, 2, 3]}}',
        '{"format": "variant-latency-1", "seconds": {"2": [1, 2]}}',
        '{"format": "variant-latency-1", "seconds": {"2": [1, 2, NaN]}}',
        '{"format": "variant-latency-1", "seconds": {"2": [1, 2, -1]}}',
    ],
)  # fmt: skip
def test_a_bad_table_of_times_is_refused(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json: ") as caught:
        read_seconds(tmp_path / "t.json", {}, 3)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_machine_is_not_used(tmp_path):
    (tmp_path / "t.json").write_text(
        '{"format": "variant-latency-1", "cpu": "A", "seconds": {"2": [1, 2, 3]}}'
    )
    assert read_seconds(tmp_path / "t.json", {"cpu": "A"}, 3) == {2: [1, 2, 3]}
    assert read_seconds(tmp_path / "t.json", {"cpu": "B"}, 3) is None


def test_pairs_of_schedules_at_equal_cost():
    first, second = np.array([1.0, 2, 3]), np.array([0.5, 1, 3])
    assert paired(first, second) == (pytest.approx(0.5), pytest.approx(0.5 / math.sqrt(3)))
    assert math.isnan(paired(first[:1], second[:1])[1])
    good, bad, deep = (
        Found(schedule, loss, {"kv": kv})
        for schedule, loss, kv in (
            (((0, 3),), 1.0, 0.4),
            (((0, 1, 3),), 2.0, 0.4),
            (((0, 2, 3),), 0.5, 0.8),
        )
    )
    beaten = first + np.array([1, 1.1, 1])
    losses = {good.schedule: first, bad.schedule: beaten, deep.schedule: second}
    rows = compare(
        [good, bad, deep], {"grid": [bad, deep], "one": [deep]},
        [("kv", 0.3), ("kv", 0.5), ("kv", 0.9)], losses.__getitem__,
    )  # fmt: skip
    summary = [(row.share, row.name, row.verdict) for row in rows]
    assert summary == [
        (0.5, "grid", "searched is better"),
        (0.9, "grid", "the same schedule"),
        (0.9, "one", "the same schedule"),
    ]


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [
        (-1.0, 0.4, "searched is worse"),
        (1.0, 0.0, "searched is better"),
        (0.01, 0.1, "not resolved"),
        (0.2, 0.1, "not resolved"),  # exactly two standard errors
        (-1.0, math.nan, "not resolved"),  # one image
        (0.0, 0.0, "not resolved"),  # every image loses the same
    ],
)
def test_a_verdict_needs_more_than_two_standard_errors(difference, error, verdict):
    searched, other = (Found(schedule, 1.0, {}) for schedule in (((0, 3),), ((0, 1, 3),)))
    assert Row("kv", 0.5, "grid", searched, other, difference, error).verdict == verdict
