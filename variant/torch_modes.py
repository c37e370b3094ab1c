"""Modes of torch that belong to the thread or to the process: work of its own has none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def modes_of_a_new_process() -> Iterator[None]:
    """Modes as a new process has them; those of the caller come back at the end of the block.

    Gradients are recorded, outside ``torch.inference_mode()`` and ``torch.autocast``; new tensors
    are float32, on the CPU. A training or a measurement in a notebook is then that of the command
    line.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(usual_defaults())
        yield


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Within the block new tensors are float32 and on the CPU, whatever the caller's defaults are.

    For work that makes models of its own, as a training. torch's default dtype is that of all
    threads.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype == torch.float32 and device.type == "cpu":
        yield  # a device in a block would cost time at every call of torch
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
