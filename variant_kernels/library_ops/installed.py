"""Which version of flash-attn is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class FlashAttention:
    """An installed flash-attn: its module, and its name for a page table."""

    version: int
    module: str
    table_argument: str
    page_multiple: int


# Version 2 reads pages of any multiple of 256 tokens, version 3 (sm_90 only) of any number.
FLASH_VERSIONS = (
    FlashAttention(3, "flash_attn_interface", "page_table", 1),
    FlashAttention(2, "flash_attn", "block_table", 256),
)


@cache
def find_flash(device: torch.device | str) -> FlashAttention | None:
    """The newest installed flash-attn that runs on a device, or None."""
    for flash in FLASH_VERSIONS:
        if flash.version == 3 and torch.cuda.get_device_capability(device)[0] != 9:
            continue
        if importlib.util.find_spec(flash.module) is not None:
            return flash
    return None
