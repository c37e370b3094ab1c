"""Launchers around attention libraries that the user has installed: flash-attn, FlashInfer, torch's
FlexAttention. They take the same tensors as the kernels written here; no page is copied.
"""
