"""Which page tables are kept for the next batch."""

import torch

from variant.engine import page_tables
from variant.engine.page_tables import PageTableCache
from variant_kernels import DepthSchedule

CPU = torch.device("cpu")
FULL = DepthSchedule.full(4, 3)


def tables_of(cache, num_sequences):
    return cache.get(FULL, num_sequences, 16, CPU)


def test_as_many_tables_as_allowed_are_kept_and_the_last_used_ones(monkeypatch):
    monkeypatch.setattr(page_tables, "MAX_PAGE_TABLES", 3)
    cache = PageTableCache()
    kept = {n: tables_of(cache, n) for n in (1, 2, 3)}
    for n, tables in kept.items():
        tables["filled"] = n
    assert all(tables_of(cache, n) is kept[n] for n in (2, 3, 1))
    assert tables_of(cache, 4) == {}  # 2 was used longest ago
    assert all(tables_of(cache, n) is kept[n] for n in (3, 1))
    assert tables_of(cache, 2) == {}


def test_every_part_of_the_key_has_tables_of_its_own():
    cache = PageTableCache()
    keys = [
        (FULL, 2, 16, CPU),
        (FULL, 4, 16, CPU),
        (FULL, 2, 8, CPU),
        (FULL, 2, 16, torch.device("meta")),
        (DepthSchedule(4, 3, 2, 1), 2, 16, CPU),
    ]
    tables = [cache.get(*key) for key in keys]
    assert len({id(table) for table in tables}) == len(keys)
    assert all(cache.get(*key) is table for key, table in zip(keys, tables, strict=True))
