"""One thread at a time patches, unpatches or compares a model; other models are free meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from variant_kernels.integrations.runtime import PatchError

# Seconds. Short runs call hooks, which may wait for a thread that waits here: nobody waits forever.
PATIENCE = 60.0


class _Claims:
    """Which thread has which objects now.

    A thread takes all objects at once or waits and has none of them, so that no two wait for each
    other. A claim keeps its objects alive: the id of a freed one could be that of another.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.held: list[tuple[int, dict[int, Any]]] = []

    def are_free(self, objects: dict[int, Any]) -> bool:
        """Whether no other thread has one of them; a thread may claim again what it has."""
        own = threading.get_ident()
        return all(
            thread == own or claimed.keys().isdisjoint(objects) for thread, claimed in self.held
        )


_claims = _Claims()


def _after_fork() -> None:
    """Keep the claims of the thread that forked: it is in their blocks here too, and alone."""
    global _claims
    own, before = threading.get_ident(), _claims
    _claims = _Claims()
    _claims.held = [claim for claim in before.held if claim[0] == own]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def one_thread(
    op: str, objects: Iterable[Any], error: type[Exception] = PatchError
) -> Iterator[None]:
    """Wait until no other thread is in such a block with one of these objects, and keep it to them.

    Short runs use the caches of a model's layers, and what they restore afterwards would undo the
    class swaps of another thread. Models may share layers, so the objects are all their modules.

    Raises:
        PatchError, or the other ``error``: that takes longer than a minute.
    """
    own = {id(one): one for one in objects}
    claim = threading.get_ident(), own
    with _claims.changed:
        if not _claims.changed.wait_for(lambda: _claims.are_free(own), PATIENCE):
            raise error(
                f"{op}: another thread has been patching, unpatching or comparing this model, or "
                f"one that shares modules with it, for {PATIENCE:g} s; let it end first (a hook of "
                "its model may be waiting for this thread)"
            )
        _claims.held.append(claim)
    try:
        yield
    finally:
        with _claims.changed:
            _claims.held = [other for other in _claims.held if other is not claim]
            _claims.changed.notify_all()
