"""A process-wide lock between the capture of CUDA graphs and the timing of kernels.

Timing synchronises the device, which is illegal while a stream is being captured and invalidates
the capture. Hold this lock for either.
"""

from __future__ import annotations

from threading import Lock

CAPTURE_OR_TIMING = Lock()
