"""Page tables on the device, kept for the next batch of the same schedule and size."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock

import torch

from variant_kernels import DepthSchedule, ScaleLayout
from variant_kernels.kv_cache import PageTables

# Schedules and batch sizes whose page tables are kept.
MAX_PAGE_TABLES = 16


class PageTableCache:
    """Page tables by layout, schedule, batch size, page size and device.

    The least recently used go first. The layout: an engine may get models of another one.

    A cache of keys and values fills the tables in as it reaches each scale, and finds them there
    in the next batch: they are built and copied to the device once.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, PageTables] = {}
        self._lock = Lock()

    def get(
        self,
        layout: ScaleLayout,
        schedule: DepthSchedule,
        num_sequences: int,
        page_size: int,
        device: torch.device,
    ) -> PageTables:
        """The tables of that key; empty at the first call."""
        key = (layout, schedule.layers, num_sequences, page_size, device)
        with self._lock:
            tables = self._tables.pop(key, {})
            self._tables[key] = tables  # moved to the end
            while len(self._tables) > MAX_PAGE_TABLES:
                del self._tables[next(iter(self._tables))]
        return tables
