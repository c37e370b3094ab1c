"""Shared by all tests: the helpers beside them can be imported, and torch uses two threads."""

import os
import sys
from pathlib import Path

# Set before torch loads OpenMP. Idle threads wait for work in a loop otherwise, which takes the
# processor from the other test processes: some kernel and model tests took 55 s of CPU that take
# 23 s so, with two threads as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "kernels"))
torch.set_num_threads(2)
