"""A run's tuning records become the package's choices. Every record here is SYNTHETIC."""

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from dataclasses import asdict
from types import SimpleNamespace

import torch

from benchmarks import shipped_choices
from benchmarks.prediction.constants import constants
from benchmarks.results import RUN
from variant_kernels.triton_ops import paged_attention_configs as paged
from variant_kernels.triton_ops import tuning
from variant_kernels.triton_ops.tuning import Config, Key

FORWARD = "block_causal_attention_forward_kernel"
SAME, SIZES = ["64", "2", "no qk_norm"], [680, 2048]
CANDIDATES = shipped_choices.table_of(FORWARD, SAME, SIZES)


def record(times, **more):
    """What the tuner writes; milliseconds in the order of the candidates."""
    return {
        "kernel": FORWARD, "source": "hash", "triton": "3.6.0", "torch": "2.11.0",
        "device": "SYNTHETIC H200", "family": "sm90", "same": SAME, "sizes": SIZES,
        "detail": ["torch.bfloat16"], "configs": [asdict(config) for config in CANDIDATES],
        "milliseconds": times, "winner": asdict(CANDIDATES[0]), **more,
    }  # fmt: skip


def run_of(*found):
    results = [{"kind": "tuning", "name": str(i), "data": one} for i, one in enumerate(found)]
    return {"format": RUN, "SYNTHETIC": True, "results": [*results, {"kind": "tests", "data": {}}]}


def entries_of(path):
    return {shipped_choices._shape(one): one for one in json.loads(path.read_text())["entries"]}


def test_the_shipped_file_is_what_the_command_writes():
    """After a change of a kernel's machine code: ``python -m benchmarks.shipped_choices``."""
    old = json.loads(tuning.SHIPPED.read_text())["entries"]
    guessed = list(shipped_choices.predicted(constants()))
    expected = shipped_choices.text(shipped_choices.merged(old, [], guessed))
    assert tuning.SHIPPED.read_text() == expected


def test_a_run_replaces_predicted_choices_and_the_tuner_takes_them(tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "results.json", tmp_path / "shipped.json"
    slowest_first = [4.0 - 0.5 * index for index in range(len(CANDIDATES))]
    run.write_text(json.dumps(run_of(record(slowest_first))))
    before = entries_of(tuning.SHIPPED)
    assert shipped_choices.main(["--run", str(run), "--out", str(out)]) == 0
    after = entries_of(out)
    assert before.keys() == after.keys()
    changed = [shape for shape, entry in after.items() if entry != before[shape]]
    assert changed == [(FORWARD, "sm90", tuple(SAME), tuple(SIZES))]
    entry = after[changed[0]]
    assert Config(**entry["config"]) == CANDIDATES[-1]
    assert entry["source"] == "measured on SYNTHETIC H200, torch 2.11.0, Triton 3.6.0"
    assert "1 of them from this run" in capsys.readouterr().out

    kernel = SimpleNamespace(__name__=FORWARD, cache_key="other")
    monkeypatch.setattr(tuning, "SHIPPED", out)
    monkeypatch.setattr(tuning, "family", lambda device: "sm90")
    monkeypatch.setenv("VARIANT_CACHE_DIR", str(tmp_path / "none"))
    tuning._shipped.cache_clear()
    key = Key((64, 2, "no qk_norm"), (700, 2048))
    assert tuning._nearest(kernel, CANDIDATES, key, torch.device("cpu")) == CANDIDATES[-1]
    tuning._shipped.cache_clear()


def test_a_measured_choice_stays_until_that_shape_is_measured_again(tmp_path):
    guessed = list(shipped_choices.predicted(constants()))
    times = [2.0, 1.0, *[3.0] * (len(CANDIDATES) - 2)]
    first = shipped_choices.measured([record(times)])
    once = shipped_choices.merged(guessed, first, guessed)
    assert once[0] == first[0], "measured ones come first"
    assert shipped_choices.merged(once, [], guessed) == once
    second = shipped_choices.measured([record([1.0, 2.0, *times[2:]])])
    twice = shipped_choices.merged(once, second, guessed)
    assert twice[0] == second[0]
    assert len(twice) == len(once) == len(guessed)


def test_of_several_records_of_a_shape_the_one_that_is_never_slow_wins():
    rest = [9.0] * (len(CANDIDATES) - 3)
    found = [
        record([1.0, 1.1, 4.0, *rest], detail=["torch.bfloat16"]),
        record([None, 1.2, 1.0, *rest], detail=["torch.float16"]),  # the first did not fit
    ]
    (entry,) = shipped_choices.measured(found)
    assert Config(**entry["config"]) == CANDIDATES[1]


def test_a_folder_of_the_tuner_does_as_well(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(record([1.0] * len(CANDIDATES))))
    assert len(shipped_choices.measured(shipped_choices.records(tmp_path))) == 1


@pytest.mark.parametrize("queries", [16, 64, 256])
def test_choices_for_consecutive_pages_have_their_own_candidates(queries):
    """Those of scattered pages have stages for page numbers; the engine's would match none."""
    same, sizes = ["64", "2", "2"], [queries, 4096, 16]
    both = [
        shipped_choices.table_of("paged_attention_kernel", [*same, pages], sizes)
        for pages in (paged.CONSECUTIVE, paged.SCATTERED)
    ]
    assert not set(both[0]) & set(both[1])


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    run, out = tmp_path / "results.json", tmp_path / "shipped.json"
    for data, words in (
        (run_of(), "has no tuning record"),
        (run_of(record([1.0], configs=[asdict(Config(48, 16, 1, 1))])), "is no candidate now"),
    ):
        run.write_text(json.dumps(data))
        assert shipped_choices.main(["--run", str(run), "--out", str(out)]) == 1
        assert words in capsys.readouterr().err
        assert not out.exists()
