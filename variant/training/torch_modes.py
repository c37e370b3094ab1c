"""Modes of torch that belong to the thread or to the process: a training has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from variant.models.placement import usual_defaults

AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def modes_of_a_new_process() -> Iterator[None]:
    """Modes as a new process has them; those of the caller come back at the end of the block.

    Gradients are recorded, outside ``torch.inference_mode()`` and ``torch.autocast``; new tensors
    are float32, on the CPU. A training in a notebook is then that of the command line.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(usual_defaults())
        yield
