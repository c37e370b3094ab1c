"""Shared by all tests: the helpers beside them can be imported, and torch uses two threads."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "kernels"))
torch.set_num_threads(2)
