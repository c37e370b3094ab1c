"""The parts of a batch: what a request may ask for, how it is split, timed and switched."""

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest
import torch
from small_models import small_model

from variant.engine import batches
from variant.engine.arguments import GivenTokens
from variant.engine.batches import (
    Batch,
    BatchRunner,
    Request,
    Stopwatch,
    check_pixels,
    decode_rgb,
    switch_depth,
)
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant_kernels import DepthSchedule

CPU = torch.device("cpu")
SCHEDULE = DepthSchedule.from_depths([4, 4, [0, 1, 3]])


def request_of(**changes):
    settings = {
        "schedule": SCHEDULE,
        "sampling": Sampling(seed=0),
        "flexible_from": 1,
        "on_scale": None,
        "decode": True,
        "image_dtype": torch.float32,
        "log_probs": False,
    }
    return Request(**settings | changes)


def test_what_a_request_asks_for_must_go_together():
    request_of().check()
    request_of(on_scale=print, log_probs=True).check()
    request_of(sampling=Sampling(more_smooth=True)).check()
    with pytest.raises(TypeError, match=r"on_scale must be a function .*; got int"):
        request_of(on_scale=3).check()
    with pytest.raises(ValueError, match="log_probs and more_smooth exclude each other"):
        request_of(log_probs=True, sampling=Sampling(more_smooth=True)).check()


def test_what_a_graph_can_generate():
    batch = Batch(torch.zeros(1), torch.zeros(1))
    given = Batch(torch.zeros(1), torch.zeros(1), GivenTokens(batch.labels_B, batch.labels_B, {}))
    assert batches.can_be_captured(request_of(), batch)
    assert not batches.can_be_captured(request_of(), given)
    for change in ({"on_scale": print}, {"log_probs": True},
                   {"sampling": Sampling(more_smooth=True)}):  # fmt: skip
        assert not batches.can_be_captured(request_of(**change), batch)


def test_a_batch_is_split_with_its_ids_and_given_tokens():
    labels, ids = torch.arange(5), torch.arange(10, 15)
    parts = list(Batch(labels, ids).split(2))
    assert [part.labels_B.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.image_ids_B.tolist() for part in parts] == [[10, 11], [12, 13], [14]]
    assert [part.given for part in parts] == [None] * 3
    tokens = torch.arange(10).view(5, 2)
    parts = Batch(labels, ids, GivenTokens(tokens, tokens > 4, frozenset())).split(3)
    assert [part.given.tokens_BL.tolist() for part in parts] == [
        tokens[:3].tolist(), tokens[3:].tolist()
    ]  # fmt: skip


def test_seconds_are_from_mark_to_mark(monkeypatch):
    times = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch(CPU)
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == [0.5, 2.5]


def test_seconds_of_a_gpu_are_those_of_its_events(monkeypatch):
    class Event:
        made, waited = [], []

        def __init__(self, enable_timing):
            assert enable_timing
            self.made.append(self)

        def record(self, stream):
            self.stream = stream

        def synchronize(self):
            self.waited.append(self)

        def elapsed_time(self, other):  # milliseconds
            return 250.0 * (self.made.index(other) - self.made.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == [0.25, 0.25]
    assert [event.stream for event in Event.made] == ["stream"] * 3
    assert Event.waited == Event.made[-1:]  # the last alone is waited for


class State:
    """The parts of a BatchState that a switch needs."""

    def __init__(self):
        self.var, self.schedule, self.switches = small_model().var, SCHEDULE, []

    def switch(self, begin, layers):
        self.switches.append((begin, layers))


def test_a_depth_is_switched_where_it_differs():
    state = State()
    assert not switch_depth(state, 0, 1, 4)
    assert not switch_depth(state, 1, 2, [0, 1, 3])
    assert not switch_depth(state, 2, 3, 2)  # no scale is left
    assert state.switches == []
    assert switch_depth(state, 0, 1, [0, 3])
    assert switch_depth(state, 1, 2, 2)
    assert state.switches == [(1, (0, 3)), (2, (0, 3))]
    text = "generate: on_scale after scale 1: depth can only fall within an image: its layers must "
    text += "be a subset of those that were to run at scale 2, [0, 1, 3]; got [0, 2, 3]"
    with pytest.raises(ValueError, match=re.escape(text)):
        switch_depth(state, 1, 2, 3)
    with pytest.raises(ValueError, match="generate: on_scale after scale 0: "):
        switch_depth(state, 0, 1, 5)


def test_images_that_are_no_numbers_are_refused_on_a_cpu():
    images = torch.zeros(3, 3, 2, 2)
    assert check_pixels(images, torch.float32) is images
    images[0, 1, 0, 1] = images[2, 0, 1, 1] = images[2, 2, 0, 0] = torch.nan
    for dtype, hint in ((torch.float32, "vae$"), (torch.float16, "vae, and use float32 if they")):
        name = str(dtype).removeprefix("torch.")
        text = rf"got NaN in 2 of 3 images \(computed in {name}\)\. Check the weights of {hint}"
        with pytest.raises(ValueError, match=text):
            check_pixels(images, dtype)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert check_pixels(gpu, torch.float32) is gpu  # it would have to synchronise


def test_a_single_channel_is_repeated():
    pixels = torch.rand(2, 1, 3, 4)
    images = decode_rgb(SimpleNamespace(decode=lambda f: pixels + f), torch.ones(()))
    assert images.is_contiguous()
    assert torch.equal(images, (pixels + 1).repeat(1, 3, 1, 1))


def runner_of(**config):
    model = small_model(**config)
    launchers = SimpleNamespace(names={"sample": "cpu"}, pages_dtype=torch.float32)
    return BatchRunner(model.var, model.vae, 4, None, launchers, None)


def test_the_subnets_whose_zone_weights_a_batch_may_use():
    runner = runner_of(zone_weights="adaln")
    schedule = DepthSchedule.from_depths([4, [0, 2, 3], [0, 3]])
    assert runner.zones(schedule, can_switch=False) == (2, 3)
    assert runner.zones(DepthSchedule.from_depths([4, 4, 4]), can_switch=False) == ()
    assert runner.zones(DepthSchedule.from_depths([4, 4, 4]), can_switch=True) == (2, 3)
    assert runner.zones(SCHEDULE, can_switch=False) == ()  # no subnet has those layers
    assert runner_of().zones(schedule, can_switch=True) == ()


class Graphs:
    def __init__(self, has, has_decoder):
        self.answers, self.asked = (has, has_decoder), []

    def has(self, *key):
        self.asked.append(key)
        return self.answers[0]

    def has_decoder(self, shape):
        self.asked.append(shape)
        return self.answers[1]


@pytest.mark.parametrize(
    ("has", "decoder", "decode", "recorded"),
    [
        (True, True, True, True),
        (True, False, True, False),
        (True, False, False, True),
        (False, True, True, False),
    ],
)
def test_a_batch_is_recorded_where_graphs_have_all_of_it(has, decoder, decode, recorded):
    runner, graphs = runner_of(), Graphs(has, decoder)
    batch, request = Batch(torch.zeros(2), torch.zeros(2)), request_of(decode=decode)
    assert runner.is_recorded(batch, request, graphs) is recorded
    key, *shapes = graphs.asked
    assert key == (2, request.sampling, SCHEDULE, (4, ("cpu",), torch.float32))
    assert shapes == [(2, 8, 3, 3)] * (has and decode)
    assert not runner.is_recorded(batch, request_of(log_probs=True), Graphs(True, True))


def test_a_plan_is_made_once():
    runner = runner_of()
    plan = runner.plan(SCHEDULE)
    assert (plan.page_size, plan.schedule, plan.layout) == (4, SCHEDULE, runner.var.layout)
    assert runner.plan(SCHEDULE) is plan
    assert runner.device == CPU


class Replay:
    """Graphs that have what they are asked for, and record with what they are called."""

    def __init__(self):
        self.calls = []

    def generate_tokens(self, start, labels_B, image_ids_B, sampling, schedule, configuration):
        self.calls.append((labels_B, image_ids_B, sampling, schedule, configuration))
        return SimpleNamespace(
            tokens_BL=labels_B.view(-1, 1), log_probs_BL=None, schedule=schedule,
            allocated_bytes=1, peak_bytes=2,
        )  # fmt: skip


@pytest.mark.parametrize(("cfg", "sequences"), [(2.0, 6), (0, 3)])
def test_a_graph_replays_a_batch_with_the_tables_of_its_sequences(cfg, sequences):
    asked = []
    runner = dataclasses.replace(
        runner_of(),
        weights=SimpleNamespace(dtype=torch.float16, packed=True, zone_bytes=lambda zones: 7),
        page_tables=SimpleNamespace(get=lambda *key: asked.append(key) or {}),
    )
    batch, replay = Batch(torch.arange(3), torch.arange(3)), Replay()
    request = request_of(decode=False, sampling=Sampling(seed=0, cfg=cfg), image_dtype=torch.uint8)
    part = runner.generate(batch, request, replay)
    assert asked == [(runner.var.layout, SCHEDULE, sequences, 4, CPU)]
    [call] = replay.calls
    assert call[2:] == (request.sampling, SCHEDULE, (4, ("cpu",), torch.float32))
    assert part.captured
    assert (part.images.shape, part.images.dtype) == ((0, 3, 6, 6), torch.uint8)
    assert (part.depths, part.postponed, part.zone_weight_bytes) == ((4, 4, 3), (), 7)
    assert (part.product_dtype, part.packed) == (torch.float16, True)
    assert part.seconds >= part.decode_seconds >= 0
    # Weights that changed meanwhile: there is no result.
    assert runner.generate(batch, request, replay, lambda: False) is None
    assert runner.generate(batch, request, replay, lambda: True) is not None


def test_given_tokens_and_a_switch_before_the_last_scale_reach_the_batch():
    engine = Engine(small_model().var, small_model().vae)
    tokens = torch.arange(28).view(2, 14) % 24
    kept = engine.generate([0, 1], tokens=tokens, mask=torch.ones(14), seed=0, decode=False)
    assert torch.equal(kept.tokens, tokens)
    seen = []

    def on_scale(k, partial):
        seen.append((k, partial.scale, tuple(partial.tokens.shape)))
        return {1: 2, 2: 99}.get(k)  # after the last scale no depth is left to change

    result = engine.generate([0, 1], on_scale=on_scale, seed=0, decode=False)
    assert seen == [(0, 0, (2, 1)), (1, 1, (2, 5)), (2, 2, (2, 14))]
    assert result.stats.depths == (4, 4, 2)
    assert result.stats.postponed == ()
    # After the bridge alone: what is asked for before begins later.
    result = engine.generate(
        [0], on_scale=lambda k, _: 2 if k == 0 else None, bridge=2, seed=0, decode=False
    )
    assert result.stats.depths == (4, 4, 2)
    assert result.stats.postponed == (0,)
    result = engine.generate([0], on_scale=lambda k, _: 4, bridge=2, seed=0, decode=False)
    assert (result.stats.depths, result.stats.postponed) == ((4, 4, 4), ())


def test_images_are_decoded_by_a_graph_where_there_is_one():
    weights = SimpleNamespace(decode=lambda features: features / 2, dtype=torch.float32)
    runner = dataclasses.replace(runner_of(), weights=weights)
    features = torch.ones(1, 1, 2, 2)
    assert torch.equal(runner.decode(features), torch.full((1, 3, 2, 2), 0.5))
    graphs = SimpleNamespace(decode=lambda decode, features: decode(features) + 1)
    assert torch.equal(runner.decode(features, graphs), torch.full((1, 3, 2, 2), 1.5))


@pytest.mark.parametrize("guidance", [False, True])
def test_a_batch_starts_with_its_tables_and_the_sequences_of_no_class(guidance):
    model = small_model()
    runner, _ = Engine(model.var, model.vae)._source(None).checked()
    tables = {}
    options = {"schedule": SCHEDULE, "guidance": guidance}
    state = runner.start(torch.tensor([1, 2]), tables=tables, **options)
    assert state.cache._page_tables is tables
    assert state.schedule == SCHEDULE
    labels = torch.tensor([1, 2, 5, 5] if guidance else [1, 2])
    assert state.cache.batch == len(labels)
    assert torch.equal(state.cond_RC, model.var.class_emb(labels))
    shared = [runner.start(torch.tensor([1, 2]), **options).cache._page_tables for _ in range(2)]
    assert shared[0] is shared[1]


def test_a_graph_that_cannot_generate_a_batch_is_not_asked():
    model = small_model()
    runner, _ = Engine(model.var, model.vae)._source(None).checked()
    batch, replay = Batch(torch.arange(2), torch.arange(2)), Replay()
    with torch.no_grad():
        plain = runner.generate(batch, request_of(decode=False), None)
        part = runner.generate(batch, request_of(decode=False, log_probs=True), replay)
    assert (plain.captured, part.captured, replay.calls) == (False, False, [])
    assert torch.equal(part.tokens_BL, plain.tokens_BL)
    assert plain.log_probs_BL is None
    assert part.log_probs_BL.shape == (2, 14)
