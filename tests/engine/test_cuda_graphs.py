"""Captured generations on the CPU: a double records the call and repeats it as a graph would."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from small_models import small_model

from variant.engine.cuda_graphs import Captures, GraphRecorder, Recording
from variant.engine.engine import Engine
from variant_kernels import device_lock


class Repeater:
    """Repeats the recorded function on the very tensors that it got, into the same outputs.

    As with a graph, all that Python decided stays as it was, and only tensors can change.
    """

    def __init__(self):
        self.recorded = 0
        self.turns = 0
        self.forgotten = 0

    @contextmanager
    def turn(self):
        self.turns += 1
        yield

    def record(self, function):
        self.recorded += 1
        first = function()
        outputs = tuple(torch.full_like(tensor, -1) for tensor in first)

        def replay():
            for output, result in zip(outputs, function(), strict=True):
                output.copy_(result)

        return Recording(replay, outputs, first)

    def forget(self):
        self.forgotten += 1


@pytest.fixture
def recorder(monkeypatch):
    repeater = Repeater()
    monkeypatch.setattr("variant.engine.engine.new_recorder", lambda device: repeater)
    return repeater


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


CALLS = [
    {"labels": [1, 2], "seed": 3},
    {"labels": [4, 0], "seed": 2**62 + 11, "cfg": 3.25},
    {"labels": [4, 0], "seed": 5, "cfg": 0.5, "image_ids": [7, 2**40]},
    {"labels": [2, 2], "seed": 5, "image_ids": [7, 8]},
]


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"top_k": 5, "top_p": 0.8}])
def test_replays_give_the_eager_tokens(recorder, options):
    model = small_model()
    captured = Engine(model.var, model.vae)
    eager = Engine(model.var, model.vae, capture=False)
    for call in CALLS:
        ours, expected = captured.generate(**call, **options), eager.generate(**call, **options)
        assert same(ours, expected)
        assert ours.stats.captured
        assert not expected.stats.captured
        assert ours.stats.kv_allocated_bytes == expected.stats.kv_allocated_bytes
        assert ours.stats.kv_peak_bytes == expected.stats.kv_peak_bytes
        assert ours.stats.depths == expected.stats.depths
    assert recorder.recorded == 2  # the generation and the decoder


def test_a_depth_is_recorded_once_and_switching_back_records_nothing(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    first = {depth: engine.generate([1, 2], depth=depth, seed=0) for depth in (None, 2, 3)}
    assert recorder.recorded == 3 + 1
    again = {depth: engine.generate([1, 2], depth=depth, seed=0) for depth in (3, None, 2)}
    assert recorder.recorded == 3 + 1
    assert all(same(first[depth], again[depth]) for depth in first)


def test_batch_filters_and_guidance_are_recorded_apart(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    calls = [
        {"labels": [1]},
        {"labels": [1, 2]},
        {"labels": [1], "cfg": 0.0},
        {"labels": [1], "top_k": 3},
        {"labels": [1], "top_p": 0.5},
    ]
    for call in calls * 2:
        engine.generate(**call, seed=0, decode=False)
    assert recorder.recorded == len(calls)


def test_results_do_not_change_when_the_graph_runs_again(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    kept = engine.generate([1, 2], seed=1)
    tokens, images = kept.tokens.clone(), kept.images.clone()
    engine.generate([3, 4], seed=2)
    assert torch.equal(kept.tokens, tokens)
    assert torch.equal(kept.images, images)


def test_new_weights_are_recorded_anew(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    with torch.no_grad():
        model.var.head.bias.add_(torch.randn_like(model.var.head.bias) * 3)
    changed = engine.generate([1, 2], seed=0)
    assert recorder.recorded == 4
    assert same(changed, Engine(model.var, model.vae, capture=False).generate([1, 2], seed=0))


def test_callbacks_generators_and_plain_torch_are_not_recorded(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    scales = []
    watched = engine.generate(
        [1], seed=0, on_scale=lambda k, partial: scales.append(k), decode=False
    )
    drawn = engine.generate([1], generator=torch.Generator().manual_seed(0), decode=False)
    plain = Engine(model.var, model.vae, backend="reference").generate([1], seed=0)
    assert not any(result.stats.captured for result in (watched, drawn, plain))
    assert recorder.recorded == 0
    assert scales == [0, 1, 2]


def test_page_tables_that_a_graph_reads_outlive_the_table_cache(recorder, monkeypatch):
    monkeypatch.setattr("variant.engine.engine.TABLES_KEPT", 1)
    model = small_model()
    engine = Engine(model.var, model.vae)
    expected = engine.generate([1, 2], seed=0)
    engine.generate([1, 2], depth=2, seed=0)
    engine.generate([1], depth=3, seed=0)
    assert same(engine.generate([1, 2], seed=0), expected)


def test_another_page_size_has_tables_and_a_recording_of_its_own(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    first = engine.generate([1, 2], seed=0, decode=False)
    engine.page_size = 3
    second = engine.generate([1, 2], seed=0, decode=False)
    assert torch.equal(first.tokens, second.tokens)
    assert second.stats.kv_allocated_bytes == second.stats.kv_planned_bytes
    assert second.stats.kv_allocated_bytes != first.stats.kv_allocated_bytes
    assert recorder.recorded == 2


def test_a_failed_recording_leaves_nothing_behind():
    class Failing(Repeater):
        def record(self, function):
            raise RuntimeError("no")

    captures = Captures(Failing())
    with pytest.raises(RuntimeError, match="no"):
        captures.run("key", lambda x: (x,), torch.zeros(1))
    assert len(captures) == 0


def test_recordings_make_room_for_one_that_finds_no_memory():
    class Tight(Repeater):
        """Holds one recording."""

        def record(self, function):
            if self.recorded > self.forgotten:
                raise torch.OutOfMemoryError
            return super().record(function)

    recorder = Tight()
    captures = Captures(recorder)
    inputs = torch.arange(3.0)
    for key, times in (("a", 2), ("b", 3), ("b", 3), ("a", 2)):
        (found,) = captures.run(key, lambda x, times=times: (times * x,), inputs)
        assert torch.equal(found, times * inputs)
    assert len(captures) == 1
    assert (recorder.recorded, recorder.forgotten) == (3, 2)


def test_one_that_finds_no_memory_alone_says_so():
    class Full(Repeater):
        def record(self, function):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Captures(Full()).run("key", lambda x: (x,), torch.zeros(1))


def test_a_graph_is_captured_on_the_warm_up_stream_alone_and_uncollected(monkeypatch):
    """PeerTiming a double of torch.cuda: what the capture must not meet."""
    seen = []

    class Cuda(MagicMock):
        def graph(self, graph, *, pool, stream, capture_error_mode):
            seen.append(("capture", stream, pool, capture_error_mode))
            return nullcontext()

        def stream(self, stream):
            seen.append(("warm up", stream))
            return nullcontext()

    cuda = Cuda()
    monkeypatch.setattr("variant.engine.cuda_graphs.torch.cuda", cuda)
    recorder = GraphRecorder(torch.device("cuda", 1))

    def function():
        seen.append(("run", gc.isenabled(), device_lock.CAPTURE_OR_TIMING.locked()))
        return (MagicMock(),)

    recording = recorder.record(function)
    stream, pool = cuda.Stream.return_value, cuda.graph_pool_handle.return_value
    assert seen == [
        ("warm up", stream),
        ("run", True, False),
        ("capture", stream, pool, "thread_local"),
        ("run", False, True),
    ]
    cuda.Stream.assert_called_once_with(torch.device("cuda", 1))
    recording.first[0].record_stream.assert_called_once()
    assert gc.isenabled()
    assert not device_lock.CAPTURE_OR_TIMING.locked()


def test_undecoded_tokens_can_be_decoded_later():
    model = small_model()
    engine = Engine(model.var, model.vae)
    whole, tokens = engine.generate([1, 2], seed=0), engine.generate([1, 2], seed=0, decode=False)
    assert torch.equal(whole.tokens, tokens.tokens)
    assert tokens.images.shape == (0, 3, 6, 6)
    torch.testing.assert_close(engine.decode(tokens.tokens), whole.images, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"decode: tokens_BL must be \(1, 14\); got"):
        engine.decode(tokens.tokens[:1, :3])


def test_logits_in_parts_draw_the_same_tokens(monkeypatch):
    model = small_model()
    whole = Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0)
    unguided = Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0, cfg=0.0)
    monkeypatch.setattr("variant.engine.step_loop.LOGITS_BYTES", 2 * 2 * 9 * 24 * 4)
    assert same(Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0), whole)
    assert same(Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0, cfg=0.0), unguided)


def test_what_was_recorded_in_inference_mode_is_replayed_outside_and_the_other_way_round(recorder):
    model = small_model()
    expected = Engine(model.var, model.vae, capture=False).generate([1, 2], seed=3)
    for first, then in ((True, False), (False, True)):
        engine = Engine(model.var, model.vae)
        for inference in (first, then):
            with torch.inference_mode(inference):
                assert same(engine.generate([1, 2], seed=3), expected)
    assert recorder.recorded == 4


def test_the_first_result_is_not_kept():
    made = weakref.WeakSet()

    def function(x):
        made.add(result := x + 1)
        return (result,)

    captures = Captures(Repeater())
    first = captures.run("key", function, torch.ones(3))
    del first
    assert not made


def test_the_recordings_used_last_are_kept():
    repeater = Repeater()
    captures = Captures(repeater, kept=2)
    x = torch.arange(3.0)

    def run(factor):
        (got,) = captures.run(factor, lambda x: (x * factor,), x)
        assert torch.equal(got, x * factor)

    for factor in (1, 2, 1, 3, 1):  # 3 drives 2 out: 1 was used after it
        run(factor)
    assert (len(captures), repeater.recorded) == (2, 3)
    run(2)
    assert (len(captures), repeater.recorded) == (2, 4)
    assert repeater.turns == 6  # every call waits for the work of the one before
