"""What must not happen at once in one process: capturing a CUDA graph and timing a kernel.

A stopwatch waits for the whole device. CUDA refuses that while any stream is being captured, and
the capture is lost with it.
"""

from __future__ import annotations

from threading import Lock

# Held while a graph is captured, and while a kernel is timed.
DEVICE = Lock()
