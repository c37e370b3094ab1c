"""The layouts that are kept for masks."""

import sys
import threading
import time

import pytest
import torch

from variant_kernels import masks


@pytest.fixture
def short_turns():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Interrupted(dict):
    """Another thread has its turn whenever an iterator has just been made."""

    def __iter__(self):
        iterator = super().__iter__()
        time.sleep(1e-4)
        return iterator


def test_threads_that_look_at_masks_of_their_own_do_not_disturb_each_other(
    short_turns, monkeypatch
):
    monkeypatch.setattr(masks, "_cached_layouts", Interrupted())
    monkeypatch.setattr(masks, "layout_of", lambda bias: None)
    monkeypatch.setattr(masks, "MAX_CACHED_LAYOUTS", 1)
    errors, begin = [], threading.Barrier(8, timeout=20)

    def look():
        own = [torch.zeros(1, 1) for _ in range(20)]
        begin.wait()
        try:
            for _ in range(20):
                for mask in own:
                    assert masks.block_causal_layout(mask) is None
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(masks._cached_layouts) <= 8  # those that the threads added last


def test_a_lazily_negated_mask_is_no_mask():
    causal_LL = torch.full((4, 4), -torch.inf).triu(1)
    assert masks.block_causal_layout(causal_LL) is not None
    assert masks.block_causal_layout(torch._neg_view(causal_LL)) is None
