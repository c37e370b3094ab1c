"""The page cache as a state machine; and the faults that the machine must find."""

import pytest

from tests.robustness import cache_machine
from tests.robustness.command import run_generator
from tests.robustness.forked import option
from variant_kernels import PagedKVCache
from variant_kernels.plans.cache_plan import PageAllocator


@pytest.mark.timeout(10_000)
def test_the_cache_keeps_what_a_dictionary_keeps():
    run_generator("cache_machine", "--cases", option("SEQUENCES", 100))


def never(self, layer):
    """Frees nothing."""


def keep_the_last_page(self, layer):
    """Frees all pages but one, which stays in use."""
    pages = self.pages.pop(layer, [])
    for page in pages[:-1]:
        self._used ^= 1 << page
    self.tokens.pop(layer, None)


@pytest.mark.parametrize("release", [never, keep_the_last_page])
def test_a_wrong_release_is_found(monkeypatch, release):
    monkeypatch.setattr(PageAllocator, "release", release)
    with pytest.raises(Exception):  # noqa: B017  the plan's own checks may be the first to raise
        cache_machine.run(0, 30, shorten=False)


def test_a_switch_that_frees_what_is_still_read_is_found(monkeypatch):
    original = PagedKVCache.switch

    def switch(self, schedule):
        original(self, schedule)
        for layer in list(self._allocator.pages)[:1]:
            self._allocator.release(layer)

    monkeypatch.setattr(PagedKVCache, "switch", switch)
    with pytest.raises(AssertionError):
        cache_machine.run(0, 50, shorten=False)


def test_a_wrong_order_that_is_taken_is_found(monkeypatch):
    monkeypatch.setattr(PagedKVCache, "close", lambda self, layer, scale: None)
    with pytest.raises(Exception):  # noqa: B017
        cache_machine.run(0, 30, shorten=False)
