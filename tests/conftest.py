"""Shared by all tests: the helpers beside them can be imported, and torch uses two threads."""

import sys
from pathlib import Path

import pytest
import torch

from variant_kernels.ops.registry import forget_signatures

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "kernels"))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """A test may replace what a choice depends on: no other test sees its verdicts."""
    forget_signatures()
    yield
    forget_signatures()
