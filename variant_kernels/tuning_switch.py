"""Whether kernels may be timed to choose their block sizes: not inside a user's request.

Timing takes up to a second for each candidate of each new shape. It happens within
:func:`timing_allowed`, which ``variant warm``, training and benchmarks enter, or in a process with
``VARIANT_TUNE=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_inside = 0  # blocks, of all threads: a backward pass runs in a thread of its own


@contextmanager
def timing_allowed() -> Iterator[None]:
    """Shapes that are new in this process, in any thread, are timed within the block."""
    global _inside
    with _lock:
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1


def may_time() -> bool:
    """Whether a new shape may be timed now; ``VARIANT_AUTOTUNE=0`` forbids it everywhere."""
    if os.environ.get("VARIANT_AUTOTUNE", "1") == "0":
        return False
    return _inside > 0 or os.environ.get("VARIANT_TUNE", "0") == "1"
