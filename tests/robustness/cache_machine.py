"""``PagedKVCache`` as a state machine, against a dictionary of what each layer has stored.

hypothesis chooses layouts, schedules and operations, right and wrong ones, and shortens a sequence
that fails. Every token is written to its slot and read back by page tables after every operation.

    python -m tests.robustness.cache_machine --seed 7 --cases 300
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, Phase, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.robustness import forked
from tests.robustness.progress import Progress
from variant_kernels import CachePlan, DepthSchedule, PagedKVCache, ScaleLayout

MODULE = "tests.robustness.cache_machine"
MAX_LAYERS, MAX_SCALES = 6, 5
STEPS = 50


@st.composite
def subsets(draw, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Some of the layers; the first and the last are always among them."""
    inner = [layer for layer in layers[1:-1] if draw(st.booleans())]
    return (layers[0], *inner, *layers[-1:]) if len(layers) > 1 else layers


@st.composite
def schedules(draw, full_depth: int, num_scales: int) -> DepthSchedule:
    """Layers that become fewer from scale to scale."""
    depths: list[tuple[int, ...]] = [tuple(range(full_depth))]
    for _ in range(num_scales):
        depths.append(draw(subsets(depths[-1])))
    return DepthSchedule.from_depths(depths[1:], full_depth=full_depth)


class CacheMachine(RuleBasedStateMachine):
    """The cache beside its model.

    stored: by layer, the numbers written, (B, tokens).  ran: the (layer, scale) that have been
    closed.  opened: the one that is open.
    """

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        depth = data.draw(st.integers(2, MAX_LAYERS), "layers")
        sides = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=MAX_SCALES), "sides")
        self.layout = ScaleLayout.from_patch_nums(sides)
        self.planned = data.draw(schedules(depth, len(sides)), "schedule")
        self.page_size = data.draw(st.sampled_from((1, 2, 3, 5, 16)), "page size")
        self.batch = data.draw(st.integers(1, 3), "batch")
        plan = CachePlan(self.layout, self.planned, self.page_size)
        self.cache = PagedKVCache(plan, self.batch, 1, 16, torch.float32)
        self.number = 0
        pages = _peak_pages(self.layout, self.planned, self.page_size)
        assert self.cache.k_pages.shape[0] == pages * self.batch
        self._forget()

    def _forget(self) -> None:
        self.cache.k_pages.fill_(torch.nan)
        self.schedule = self.planned
        self.stored: dict[int, torch.Tensor] = {}
        self.ran: list[tuple[int, int]] = []
        self.opened: tuple[int, int] | None = None
        self.step = None
        self.most_pages = 0

    # --- the model --------------------------------------------------------------------------------

    def _next(self) -> tuple[int, int] | None:
        """The (layer, scale) that may be opened; None if one is open, or all have run."""
        if self.opened:
            return None
        order = [(layer, k) for k, layers in enumerate(self.schedule.layers) for layer in layers]
        return next((step for step in order if step not in self.ran), None)

    def _scales_done(self) -> int | None:
        """How many scales have run; None within a scale."""
        if self.opened:
            return None
        following = self._next()
        if following is None:
            return self.schedule.num_scales
        layer, scale = following
        return scale if layer == self.schedule.layers[scale][0] else None

    def _pages(self) -> int:
        return sum(-(-x.shape[1] // self.page_size) for x in self.stored.values())

    # --- operations -------------------------------------------------------------------------------

    @precondition(lambda self: self._next() is not None)
    @rule()
    def open(self) -> None:
        layer, scale = self._next()
        self.step = self.cache.open(layer, scale)
        tokens = self.layout.tokens[scale]
        numbers = torch.arange(self.number, self.number + self.batch * tokens).float()
        self.number += self.batch * tokens
        numbers = numbers.view(self.batch, tokens)
        slots = self.step.slots_BT
        assert slots.shape == (self.batch, tokens)
        assert len(set(slots.flatten().tolist())) == slots.numel(), "two tokens share a slot"
        self.cache.k_pages.view(-1, 16)[slots] = numbers.unsqueeze(-1)
        before = self.stored.get(layer, torch.zeros(self.batch, 0))
        self.stored[layer] = torch.cat((before, numbers), 1)
        self.opened = layer, scale
        self.most_pages = max(self.most_pages, self._pages())
        self._check_step(layer)

    def _check_step(self, layer: int) -> None:
        """The table of the open step shows all tokens of its layer, in order."""
        expected = self.stored[layer]
        assert self.step.kv_lens_B.tolist() == [expected.shape[1]] * self.batch
        for row in range(self.batch):
            pages = self.cache.k_pages[self.step.page_table_BM[row].long()]
            seen = pages.flatten(0, 2)[: expected.shape[1], 0]
            assert torch.equal(seen, expected[row]), "a token was moved or lost"
        self.tables = getattr(self, "tables", {})
        self.tables[layer] = self.step

    @precondition(lambda self: self.opened is not None)
    @rule()
    def close(self) -> None:
        layer, scale = self.opened
        self.cache.close(layer, scale)
        self.opened, self.step = None, None
        self.ran.append((layer, scale))
        if not any(layer in layers for layers in self.schedule.layers[scale + 1 :]):
            del self.stored[layer]

    @precondition(lambda self: self._next() is not None)
    @rule()
    def run_the_rest_of_a_scale(self) -> None:
        _, scale = self._next()
        while (following := self._next()) is not None and following[1] == scale:
            self.open()
            self.close()

    @rule(layer=st.integers(-2, MAX_LAYERS + 1), scale=st.integers(-2, MAX_SCALES + 1))
    def open_a_wrong_one(self, layer: int, scale: int) -> None:
        assume((layer, scale) != self._next())
        _refused(lambda: self.cache.open(layer, scale), "PagedKVCache.open")

    @rule(layer=st.integers(-2, MAX_LAYERS + 1), scale=st.integers(-2, MAX_SCALES + 1))
    def close_a_wrong_one(self, layer: int, scale: int) -> None:
        assume((layer, scale) != self.opened)
        _refused(lambda: self.cache.close(layer, scale), "PagedKVCache.close")

    @precondition(lambda self: self._scales_done() is not None)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        done = self._scales_done()
        old = self.schedule
        layers = list(old.layers[:done])
        above = layers[-1] if layers else tuple(range(old.full_depth))
        for scale in range(done, old.num_scales):
            allowed = tuple(layer for layer in old.layers[scale] if layer in above)
            above = data.draw(subsets(allowed), f"layers of scale {scale}")
            layers.append(above)
        new = DepthSchedule.from_depths(layers, full_depth=old.full_depth)
        self.cache.switch(new)
        self.schedule = new
        for layer in list(self.stored):
            if not any(layer in later for later in new.layers[done:]):
                del self.stored[layer]

    @rule(data=st.data())
    def switch_to_a_wrong_one(self, data: st.DataObject) -> None:
        """Within a scale; to another number of scales or layers; to more layers."""
        depth, scales = self.schedule.full_depth, self.schedule.num_scales
        wrong = data.draw(
            st.sampled_from(
                [DepthSchedule.full(depth + 1, scales), DepthSchedule.full(depth, scales + 1)]
            ),
            "schedule",
        )
        if self._scales_done() is None:
            wrong = self.schedule
        elif self.schedule.layers[-1] != tuple(range(depth)):
            wrong = data.draw(st.sampled_from([wrong, DepthSchedule.full(depth, scales)]), "full")
        _refused(lambda: self.cache.switch(wrong), "PagedKVCache.switch")

    @rule(chance=st.integers(0, 3))
    def reset(self, chance: int) -> None:
        assume(chance == 0)  # else few sequences come far
        self.cache.reset()
        self._forget()

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        page_bytes = 2 * self.page_size * 16 * 4
        assert self.cache.used_bytes == self._pages() * self.batch * page_bytes
        assert self.cache.peak_bytes == self.most_pages * self.batch * page_bytes
        assert self.cache.peak_bytes <= self.cache.allocated_bytes
        assert self.cache.schedule == self.schedule
        if self.opened:
            self._check_step(self.opened[0])
        owners: dict[int, int] = {}
        for layer, expected in self.stored.items():
            step = self.tables[layer]
            for row in range(self.batch):
                used = step.page_table_BM[row, : -(-expected.shape[1] // self.page_size)].tolist()
                for page in used:
                    assert owners.setdefault(page, layer) == layer, "two layers share a page"
                seen = self.cache.k_pages[used].flatten(0, 2)[: expected.shape[1], 0]
                assert torch.equal(seen, expected[row]), "a token of another layer was lost"


def _refused(call, name: str) -> None:
    try:
        call()
    except ValueError as error:
        text = str(error)
    else:
        raise AssertionError(f"{name} took it; expected ValueError")
    assert name in text, text
    assert "expected open(-1" not in text, f"nobody can do that: {text}"


def _peak_pages(layout: ScaleLayout, schedule: DepthSchedule, page_size: int) -> int:
    """The largest number of pages of one sequence in use at once, by simulation."""
    tokens: dict[int, int] = {}
    most = 0
    for scale, layers in enumerate(schedule.layers):
        for layer in layers:
            tokens[layer] = tokens.get(layer, 0) + layout.tokens[scale]
            most = max(most, sum(-(-count // page_size) for count in tokens.values()))
            if not any(layer in later for later in schedule.layers[scale + 1 :]):
                del tokens[layer]
    return most


def run(
    number: int,
    examples: int,
    shorten: bool = True,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Run the machine with hypothesis's seed ``number``; raises where it fails.

    Args:
        shorten: a sequence that fails, before it is reported.
        done: called after each sequence. Hypothesis also runs some that it does not count, because
            they drew too much.
    """

    class Machine(CacheMachine):
        def teardown(self) -> None:
            super().teardown()
            done()

    chosen = settings(
        phases=(Phase.generate, *((Phase.shrink,) if shorten else ())),
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(Machine), settings=chosen)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--seed", type=int, default=forked.option("SEED", 0))
    parser.add_argument("--cases", type=int, default=forked.option("SEQUENCES", 100))
    arguments = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    progress = Progress(MODULE, arguments.cases)
    forked.single_thread()
    progress.prepared()
    try:
        run(arguments.seed, arguments.cases, done=progress.case)
    except Exception as error:
        print(f"python -m {MODULE} --seed {arguments.seed} --cases {arguments.cases}: {error!r}")
        raise
    print(f"{MODULE}: {arguments.cases} sequences hold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
