"""CUDA C++ launchers: one module per op, the same keyword arguments as the other backends."""
