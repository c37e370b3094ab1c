"""Settings that differ between a run and its continuation, as messages name them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

# Characters of a value in a message, and those before the place where two long values differ.
SHOWN_CHARACTERS = 60
LEAD = 20

# (dotted key, old value, new value).
Difference = tuple[str, Any, Any]


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[Difference]:
    """Every value that differs between two dictionaries; in a nested one, its own values."""
    for key in {**old, **new}:
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{name}.")
        elif before != after:
            yield name, before, after


def change_texts(changes: Iterable[Difference]) -> list[str]:
    """Each as ``seed 0 -> 1``; of long values, the part in which they begin to differ."""
    return [f"{key} {' -> '.join(_shown(before, after))}" for key, before, after in changes]


def listed(texts: Sequence[str], longest: int | None = None, separator: str = ", ") -> str:
    """The first ``longest`` texts, and how many follow; None is all."""
    more = 0 if longest is None else max(0, len(texts) - longest)
    return separator.join(texts[: len(texts) - more]) + (f" and {more} more" if more else "")


def _shown(*values: object) -> list[str]:
    texts = [repr(value) for value in values]
    letters = zip(*texts, strict=False)  # their beginnings: one may be longer
    same = sum(1 for _ in takewhile(lambda pair: len(set(pair)) == 1, letters))
    is_seen = same <= SHOWN_CHARACTERS - LEAD or max(map(len, texts)) <= SHOWN_CHARACTERS
    start = 0 if is_seen else same - LEAD
    end = start + SHOWN_CHARACTERS
    return [
        f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"
        for text in texts
    ]
