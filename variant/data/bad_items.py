"""Images and shards that cannot be read: skipped, counted and named, up to a share of the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from variant.errors import UserError
from variant.models.ranges import Count
from variant_kernels.wording import counted


@dataclass(frozen=True)
class BadItem:
    """One file that cannot be read.

    name: of the file.  reason: the message, which names it too.  samples: that are lost with it.
    """

    name: str
    reason: str
    samples: Count = 1


class BadItems:
    """The bad files of a run, each counted once; the process that finds one names it by a warning.

    Workers that read the data report theirs in ``Samples.bad``; the process that trains adds them.
    Several such processes tell each other of theirs: :meth:`take_unshared`, :meth:`add_found`.

    Args:
        total: samples of the data.  share: of them that may be bad.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total, self.share = total, share
        self.items: dict[str, BadItem] = {}
        self.unshared: list[BadItem] = []

    @property
    def count(self) -> int:
        """Samples that were lost so far."""
        return sum(item.samples for item in self.items.values())

    def add(self, items: Iterable[BadItem]) -> None:
        """Count files that this process could not read.

        Raises:
            UserError: more samples are lost than the share.
        """
        for item in items:
            if item.name in self.items:
                continue
            self.items[item.name] = item
            self.unshared.append(item)
            self._check(item)
            warnings.warn(
                f"{item.reason}. Skipped: {self.count:,} of {counted(self.total, 'sample')} so far",
                RuntimeWarning,
                stacklevel=2,
            )

    def take_unshared(self) -> list[BadItem]:
        """Files that :meth:`add` has counted since the last call."""
        taken, self.unshared = self.unshared, []
        return taken

    def add_found(self, items: Iterable[BadItem]) -> None:
        """Count files that any process could not read, and that were named there.

        Raises:
            UserError: more samples are lost than the share.
        """
        last = None
        for last in items:
            self.items.setdefault(last.name, last)
        if last is not None:
            self._check(last)

    def _check(self, last: BadItem) -> None:
        if self.count > self.share * self.total:
            raise UserError(
                f"{last.reason}. {self.count:,} of {counted(self.total, 'sample')} cannot be "
                "read, more "
                f"than data.max_bad = {self.share:g} allows; mend or remove the files, or "
                "raise it"
            )
