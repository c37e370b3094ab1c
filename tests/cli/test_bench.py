"""``variant bench``: what it prints before and while it measures; results in tests/bench."""

import json

import pytest

from variant.bench.roofline import Peaks
from variant.cli import bench as module


@pytest.fixture
def quick(monkeypatch):
    """Peak rates without a measurement; the dtypes that were asked for."""
    asked = []

    def measure_peaks(device, dtypes):
        asked.append([str(dtype) for dtype in dtypes])
        return Peaks({str(dtype).removeprefix("torch."): 1e9 for dtype in dtypes}, 1e9)

    monkeypatch.setattr(module, "measure_peaks", measure_peaks)
    return asked


WORDS = ("bench", "--batch", 1, "--runs", 1, "--depths", 2)


def test_only_the_limits_asked_for_are_measured(model, run, quick):
    code, printed, _ = run(*WORDS, "--model", model, "--dtype", "float32")
    assert code == 0
    assert quick == [["torch.float32"]] * 2
    first, second, third, *_ = printed.splitlines()
    assert first == f"bench: {model}, batch 1, float32, cpu, 1 round"
    assert second == "measuring the machine's peak rates: copying, float32 products"
    assert third.endswith(" samples of generations")


def test_json_on_standard_output_stands_alone(model, run, quick):
    code, printed, error = run(*WORDS, "--model", model, "--json", "-")
    assert code == 0
    result = json.loads(printed)
    assert result["complete"] is True
    assert [row["depth"] for row in result["rows"]] == [2]
    assert error.startswith("bench: ")
    assert "measuring the machine's peak rates" in error
