"""Measuring: the machine, its limits, alternating timings, and the engine against its peers."""
