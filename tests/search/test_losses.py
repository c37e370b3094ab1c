"""Losses of prefixes against the model's own forward pass; what is saved of them; times; pairs."""

import math

import numpy as np
import pytest
import torch
from small_models import small_model
from zone_models import KINDS, VARIATIONS, zone_model

from variant.errors import UserError
from variant.search.compare import Row, compare, paired
from variant.search.costs import work_cost
from variant.search.latency import measure_seconds, read_seconds
from variant.search.losses import ForcedLosses, loss_of
from variant.search.saved import SavedLosses, losses_file
from variant.search.space import Space
from variant.search.tree import Found, search
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


def test_settings_of_single_layers_count():
    model = zone_model("copies", attn_l2_norm=False)
    before = model.var.blocks[3].norm_eps
    for block in model.var.blocks:
        block.norm_eps = 0.5
        for zone in block.zones.values():
            zone.attn.softmax_scale *= 8
    assert model.var.config.norm_eps == before != 0.5
    labels_N, tokens_NL = images_of(model)
    losses = ForcedLosses(model.var, model.vae, labels_N, tokens_NL)
    for schedule in list(SPACE.schedules())[::9]:
        expected = reference(model, labels_N, tokens_NL, schedule)
        assert loss_of(losses, schedule) == pytest.approx(expected, abs=2e-5)


def test_the_loss_is_that_of_the_head_with_its_hooks():
    model = small_model()
    model.var.head.register_forward_hook(lambda *args: args[-1] / 3)
    labels_N, tokens_NL = images_of(model)
    losses = ForcedLosses(model.var, model.vae, labels_N, tokens_NL)
    schedule = next(iter(SPACE.schedules()))
    expected = reference(model, labels_N, tokens_NL, schedule)
    assert loss_of(losses, schedule) == pytest.approx(expected, abs=2e-5)


def counted(losses):
    """The prefixes of all scales that run, by part, and the bytes of K and V after each."""
    ran, held, scale = [], [], losses._scale

    def run(number, prefix, earlier, *rest):
        x_BTC, own = scale(number, prefix, earlier, *rest)
        ran.append((number, prefix))
        tensors = [
            tensor for one in [*losses._kept.values(), *earlier, own] for kv in one.values()
            for tensor in kv
        ]  # fmt: skip
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        last = sum(t.untyped_storage().nbytes() for kv in own.values() for t in kv)
        is_last = len(prefix) == 3  # its K and V are read by its own attention alone
        held.append(sum(x.nbytes() for x in storages.values()) - (last if is_last else 0))
        return x_BTC, own

    losses._scale = run
    return ran, held


def test_each_scale_of_each_prefix_runs_once_where_there_is_memory():
    model = small_model()
    losses = ForcedLosses(model.var, model.vae, *images_of(model))
    assert losses.is_whole
    ran, _ = counted(losses)
    for schedule in SPACE.schedules():
        for end in range(1, 4):
            if (0, schedule[:end]) not in ran:
                losses(schedule[:end])
    assert len(ran) == len(set(ran)) == SPACE.count()[1]
    before = losses(schedule[:2])
    losses.forget()
    assert not losses._kept
    assert (losses(schedule[:2]) == before).all()
    assert losses._kept_bytes == sum(
        x.nbytes for one in losses._kept.values() for kv in one.values() for x in kv
    )


def kv_bytes(model, images):
    """Of K and V of all layers and of the scales that a later one reads."""
    config = model.var.config
    return images * 2 * config.depth * sum(model.var.layout.tokens[:-1]) * config.embed_dim * 4


def test_each_scale_of_each_prefix_runs_once_for_each_part_within_the_limit(tmp_path):
    model = small_model()
    limit = kv_bytes(model, 2) + 100
    losses = ForcedLosses(model.var, model.vae, *images_of(model), cache_bytes=limit)
    assert not losses.is_whole
    assert [images for images, _ in losses.parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    ran, held = counted(losses)
    saved = SavedLosses(
        losses, None, count=5, num_scales=3, full_depth=4, read=False, parts=losses.parts
    )
    searched = search(
        SPACE, [work_cost(SPACE, model.var.config)], saved,
        seeds=list(SPACE.schedules())[-3:], ahead=saved.fill,
    )  # fmt: skip
    # The seeds come first.
    assert len(ran) <= 3 * (SPACE.count()[1] + 9)
    assert max(held) <= limit
    whole = ForcedLosses(model.var, model.vae, *images_of(model))
    for one in searched.found:
        assert one.loss == pytest.approx(loss_of(whole, one.schedule).mean(), abs=2e-5)
    assert {len(images) for images in saved.known.values()} == {5}
    ran.clear()
    every = [s[:end] for s in SPACE.schedules() for end in range(1, 4)]
    saved.known.clear()
    saved.fill(every)
    assert len(ran) == len(set(ran)) == 3 * SPACE.count()[1]


def test_a_scale_that_was_dropped_runs_once_more_and_not_recursively():
    model = small_model()
    losses = ForcedLosses(model.var, model.vae, *images_of(model), cache_bytes=0)
    ran, _ = counted(losses)
    losses(((0, 1, 2, 3), (0, 1, 3), (0, 3)))
    assert len(ran) == 5 * 3
    losses(((0, 2, 3), (0, 2, 3), (0, 3)))
    assert len(ran) == 2 * 5 * 3


def test_a_search_by_part_that_is_stopped_keeps_the_losses_of_some_images(tmp_path):
    model = small_model()
    sizes = {"count": 5, "num_scales": 3, "full_depth": 4}
    losses = ForcedLosses(model.var, model.vae, *images_of(model), cache_bytes=kv_bytes(model, 2))
    left, path = [7], tmp_path / "a"

    def stopping(function):
        def run(prefix):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(prefix)

        return run

    parts = [(images, stopping(function)) for images, function in losses.parts]
    saved = SavedLosses(losses, path, **sizes, read=True, parts=parts)
    prefixes = [((0, 1, 2, 3),), ((0, 1, 3),), ((0, 2, 3),), ((0, 3),)]
    with pytest.raises(KeyboardInterrupt):
        saved.fill(prefixes)
    saved.save()
    assert saved.num_known == (4 * 2 + 3 * 2) // 5
    left[0] = 12 - 7
    again = SavedLosses(losses, path, **sizes, read=True, parts=parts)
    assert again.num_known == saved.num_known
    again.fill(prefixes)
    assert left[0] == 0
    for prefix in prefixes:
        assert (again(prefix) == losses(prefix)).all()


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


def test_losses_are_read_again_and_not_computed_again(tmp_path, monkeypatch):
    calls = []

    def losses(prefix):
        calls.append(prefix)
        return np.array([len(prefix), len(prefix[-1]) / 3, 0.1])

    sizes = {"count": 3, "num_scales": 3, "full_depth": 4}
    model = tmp_path, "w", {"norm_eps": 1e-6}, "cpu"
    path = losses_file(*model, LABELS, LABELS)
    saved = SavedLosses(losses, path, **sizes, read=True)
    schedules = list(SPACE.schedules())
    values = {schedule: saved.of_schedule(schedule) for schedule in schedules}
    assert len(calls) == SPACE.count()[1] == saved.computed
    saved.save()
    again = SavedLosses(losses, path, **sizes, read=True)
    assert all((again.of_schedule(s) == value).all() for s, value in values.items())
    assert again.computed == 0
    assert not SavedLosses(losses, path, **sizes, read=False).known
    assert path == losses_file(*model, LABELS.clone(), LABELS.clone())
    others = {
        losses_file(*model, LABELS + 1, LABELS),
        losses_file(*model, LABELS, LABELS + 1),
        losses_file(tmp_path, "v", {"norm_eps": 1e-6}, "cpu", LABELS, LABELS),
        losses_file(tmp_path, "w", {"norm_eps": 1e-5}, "cpu", LABELS, LABELS),
        losses_file(tmp_path, "w", {"norm_eps": 1e-6}, "cuda", LABELS, LABELS),
    }
    monkeypatch.setattr("variant.search.saved.FORMAT", 99)
    others.add(losses_file(*model, LABELS, LABELS))
    assert len({path, *others}) == 7


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
    ("difference", "error", "images", "verdict"),
    [
        (-1.0, 0.4, 100, "searched is worse"),
        (1.0, 0.0, 100, "searched is better"),
        (0.01, 0.1, 100, "not resolved"),
        (0.2, 0.1, 100, "not resolved"),  # exactly two standard errors
        (-1.0, math.nan, 1, "not resolved"),
        (0.0, 0.0, 100, "not resolved"),  # every image loses the same
        (1.0, 0.4, 4, "not resolved"),  # Student's t of 4 images: 3.18 standard errors
        (1.0, 0.31, 4, "searched is better"),
        (1.0, 0.1, 2, "not resolved"),  # of 2 images: 12.7
    ],
)
def test_a_verdict_needs_more_than_two_standard_errors(difference, error, images, verdict):
    searched, other = (Found(schedule, 1.0, {}) for schedule in (((0, 3),), ((0, 1, 3),)))
    assert Row("kv", 0.5, "grid", searched, other, difference, error, images).verdict == verdict
