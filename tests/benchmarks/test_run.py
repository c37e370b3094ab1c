"""The kernel benchmarks run, check the results of what they time, and write result files."""

import importlib
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from unrecorded import unrecorded

from benchmarks.conftest import Session
from benchmarks.harness import QUICK_ROUNDS, Comparison, Replay, near, record, run
from benchmarks.results import KERNELS, kernel_timings
from variant.bench.interleaved import Samples
from variant.bench.roofline import Peaks
from variant_kernels import ops

ROOT = Path(__file__).parents[2]
OPS = {
    "adaln_modulate",
    "block_causal_attention",
    "gated_residual_adaln",
    "group_norm_silu",
    "paged_attention",
    "qk_norm_append_paged_kv",
    "sample_tokens",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The files of a quick run: our result file and pytest-benchmark's own."""
    folder = tmp_path_factory.mktemp("bench")
    ours, own = folder / "quick.json", folder / "own.json"
    # Inside a worker of pytest-xdist, pytest-benchmark would time nothing.
    outside = {k: v for k, v in unrecorded().items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-p", "no:cacheprovider",
         "-p", "no:randomly", "--json", ours, f"--benchmark-json={own}"],
        cwd=ROOT, env=outside, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"wrote {ours}" in done.stdout
    return ours.read_text(), json.loads(own.read_text())


def test_every_op_is_timed_beside_its_peer(quick):
    data = json.loads(quick[0])
    rows = kernel_timings(data)
    assert {row["op"] for row in rows} == OPS
    for row in rows:
        if row["implementation"] == row["peer"]:
            assert row["ratio_to_peer"] == 1
            assert not row["ours"]
        assert row["ratio_to_peer"] > 0
        assert row["fraction_of_limit"] > 0
        assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
        if row["implementation"] in ("cpu", row["peer"]):
            assert row["rounds"] == QUICK_ROUNDS
        assert row["flop"] > 0 or row["bound"] == "memory"
        assert row["bytes"] > 0
    ours = {row["op"] for row in rows if row["ours"] and row["implementation"] == "cpu"}
    assert ours == OPS
    for case in data["cases"]:
        assert {"cpu", "op", "reference"} < set(case["implementations"]), case["case"]


def test_each_case_is_one_line(quick):
    text = quick[0]
    data = json.loads(text)
    assert len({(case["op"], case["device"], case["case"]) for case in data["cases"]}) == len(
        data["cases"]
    )
    assert text.count("\n") == len(data["cases"]) + 8


def test_pytest_benchmark_shows_the_same_medians(quick):
    ours, own = json.loads(quick[0]), quick[1]
    medians = {
        f"test_{row['op']}[{row['device']}-{row['case']}-{row['implementation']}]": row["median"]
        for row in kernel_timings(ours)
    }
    shown = {one["name"]: one["stats"]["median"] for one in own["benchmarks"]}
    assert shown == pytest.approx(medians, rel=1e-6)


def test_a_result_file_describes_the_machine_and_the_command(quick):
    data = json.loads(quick[0])
    assert data["format"] == KERNELS
    assert data["quick"] is True
    assert data["environment"]["isa"]
    assert "pytest benchmarks --quick" in data["environment"]["command"]
    assert set(data["limits"]["cpu"]) == {"start", "end", "drift"}
    assert str(ROOT) not in quick[0]


def test_plain_pytest_collects_no_benchmark():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    assert settings["ini_options"]["testpaths"] == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))


def test_every_benchmark_reports_all_backends_of_its_ops():
    for stem, names in {
        "adaln": ("adaln_modulate", "gated_residual_adaln"),
        "block_causal_attention": ("block_causal_attention",),
        "paged_attention": ("paged_attention",),
        "qk_norm_append_paged_kv": ("qk_norm_append_paged_kv",),
        "sample_tokens": ("sample_tokens",),
    }.items():
        peers = importlib.import_module(f"benchmarks.bench_{stem}").IMPLEMENTATIONS
        assert len(set(peers)) == len(peers)
        for op in names:
            assert set(ops.tables()[op]) <= set(peers), op


# --- the harness --------------------------------------------------------------------------------


def comparison(wrong=0.0):
    x = torch.linspace(0, 1, 64)
    exact, plain = x.double().exp(), x.exp()
    return Comparison(
        shape={},
        flop=8.0,
        moved=40.0,
        calls={"cpu": lambda: x.exp() + wrong, "peer": lambda: x.exp()},
        peer="peer",
        ours=("cpu",),
        check=near([exact], [plain], ours=("cpu",)),
    )


def test_a_wrong_answer_is_named_and_not_timed():
    samples, wrong = run(comparison(wrong=0.01), device="cpu", quick=True)
    assert set(samples) == {"peer"}
    assert re.match(r"cpu, result 0: error 0\.01, allowed", str(wrong["cpu"]))
    samples, wrong = run(comparison(), device="cpu", quick=True)
    assert set(samples) == {"cpu", "peer"}
    assert not wrong


def test_nothing_is_timed_beside_a_wrong_peer():
    some = comparison(wrong=0.01)
    some.peer = "cpu"
    with pytest.raises(AssertionError, match=r"cpu, result 0: error 0\.01"):
        run(some, device="cpu", quick=True)


def test_a_record_relates_time_to_work_peer_and_limit():
    class Case:
        name, dtype = "one", "float32"

    case = record(
        "exp", Case(), "cpu", comparison(),
        {"cpu": Samples(1, {0: 2.0, 1: 4.0}), "peer": Samples(1, {0: 6.0, 1: 12.0})},
        Peaks({"float32": 16.0}, 20.0),
    )  # fmt: skip
    assert (case["bound"], case["limit_seconds"]) == ("memory", 2)
    cpu, peer = kernel_timings({"cases": [json.loads(json.dumps(case))]})
    assert (cpu["median"], cpu["peer_median"], cpu["ratio_to_peer"]) == (3, 9, 3)
    assert (cpu["quartiles"], cpu["rounds"]) == ([2.5, 3.5], 2)
    assert cpu["fraction_of_limit"] == pytest.approx(2 / 3)
    assert cpu["achieved_flops"] == pytest.approx(8 / 3)
    assert cpu["achieved_bandwidth"] == pytest.approx(40 / 3)
    assert (cpu["ours"], peer["ours"], peer["ratio_to_peer"]) == (True, False, 1)


def test_the_replaying_clock_shows_each_sample():
    clock = Replay()
    clock.load(Samples(1, {0: 0.5, 3: 0.25}))
    times = [clock() for _ in range(4)]
    assert [times[1] - times[0], times[3] - times[2]] == [0.5, 0.25]


def test_each_bench_file_starts_cases_for_its_own_seconds():
    session = Session(quick=True, seconds=0.0)
    for file in ("bench_a.py", "bench_b.py"):
        assert not session.out_of_time(file)
        time.sleep(0.01)
        assert session.out_of_time(file)
    unlimited = Session(quick=True)
    assert not unlimited.out_of_time("bench_a.py")
    assert not unlimited.out_of_time("bench_a.py")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda p: p.stem
)
def test_cases_of_one_device_have_different_names(path):
    """A second case of the same name would not be timed."""
    module = importlib.import_module(f"benchmarks.{path.stem}")
    names = [(device, case.name) for case in module.CASES for device in case.devices]
    assert len(set(names)) == len(names)
