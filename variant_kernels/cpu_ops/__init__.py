"""CPU launchers: torch tensors in, pointers and strides to the C++ kernels."""
