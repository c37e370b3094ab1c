"""Free memory and the batch size that fits into it."""

import numpy as np
import pytest
import torch

from variant.engine.memory import _group_limit, batch_size, free_bytes


def group(folder, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


def test_file_cache_counts_as_free_and_every_parent_group_limits(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    group(root, "max", 0, {})
    group(root / "outer", 1000, 900, {"inactive_file": 300, "slab_reclaimable": 50})
    group(root / "outer" / "inner", 5000, 10, {"inactive_file": 0})
    assert _group_limit(root, membership) == 450
    membership.write_text("0::/\n")
    assert _group_limit(root, membership) == float("inf")
    assert _group_limit(tmp_path / "none", tmp_path / "none") == float("inf")


def test_this_machine_has_free_memory():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("count", "max_batch", "available", "expected"),
    [(5, None, 1000, 5), (5, None, 35, 2), (5, 3, 1000, 3), (5, 3, 40, 3), (2, 9, 30, 2)],
)
def test_a_batch_is_limited_by_the_request_the_caller_and_memory(
    count, max_batch, available, expected
):
    size = batch_size(count, max_batch, per_image=10, fixed=10, available=available)
    assert size == expected


def test_a_batch_size_is_a_plain_integer():
    for value in (np.int64(3), torch.tensor(3)):
        size = batch_size(5, value, per_image=10, fixed=10, available=1000)
        assert (type(size), size) == (int, 3)


def test_a_batch_that_does_not_fit_raises():
    for max_batch, available in ((None, 19), (3, 39)):
        with pytest.raises(MemoryError, match=f"generate: {max_batch or 1} image"):
            batch_size(5, max_batch, per_image=10, fixed=10, available=available)
    for max_batch, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_batch must be an integer >= 1"):
            batch_size(5, max_batch, per_image=10, fixed=10, available=1000)
