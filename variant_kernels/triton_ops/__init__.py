"""Triton kernels, one file for each stem of ``variant_kernels.ops``: kernels, then launchers."""
