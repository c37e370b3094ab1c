"""A lock that keeps the capture of a CUDA graph and the timing of a kernel apart in one process.

Timing synchronises the device, which is illegal while a stream is being captured and invalidates
the capture.
"""

from __future__ import annotations

from threading import Lock

# Held while a graph is captured, and while a kernel is timed.
DEVICE = Lock()
