"""A call's batches: which runner each gets, and the measurements of all together."""

from types import SimpleNamespace

import pytest
import torch

from variant.engine.batches import Batch, Part
from variant.engine.generation import Sampling
from variant.engine.runs import Call, Run, Source, _own
from variant_kernels import CachePlan, DepthSchedule, ScaleLayout

SCHEDULE = DepthSchedule.full(4, 3)
PLAN = CachePlan(ScaleLayout.from_patch_nums((1, 2, 3)), SCHEDULE, 4)


def part_of(first, count, **changes):
    labels = torch.arange(first, first + count)
    values = {
        "images": labels.view(-1, 1).float(), "tokens_BL": labels.view(-1, 1) * 10,
        "log_probs_BL": None, "batch": Batch(labels, labels + 100), "depths": (4, 4, 4),
        "postponed": (), "allocated_bytes": 50, "peak_bytes": 30, "captured": False,
        "seconds": 2.0, "decode_seconds": 0.5, "product_dtype": torch.float32, "packed": True,
        "zone_weight_bytes": 3,
    }  # fmt: skip
    return Part(**values | changes)


def run_of(size=2, first=(), count=5, guided=True, **source):
    config = SimpleNamespace(num_heads=2, head_dim=16)
    models = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.bfloat16, var=SimpleNamespace(config=config)
    )
    calls = {"checked": None, "presumed": lambda: None, "unchanged": None} | source
    request = SimpleNamespace(sampling=Sampling(cfg=1.5 if guided else 0, seed=0))
    whole = Batch(torch.arange(count), torch.arange(100, 100 + count))
    launchers = SimpleNamespace(pages_dtype=torch.float8_e4m3fn)
    return Run(Source(launchers, **calls), list(first), models, PLAN, request, whole, size)


@pytest.mark.parametrize("guided", [False, True])
def test_measurements_are_of_the_first_the_last_or_of_all_parts(guided):
    first = part_of(0, 3, allocated_bytes=60, peak_bytes=20, captured=True, postponed=(0,))
    last = part_of(
        3, 2, depths=(4, 4, 2), postponed=(1,), decode_seconds=0.25, packed=False,
        product_dtype=torch.bfloat16, zone_weight_bytes=9,
    )  # fmt: skip
    result = run_of(guided=guided).generation([first, last], 7.0)
    assert result.labels.tolist() == [0, 1, 2, 3, 4]
    assert result.image_ids.tolist() == [100, 101, 102, 103, 104]
    assert result.tokens.flatten().tolist() == [0, 10, 20, 30, 40]
    assert result.images.flatten().tolist() == [0, 1, 2, 3, 4]
    assert result.log_probs is None
    stats = result.stats
    assert (stats.seconds, stats.decode_seconds, stats.batches) == (7.0, 0.75, 2)
    assert (stats.depths, stats.postponed, stats.zone_weight_bytes) == ((4, 4, 2), (1,), 9)
    assert (stats.dtype, stats.product_dtype) == ("bfloat16", "bfloat16")
    assert stats.kv_dtype == "float8_e4m3fn"
    assert (stats.packed, stats.captured) == (False, True)
    assert (stats.kv_allocated_bytes, stats.kv_peak_bytes) == (60, 30)
    # Of the largest part, three images.
    assert stats.kv_planned_bytes == PLAN.peak_bytes(3, 2, 16, "float8_e4m3fn", guided)
    paper = PLAN.paper_bytes(3, 2, 16, k_bytes=2, v_bytes=2, guidance=guided)
    assert stats.kv_paper_bytes == paper


def test_log_probabilities_of_all_parts_are_joined():
    parts = [part_of(i, 1, log_probs_BL=torch.full((1, 2), float(i))) for i in range(3)]
    result = run_of().generation(parts, 1.0)
    assert result.log_probs.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert run_of().generation(parts[1:2], 1.0).log_probs.tolist() == [[1, 1]]


def test_what_is_kept_of_a_batch_has_memory_of_its_own():
    whole = torch.arange(6)
    assert _own(whole) is whole
    part = _own(whole[:2])
    assert part.tolist() == [0, 1]
    assert part.untyped_storage().nbytes() == 16


class Runner:
    """A runner whose results are numbered, or that has none."""

    weights = "weights"

    def __init__(self, recorded=True, changed=False):
        self.recorded, self.changed, self.asked, self.made = recorded, changed, [], []

    def is_recorded(self, batch, request, graphs):
        self.asked.append(batch.labels_B.tolist())
        return self.recorded if isinstance(self.recorded, bool) else self.recorded(batch)

    def generate(self, batch, request, graphs, unchanged=None):
        self.made.append((batch.labels_B.tolist(), unchanged is not None))
        return None if self.changed and unchanged is not None else part_of(0, len(batch.labels_B))


def test_the_first_batch_has_its_runner_and_the_others_are_checked():
    first, checked = Runner(), Runner()
    run = run_of(first=[(first, None)], checked=lambda: (checked, None))
    assert [len(part.tokens_BL) for part in run.parts()] == [2, 2, 1]
    assert first.made == [([0, 1], False)]
    assert checked.made == [([2, 3], False), ([4], False)]
    assert [len(result.tokens) for result in run_of(first=[(first, None)], count=2).batches()] == [
        2
    ]


@pytest.mark.parametrize("changed", [False, True])
def test_a_recorded_batch_is_queued_before_the_weights_are_looked_at(changed):
    presumed, checked = Runner(changed=changed), Runner()
    run = run_of(
        presumed=lambda: (presumed, "graphs"),
        checked=lambda: (checked, None),
        unchanged=lambda weights: not changed,
    )
    assert len(list(run.parts())) == 3
    assert presumed.made == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert len(checked.made) == (3 if changed else 0)
    # Not recorded: its weights are looked at first.
    presumed, checked = Runner(recorded=False), Runner()
    run = run_of(presumed=lambda: (presumed, "graphs"), checked=lambda: (checked, None))
    assert len(list(run.parts())) == 3
    assert (presumed.made, len(checked.made)) == ([], 3)


@pytest.mark.parametrize(
    ("size", "count", "asked"), [(2, 5, [[0, 1], [0]]), (2, 4, [[0, 1]]), (9, 3, [[0, 1, 2]] * 2)]
)
def test_a_call_is_recorded_if_batches_of_both_sizes_are(size, count, asked):
    runner = Runner()
    run = run_of(size=size, count=count, presumed=lambda: (runner, "graphs"))
    assert run.is_recorded()
    assert sorted(runner.asked) == sorted(asked)
    assert not run_of(size=size, count=count).is_recorded()
    for missing in {len(labels) for labels in asked}:
        runner = Runner(recorded=lambda batch, n=missing: len(batch.labels_B) != n)
        run = run_of(size=size, count=count, presumed=lambda r=runner: (r, "graphs"))
        assert not run.is_recorded()


def test_options_are_those_of_generate():
    assert Call.of({"depth": 2, "decode": False}) == Call(depth=2, decode=False)
    with pytest.raises(TypeError, match="generate: got an unexpected argument 'dept'"):
        Call.of({"dept": 2})
