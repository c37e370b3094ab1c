"""Tests that need a GPU: marked so, and skipped with the reason where there is none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    """cuDNN's own choice for float32 is TF32, whose 10 bits no float32 tolerance allows for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
