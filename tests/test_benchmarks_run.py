"""The kernel benchmarks run, check what they time, and write what the page and the verdict read."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import Session
from benchmarks.harness import Contest, Replay, near, record, run
from variant.bench.alternate import Samples
from variant.bench.limits import Limits

ROOT = Path(__file__).parent.parent
OPS = {
    "adaln_modulate",
    "block_causal_attention",
    "gated_residual_adaln",
    "paged_attention",
    "qk_norm_append_paged_kv",
    "sample_tokens",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result file of a quick run."""
    out = tmp_path_factory.mktemp("bench") / "quick.json"
    # Inside a worker of pytest-xdist, pytest-benchmark would time nothing.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-p", "no:cacheprovider",
         "-p", "no:randomly", f"--benchmark-json={out}"],
        cwd=ROOT, env=outside, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_every_op_is_timed_beside_its_peer(quick):
    infos = [one["extra_info"] for one in quick["benchmarks"]]
    assert {info["op"] for info in infos} == OPS
    for info in infos:
        if info["contender"] == info["peer"]:
            assert info["ratio_to_peer"] == 1
            assert not info["ours"]
        assert info["ratio_to_peer"] > 0
        assert info["share_of_limit"] > 0
        assert info["median"] > 0
        assert info["flop"] > 0 or info["bound"] == "memory"
        assert info["bytes"] > 0
    ours = {info["op"] for info in infos if info["ours"] and info["contender"] == "cpu"}
    assert ours == OPS
    groups = {}
    for one in quick["benchmarks"]:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["contender"])
    for group, contenders in groups.items():
        assert {"cpu", "op", "reference"} < contenders, group


def test_pytest_benchmark_shows_the_samples_that_took_turns(quick):
    for one in quick["benchmarks"]:
        assert one["stats"]["median"] == pytest.approx(one["extra_info"]["median"], rel=1e-6)
        assert one["stats"]["rounds"] == one["extra_info"]["rounds"]


def test_a_result_file_says_where_it_was_measured_and_on_what(quick):
    assert quick["format"] == "variant-kernel-bench-1"
    assert quick["quick"] is True
    assert quick["environment"]["isa"]
    assert "pytest benchmarks --quick" in quick["environment"]["command"]
    assert set(quick["limits"]["cpu"]) == {"start", "end", "drift"}
    assert set(quick["machine_info"]) == {"cpu"}
    assert set(quick["commit_info"]) & {"project", "branch"} == set()
    assert str(ROOT) not in json.dumps(quick)


def test_plain_pytest_collects_no_benchmark():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    assert settings["ini_options"]["testpaths"] == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))


# --- the harness --------------------------------------------------------------------------------


def contest(wrong=0.0):
    x = torch.linspace(0, 1, 64)
    exact, plain = x.double().exp(), x.exp()
    return Contest(
        shape={},
        flop=8.0,
        moved=40.0,
        calls={"cpu": lambda: x.exp() + wrong, "peer": lambda: x.exp()},
        peer="peer",
        ours=("cpu",),
        check=near([exact], [plain], ours=("cpu",)),
    )


def test_a_wrong_answer_is_named_and_not_timed():
    samples, wrong = run(contest(wrong=0.01), device="cpu", quick=True)
    assert set(samples) == {"peer"}
    assert re.match(r"cpu, result 0: error 0\.01, allowed", str(wrong["cpu"]))
    samples, wrong = run(contest(), device="cpu", quick=True)
    assert set(samples) == {"cpu", "peer"}
    assert not wrong


def test_nothing_is_timed_beside_a_wrong_peer():
    some = contest(wrong=0.01)
    some.peer = "cpu"
    with pytest.raises(AssertionError, match=r"cpu, result 0: error 0\.01"):
        run(some, device="cpu", quick=True)


def test_a_record_relates_time_to_work_peer_and_limit():
    class Case:
        name, dtype = "one", "float32"

    found = record(
        "exp", Case(), "cpu", contest(),
        {"cpu": Samples(1, {0: 2.0, 1: 4.0}), "peer": Samples(1, {0: 6.0, 1: 12.0})},
        "cpu", Limits({"float32": 16.0}, 20.0),
    )  # fmt: skip
    assert (found["median"], found["peer_median"], found["ratio_to_peer"]) == (3, 9, 3)
    assert (found["bound"], found["limit_seconds"]) == ("memory", 2)
    assert found["share_of_limit"] == pytest.approx(2 / 3)
    assert found["achieved_flops"] == pytest.approx(8 / 3)
    assert json.loads(json.dumps(found))["ours"] is True


def test_the_replaying_clock_shows_each_sample():
    clock = Replay()
    clock.load(Samples(1, {0: 0.5, 3: 0.25}))
    times = [clock() for _ in range(4)]
    assert [times[1] - times[0], times[3] - times[2]] == [0.5, 0.25]


def test_a_file_that_has_had_its_seconds_begins_no_new_case_and_the_next_file_has_its_own():
    session = Session(quick=True, seconds=0.0)
    for file in ("bench_a.py", "bench_b.py"):
        session.spent(file)
        time.sleep(0.01)
        assert session.spent(file)
    patient = Session(quick=True)
    assert not patient.spent("bench_a.py")
    assert not patient.spent("bench_a.py")
