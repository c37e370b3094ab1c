"""The pages of each layer's K/V: consecutive ones wherever the plan's peak allows.

All births and deaths are known before the first token, so this is offline allocation in address and
time. Layers are placed from the last to die to the first, each at the lowest address where all its
pages are free from their birth on. A layer that dies later thus grows into the pages of one that
has died. Sets of pages are the bits of integers: one operation covers the slab.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PageLifetimes:
    """Steps at which the pages of one layer are born, in the order of its tokens; the last step.

    A page is occupied from its birth to ``dies``, both included.
    """

    births: tuple[int, ...]
    dies: int


def place_pages(
    layers: Mapping[int, PageLifetimes], num_pages: int, num_steps: int
) -> dict[int, tuple[int | None, ...]]:
    """A page of the slab for every page of every layer, no two of which are in use at one step.

    A layer whose pages find no consecutive place gets single ones; None where no page is free for
    the whole lifetime.
    """
    occupied = [0] * num_steps
    placed: dict[int, tuple[int | None, ...]] = {}
    scattered: list[int] = []
    for layer in sorted(layers, key=lambda layer: -layers[layer].dies):
        births, dies = layers[layer].births, layers[layer].dies
        first = _take(occupied, births, dies, num_pages)
        if first is None:
            scattered.append(layer)
        else:
            placed[layer] = tuple(range(first, first + len(births)))
    for layer in scattered:
        births, dies = layers[layer].births, layers[layer].dies
        placed[layer] = tuple(_take(occupied, (birth,), dies, num_pages) for birth in births)
    return placed


def _take(occupied: list[int], births: Sequence[int], dies: int, num_pages: int) -> int | None:
    """Occupy consecutive pages with these births; the first of them, None if there is no place."""
    born_by = {birth: index + 1 for index, birth in enumerate(births)}
    slab = (1 << num_pages) - 1
    starts, busy, step, end = slab, 0, dies + 1, len(births)
    # Births never fall from one page to the next: from the last page on, `busy` only grows.
    for birth in reversed(born_by):
        while step > birth:
            step -= 1
            busy |= occupied[step]
        offset = bisect_left(births, birth, hi=end)
        starts &= _runs(slab & ~busy, end - offset) >> offset
        end = offset
    if not starts:
        return None
    first = (starts & -starts).bit_length() - 1
    born = 0
    for step in range(births[0], dies + 1):
        born = born_by.get(step, born)
        occupied[step] |= (1 << born) - 1 << first
    return first


def _runs(free: int, length: int) -> int:
    """The pages at which ``length`` consecutive pages of ``free`` begin."""
    done = 1
    while done < length:
        more = min(done, length - done)
        free &= free >> more
        done += more
    return free
