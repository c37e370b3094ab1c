"""The use of a VQ-VAE's codes by the keys against collapse."""

import json

import pytest

from benchmarks import code_use


def test_a_row_shows_keys_and_use():
    rows = [
        {"options": {"revive-every": "0", "kmeans": "10"}, "steps": 75, "error": 0.03172,
         "codes_used": [0.054, 0.5, 1.0], "codes_perplexity": [1.23, 9.0, 47.06]},
        {"options": {}, "steps": 75, "error": 0.03, "codes_used": [0.1], "codes_perplexity": [2.0]},
    ]  # fmt: skip
    lines = code_use.lines(rows)
    assert "| `revive-every 0`, `kmeans 10` | 5 50 100 | 1.2 9.0 47.1 | 0.0317 |" in lines
    assert "| none: the recipe's own | 10 | 2.0 | 0.0300 |" in lines


@pytest.mark.nightly  # a training of a few seconds
def test_the_use_of_the_codes_is_that_of_the_last_evaluation(tmp_path, capsys):
    (row,) = code_use.measure(tmp_path / "runs", 1, ({"scale-dropout": "0"},))
    last = json.loads((tmp_path / "runs" / "0" / "vae-metrics.jsonl").read_text().splitlines()[-1])
    assert row["steps"] == last["step"] > 0
    assert row["error"] == last["held_out"]["reconstruction"] > 0
    assert len(row["codes_used"]) == len(row["codes_perplexity"]) == 6
    assert all(0 < share <= 1 for share in row["codes_used"])
    assert code_use.main(["--out", str(tmp_path / "no"), "--epochs", "-1"]) == 1
    assert "code_use: the training of" in capsys.readouterr().err
