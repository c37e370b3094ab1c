"""How much memory counts as free."""

import torch

from variant.engine.memory import _group_limit, free_bytes


def group(folder, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


def test_file_cache_counts_as_free_and_every_group_on_the_way_limits(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    group(root, "max", 0, {})
    group(root / "outer", 1000, 900, {"inactive_file": 300, "slab_reclaimable": 50})
    group(root / "outer" / "inner", 5000, 10, {"inactive_file": 0})
    assert _group_limit(root, membership) == 450
    membership.write_text("0::/\n")
    assert _group_limit(root, membership) == float("inf")
    assert _group_limit(tmp_path / "none", tmp_path / "none") == float("inf")


def test_this_machine_has_some():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
