"""Graph replay on the CPU: a test double records a call and repeats it as a graph would."""

import copy
import gc
import weakref
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from small_models import small_model

from variant.engine import cast_models
from variant.engine import engine as engine_module
from variant.engine.cuda_graphs import GraphCache, GraphRecorder, Recording
from variant.engine.engine import Engine
from variant.engine.graph_replay import GraphReplay
from variant.engine.memory import USABLE_SHARE
from variant.engine.weights import WeightsVersion
from variant_kernels import CachePlan, device_lock


class Repeater:
    """Runs the recorded function again on the same input tensors, into the same outputs.

    As with a graph, every decision of Python is fixed, and only tensor values can change.
    """

    def __init__(self):
        self.recorded = 0
        self.serialized_calls = 0
        self.cleared = 0
        self.idle = 0

    @contextmanager
    def serialized(self):
        self.serialized_calls += 1
        yield

    def record(self, function):
        self.recorded += 1
        first = function()
        outputs = tuple(torch.full_like(tensor, -1) for tensor in first)

        def replay():
            for output, result in zip(outputs, function(), strict=True):
                output.copy_(result)

        return Recording(replay, outputs, first)

    def clear(self):
        self.cleared += 1
        self.idle = 0

    def idle_bytes(self):
        return self.idle


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
    second = engine.generate([1, 2], seed=1)
    tokens, images = second.tokens.clone(), second.images.clone()
    engine.generate([3, 4], seed=2)
    assert torch.equal(second.tokens, tokens)
    assert torch.equal(second.images, images)


def test_new_weights_are_recorded_anew(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    with torch.no_grad():
        model.var.head.bias.add_(torch.randn_like(model.var.head.bias) * 3)
    changed = engine.generate([1, 2], seed=0)
    assert recorder.recorded == 4
    assert same(changed, Engine(model.var, model.vae, capture=False).generate([1, 2], seed=0))


class Counting(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain, self.calls = inner, 1.0, 0

    def forward(self, x):
        self.calls += 1
        return self.gain * self.inner(x)


def test_settings_of_parts_that_are_called_are_recorded_anew_but_no_counters(recorder, monkeypatch):
    model = small_model()
    part = model.var.class_emb = Counting(model.var.class_emb)
    record = recorder.record

    def record_as_graph(function):
        """A replay has the setting of the recording, and does not count."""
        recording, gain = record(function), part.gain

        def replay():
            now, part.gain = (part.gain, part.calls), gain
            recording.replay()
            part.gain, part.calls = now

        return replace(recording, replay=replay)

    monkeypatch.setattr(recorder, "record", record_as_graph)
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    weights = engine._weights()
    for gain, recorded in ((1.0, 2), (30.0, 4)):
        part.gain = gain
        results = [engine.generate([1, 2], seed=0) for _ in range(2)]
        assert recorder.recorded == recorded
        twin = copy.deepcopy(model)
        expected = Engine(twin.var, twin.vae, capture=False).generate([1, 2], seed=0)
        assert all(same(result, expected) for result in results)
    assert engine._weights() is weights


def test_a_call_that_is_not_recorded_looks_at_the_weights_first(recorder):
    """Its callback would run a second time after a batch of old weights was discarded."""
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    with torch.no_grad():
        model.var.head.bias.add_(1)
    scales = []
    engine.generate([1, 2], seed=0, on_scale=lambda k, partial: scales.append(k))
    assert scales == list(range(model.var.layout.num_scales))


@pytest.fixture
def order(recorder, monkeypatch):
    """What happens in a call: "replay" of a graph, "look" at the weights, "memory" looked up."""
    seen, look = [], WeightsVersion.__call__
    run = GraphCache.run

    def noted_run(self, key, *arguments):
        seen.append("replay" if key in self else "record")
        return run(self, key, *arguments)

    def noted_look(self, *arguments):
        seen.append("look")
        return look(self, *arguments)

    def free_bytes(device):
        seen.append("memory")
        return 2**40

    monkeypatch.setattr(GraphCache, "run", noted_run)
    monkeypatch.setattr(WeightsVersion, "__call__", noted_look)
    monkeypatch.setattr("variant.engine.engine.free_bytes", free_bytes)
    return seen


def test_a_recorded_batch_is_queued_before_the_weights_are_looked_at(order):
    model = small_model()
    engine = Engine(model.var, model.vae)
    del order[:]
    first = engine.generate([1, 2], seed=0)
    assert order == ["look", "memory", "record", "record"]
    del order[:]
    assert same(engine.generate([1, 2], seed=0), first)
    assert order == ["replay", "replay", "look"]
    del order[:]
    engine.generate([1, 2], seed=0, decode=False)
    assert order == ["replay", "look"]
    del order[:]
    engine.generate([1, 2, 3], seed=0, max_batch=2)  # the rest of one image is not recorded
    assert order == ["look", "memory", *["replay"] * 2, "look", *["record"] * 2]
    del order[:]
    engine.generate([1, 2, 3], seed=0, max_batch=2)
    assert order == ["replay", "replay", "look"] * 2


def _replaced(model):
    weight = model.var.head.weight
    model.var.head.weight = torch.nn.Parameter(weight.detach().flip(0).clone())


def _in_place(model):
    with torch.no_grad():
        model.var.head.weight.copy_(model.var.head.weight.flip(0).clone())


def _decoder(model):
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.mul_(-1)


@pytest.mark.parametrize("change", [_replaced, _in_place, _decoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_of_weights_that_changed_is_discarded(order, change, dtype):
    model = small_model()
    engine = Engine(model.var, model.vae, dtype=dtype)
    before = engine.generate([1, 2], seed=0)
    change(model)
    after = engine.generate([1, 2], seed=0)
    eager = Engine(model.var, model.vae, dtype=dtype, capture=False)
    assert same(after, eager.generate([1, 2], seed=0))
    assert not same(after, before)
    assert same(engine.generate([1, 2], seed=0), after)


def test_weights_that_change_while_a_batch_is_generated_count(order, monkeypatch):
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    decode, changes = GraphReplay.decode, [_in_place]

    def decode_and_change(self, *arguments):
        images = decode(self, *arguments)
        if changes:
            changes.pop()(model)
        return images

    monkeypatch.setattr(GraphReplay, "decode", decode_and_change)
    result = engine.generate([1, 2], seed=0)
    assert same(result, Engine(model.var, model.vae, capture=False).generate([1, 2], seed=0))


def test_a_graph_keeps_the_memory_that_it_reads_until_the_next_call(recorder):
    """A parameter that was replaced is read once more, before its replacement is noticed."""
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    kept = {t.data_ptr() for t in engine._graphs[1]._weights}
    tensors = [*model.var.parameters(), *model.var.buffers(), *model.vae.parameters()]
    assert kept >= {t.data_ptr() for t in tensors}


def test_old_weights_are_freed_before_new_ones_are_cast(recorder, monkeypatch):
    model = small_model()
    engine = Engine(model.var, model.vae, dtype=torch.bfloat16)
    engine.generate([1, 2], seed=0)
    old, alive = weakref.ref(engine._cast[1]), []
    cast = cast_models.EngineWeights

    def noted(*arguments):
        alive.append(old() is not None)
        return cast(*arguments)

    monkeypatch.setattr(cast_models, "EngineWeights", noted)
    _in_place(model)
    gc.disable()
    try:
        engine.generate([1, 2], seed=0)
    finally:
        gc.enable()
    assert alive == [False]


def test_graphs_of_old_weights_are_released_without_the_garbage_collector(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    engine.generate([1, 2], seed=0)
    old = weakref.ref(engine._graphs[1].graphs)
    with torch.no_grad():
        model.var.head.bias.add_(1)
    gc.disable()
    try:
        engine.generate([1, 2], seed=0)
        assert old() is None
    finally:
        gc.enable()


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


def test_recordings_rest_while_capture_is_off(recorder):
    model = small_model()
    engine = Engine(model.var, model.vae)
    expected = engine.generate([1, 2], seed=0)
    for capture in (False, True):
        engine.capture = capture
        again = engine.generate([1, 2], seed=0)
        assert again.stats.captured == capture
        assert same(again, expected)
    assert recorder.recorded == 2


def test_page_tables_that_a_graph_reads_outlive_the_table_cache(recorder, monkeypatch):
    monkeypatch.setattr("variant.engine.page_tables.MAX_PAGE_TABLES", 1)
    model = small_model()
    engine = Engine(model.var, model.vae)
    expected = engine.generate([1, 2], seed=0)
    (tables,) = engine._page_tables._tables.values()
    tensors = [weakref.ref(step.page_table_BM) for step in tables.values()]
    assert tensors
    del tables
    engine.generate([1, 2], depth=2, seed=0)
    engine.generate([1], depth=3, seed=0)
    assert all(tensor() is not None for tensor in tensors)
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

    graphs = GraphCache(Failing())
    with pytest.raises(RuntimeError, match="no"):
        graphs.run("key", lambda x: (x,), torch.zeros(1))
    assert len(graphs) == 0


def test_recordings_are_dropped_when_a_new_one_runs_out_of_memory():
    class Tight(Repeater):
        """Holds one recording."""

        def record(self, function):
            if self.recorded > self.cleared:
                raise torch.OutOfMemoryError
            return super().record(function)

    recorder = Tight()
    graphs = GraphCache(recorder)
    inputs = torch.arange(3.0)
    for key, times in (("a", 2), ("b", 3), ("b", 3), ("a", 2)):
        (result,) = graphs.run(key, lambda x, times=times: (times * x,), inputs)
        assert torch.equal(result, times * inputs)
    assert len(graphs) == 1
    assert (recorder.recorded, recorder.cleared) == (3, 2)


def test_memory_of_the_graphs_is_for_graphs_until_another_batch_needs_it(recorder, monkeypatch):
    """Three images fit beside the memory that the graphs hold, two more into that memory."""
    model = small_model()
    engine = Engine(model.var, model.vae)
    plan = CachePlan(model.var.layout, model.var.schedule(None))
    one, always = engine.image_bytes(plan), engine.decoder_bytes()
    free = {0: 5 * one + always, 1: 3 * one + always}
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: free[recorder.idle > 0])

    def batches(**options):
        return engine.generate([0] * 5, seed=0, decode=False, **options).stats.batches

    assert batches() == 1
    recorder.idle = -(-2 * one * 10 // 8)  # of which a share of 0.8 is usable
    assert batches() == 1
    watched = {"on_scale": lambda k, partial: None}
    assert batches(max_batch=3, **watched) == 2  # fits as it is
    assert recorder.cleared == 0
    assert batches(**watched) == 1
    assert recorder.cleared == 1
    assert len(engine._graphs[1].graphs) == 0
    assert batches() == 1
    assert (recorder.recorded, recorder.cleared) == (2, 1)


def test_a_graph_may_use_free_memory_and_that_of_earlier_graphs(monkeypatch):
    repeater = Repeater()
    recordings = GraphCache(repeater)
    recordings.run("a", lambda x: (x,), torch.zeros(1))
    repeater.idle = 100
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 1000)
    available = partial(engine_module._available, torch.device("cpu"))
    assert available(recordings, 2000, True) == 1000 + 100 * USABLE_SHARE
    assert available(None, 2000, True) == 1000
    assert available(recordings, 1000, False) == 1000
    assert repeater.cleared == 0
    assert available(recordings, 1001, False) == 1000
    assert repeater.cleared == 1


def test_a_call_without_a_graph_drops_the_recordings_that_leave_it_no_memory(recorder, monkeypatch):
    model = small_model()
    engine = Engine(model.var, model.vae)
    tokens = engine.generate([1, 2], seed=0).tokens
    expected = engine.forced_logits(torch.tensor([1, 2]), tokens)
    logits = engine_module.teacher_forced_logits

    def full(*arguments):
        if not recorder.cleared:
            raise torch.OutOfMemoryError
        return logits(*arguments)

    monkeypatch.setattr(engine_module, "teacher_forced_logits", full)
    assert torch.equal(engine.forced_logits(torch.tensor([1, 2]), tokens), expected)
    assert (recorder.cleared, len(engine._graphs[1].graphs)) == (1, 0)
    recorder.cleared = 0
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to drop
        engine.forced_logits(torch.tensor([1, 2]), tokens)


def test_running_out_of_memory_with_no_recording_to_drop_raises():
    class Full(Repeater):
        def record(self, function):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        GraphCache(Full()).run("key", lambda x: (x,), torch.zeros(1))


def test_work_waits_for_that_of_the_block_before_on_whichever_stream(monkeypatch):
    """With a double of torch.cuda."""
    cuda = MagicMock()
    streams, events = [MagicMock(), MagicMock(), MagicMock()], [MagicMock() for _ in range(3)]
    cuda.current_stream.side_effect, cuda.Event.side_effect = streams, events
    monkeypatch.setattr("variant.engine.cuda_graphs.torch.cuda", cuda)
    recorder = GraphRecorder(torch.device("cuda", 1))
    with recorder.serialized():
        events[0].record.assert_not_called()
    streams[0].wait_event.assert_not_called()
    events[0].record.assert_called_once_with(streams[0])
    with suppress(MemoryError), recorder.serialized():
        streams[1].wait_event.assert_called_once_with(events[0])
        raise MemoryError
    events[1].record.assert_called_once_with(streams[1])  # what was queued before the error
    with recorder.serialized():
        streams[2].wait_event.assert_called_once_with(events[1])


def test_without_recordings_no_memory_is_idle():
    repeater = Repeater()
    graphs, repeater.idle = GraphCache(repeater), 7
    assert graphs.idle_bytes() == 0
    graphs.run("key", lambda x: (x,), torch.zeros(1))
    assert graphs.idle_bytes() == 7


def test_a_graph_is_captured_on_the_warm_up_stream_alone_and_uncollected(monkeypatch):
    """With a double of torch.cuda: checks the streams, the lock and the garbage collector."""
    seen = []

    class Cuda(MagicMock):
        @contextmanager
        def graph(self, graph, *, pool, stream, capture_error_mode):
            seen.append(("capture", stream, pool, capture_error_mode))
            yield

        def stream(self, stream):
            seen.append(("warm up", stream))
            return nullcontext()

    cuda = Cuda()
    monkeypatch.setattr("variant.engine.cuda_graphs.torch.cuda", cuda)
    clear = "variant.engine.cuda_graphs.torch._C._cuda_clearCublasWorkspaces"
    monkeypatch.setattr(clear, lambda: seen.append("clear workspaces"), raising=False)
    recorder = GraphRecorder(torch.device("cuda", 1))

    def function():
        seen.append(("run", gc.isenabled(), device_lock.CAPTURE_OR_TIMING.locked()))
        return (MagicMock(),)

    recording = recorder.record(function)
    stream, pool = cuda.Stream.return_value, cuda.graph_pool_handle.return_value
    assert seen == [
        ("warm up", stream),
        ("run", True, False),
        "clear workspaces",
        ("capture", stream, pool, "thread_local"),
        ("run", False, True),
        "clear workspaces",
    ]
    cuda.Stream.assert_called_once_with(torch.device("cuda", 1))
    recording.first[0].record_stream.assert_called_once()
    assert gc.isenabled()
    assert not device_lock.CAPTURE_OR_TIMING.locked()


def test_workspaces_of_a_capture_that_fails_are_cleared_too(monkeypatch):
    cleared = []
    monkeypatch.setattr("variant.engine.cuda_graphs.torch.cuda", MagicMock())
    clear = "variant.engine.cuda_graphs.torch._C._cuda_clearCublasWorkspaces"
    monkeypatch.setattr(clear, lambda: cleared.append(1), raising=False)
    results = [(MagicMock(),)]
    with pytest.raises(IndexError):  # the second run is the capture
        GraphRecorder(torch.device("cuda", 1)).record(results.pop)
    assert cleared == [1, 1]


def test_undecoded_tokens_can_be_decoded_later():
    model = small_model()
    engine = Engine(model.var, model.vae)
    whole, tokens = engine.generate([1, 2], seed=0), engine.generate([1, 2], seed=0, decode=False)
    assert torch.equal(whole.tokens, tokens.tokens)
    assert tokens.images.shape == (0, 3, 6, 6)
    torch.testing.assert_close(engine.decode(tokens.tokens), whole.images, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"decode: tokens_BL must be \(B, 14\); got \(1, 3\)"):
        engine.decode(tokens.tokens[:1, :3])


def test_logits_in_parts_draw_the_same_tokens(monkeypatch):
    model = small_model()
    whole = Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0)
    unguided = Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0, cfg=0.0)
    monkeypatch.setattr("variant.engine.drawing.LOGITS_BYTES", 2 * 2 * 9 * 24 * 4)
    assert same(Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0), whole)
    assert same(Engine(model.var, model.vae).generate([1, 2, 3, 4, 0], seed=0, cfg=0.0), unguided)


def test_recordings_made_in_inference_mode_replay_outside_and_vice_versa(recorder):
    model = small_model()
    expected = Engine(model.var, model.vae, capture=False).generate([1, 2], seed=3)
    for first, then in ((True, False), (False, True)):
        engine = Engine(model.var, model.vae)
        for inference in (first, then):
            with torch.inference_mode(inference):
                assert same(engine.generate([1, 2], seed=3), expected)
    assert recorder.recorded == 4


def test_the_cache_keeps_no_reference_to_the_first_result():
    results = weakref.WeakSet()

    def function(x):
        results.add(result := x + 1)
        return (result,)

    graphs = GraphCache(Repeater())
    first = graphs.run("key", function, torch.ones(3))
    del first
    assert not results


def test_the_recordings_used_last_are_kept():
    repeater = Repeater()
    graphs = GraphCache(repeater, max_graphs=2)
    x = torch.arange(3.0)

    def run(factor):
        (result,) = graphs.run(factor, lambda x: (x * factor,), x)
        assert torch.equal(result, x * factor)

    for factor in (1, 2, 1, 3, 1):  # 3 evicts 2: 1 was used later
        run(factor)
    assert (len(graphs), repeater.recorded) == (2, 3)
    run(2)
    assert (len(graphs), repeater.recorded) == (2, 4)
    assert repeater.serialized_calls == 6  # every call waits for the work of the one before


def test_a_gpu_alone_records_graphs(monkeypatch):
    monkeypatch.setattr(engine_module, "GraphRecorder", lambda device: ("recorder", device))
    gpu = torch.device("cuda", 1)
    assert engine_module.new_recorder(gpu) == ("recorder", gpu)
    assert engine_module.new_recorder(torch.device("cpu")) is None
