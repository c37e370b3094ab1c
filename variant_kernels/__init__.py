"""Kernels, schedules and caches for visual autoregressive models."""

__version__ = "0.1.0"
