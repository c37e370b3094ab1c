"""The committed result files: their size, and medians and quartiles for every case."""

import json
from pathlib import Path

import pytest

from benchmarks.results import DROPIN, ENGINE, KERNELS, read
from variant.bench.result_file import result_text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))
MAX_BYTES, MAX_LINES = 400_000, 5_000
# The longest list of numbers that is not raw samples: one time for each scale.
MAX_NUMBERS = 10

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def objects(value):
    """Every JSON object inside a value, itself included."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from objects(item)


def timings(result):
    """(case, object with median and quartiles) of every timing that a file must hold."""
    data = result.data
    if result.kind == KERNELS:
        for case in data["cases"]:
            for name, timing in case["implementations"].items():
                yield (case["op"], case["case"], name), timing
    if result.kind == DROPIN:
        for run in data["results"]:
            for name, timing in run["implementations"].items():
                yield (run["dtype"], name), {"rounds": run["rounds"], **timing}
    if result.kind == ENGINE:
        for row in data["rows"] + data["decoder"]:
            case = row["dtype"], row["batch"], row.get("depth")
            yield (*case, "ours"), row["ms"]
            for peer in row["against"]:
                yield (*case, peer["peer"]), peer["ms"]


def test_the_folder_is_small():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert sum(path.read_bytes().count(b"\n") for path in files) < MAX_LINES


@every_file
def test_a_file_is_as_its_writer_writes_it(path):
    text = path.read_text()
    assert text == result_text(json.loads(text))


@every_file
def test_every_case_has_a_median_and_quartiles(path):
    result = read(path)
    by_case = dict(timings(result))
    assert by_case or result.kind not in (KERNELS, ENGINE, DROPIN)
    for case, timing in by_case.items():
        low, high = timing["quartiles"]
        assert 0 < low <= timing["median"] <= high, case
        assert timing["rounds"] >= 1, case


@every_file
def test_no_file_holds_raw_samples(path):
    for one in objects(json.loads(path.read_text())):
        assert "quartiles" in one or "median" not in one, one
        assert not {"samples", "seconds", "data"} & set(one), one
        for name, value in one.items():
            if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
                assert len(value) <= MAX_NUMBERS, name


@every_file
def test_a_file_names_machine_command_and_commit(path):
    environment = read(path).environment
    assert {"cpu", "isa", "threads", "torch", "date", "commit", "dirty"} <= set(environment)
    assert environment["command"]
    assert len(environment["commit"]) == 40
