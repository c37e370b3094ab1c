"""The run on a GPU, rehearsed without one: nothing that it measured is ever lost."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from robustness.forked import option
from unrecorded import unrecorded

from benchmarks.docs_results import page
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import processes, record, runner, steps, unpack
from benchmarks.gpu.__main__ import PACKAGES, main
from benchmarks.gpu.record import Run
from benchmarks.gpu.settings import GPU, REHEARSAL
from benchmarks.gpu.steps import Measurement, Session, Step
from benchmarks.report import main as report
from benchmarks.results import ENGINE, KERNELS, LARGEST, RUN, TRAINING, read_all

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "benchmarks.gpu", "--rehearsal", "--out")
MOST_FILES = 8


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of a whole rehearsal."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = subprocess.run(
        [*COMMAND, str(out)],
        cwd=ROOT,
        env=unrecorded(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return out


def results_of(out):
    return json.loads((out / record.RESULTS).read_text())


def test_every_step_runs_and_is_recorded_with_clocks(rehearsal):
    data = results_of(rehearsal)
    assert data["complete"]
    names = [step.name for step in steps.steps(REHEARSAL) if step.only_after_failure is None]
    assert [(s["name"], s["status"]) for s in data["steps"]] == [(name, "ok") for name in names]
    recorded = {result["step"] for result in data["results"]}
    assert recorded == set(names)
    # nvidia-smi's double reports one rate.
    clocks = [r["clocks"] for r in data["results"] if r["seconds"] > 0.5]
    assert clocks
    assert all(clock["clocks.sm"] == [1980, 1980, 1980] for clock in clocks)
    assert [r["kind"] for r in data["results"] if r["kind"] == "failure"] == []


def test_few_files_come_back_and_the_archive_holds_the_rest(rehearsal):
    files = sorted(path.name for path in rehearsal.iterdir())
    assert files == sorted((record.RESULTS, record.LOG, record.ARCHIVE))
    assert len(files) <= MOST_FILES
    with tarfile.open(rehearsal / record.ARCHIVE) as archive:
        assert "logs/clocks.csv" in archive.getnames()


def test_pages_are_written_from_the_results(rehearsal, tmp_path):
    results = read_all(rehearsal / record.RESULTS)
    assert [r.kind for r in results] == [RUN, ENGINE, KERNELS, TRAINING, LARGEST]
    assert report([str(rehearsal / record.RESULTS), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "One generation, batch 2" in text
    assert "L91-batch1-float32-forward" in text
    digits = json.loads((ROOT / "docs" / "digits.json").read_text())
    with_a_run = page(results, digits)
    assert "## Runs on a GPU" in with_a_run
    assert "no GPU result yet" not in with_a_run
    assert "no GPU result yet" in page([r for r in results if r.kind != RUN], digits)


def test_all_rounds_replace_the_first_and_both_speeds_are_there(rehearsal):
    engine = next(r.data for r in read_all(rehearsal / record.RESULTS) if r.kind == ENGINE)
    rows = {(row["batch"], row["depth"]): row["ms"]["rounds"] for row in engine["rows"]}
    assert rows == {(batch, depth): 2 for batch in (2, 1) for depth in (8, 2)}
    # With the decoder too.
    assert {(row["batch"], row["depth"]) for row in engine["images"]} == set(rows)


def announced_in(out):
    log = out / record.LOG
    text = log.read_text() if log.exists() else ""
    return re.findall(r"^recorded (\S+ \S+ .*)$", text, re.MULTILINE)


def test_what_was_recorded_survives_a_kill_at_any_moment(tmp_path):
    """Every result that the log announces is in the file, whenever the run is killed."""
    chance = random.Random(option("SEED", 0))
    for kill in range(option("GPU_KILLS", 1)):
        out = tmp_path / str(kill)
        process = subprocess.Popen(
            [*COMMAND, str(out), "ceilings", "kernels", "end"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # In the first half of the results, or at any moment.
        wanted, most = (chance.randint(1, 3), 0.5) if kill % 2 == 0 else (0, 8)
        while process.poll() is None and not (
            (out / record.LOG).exists() and len(announced_in(out)) >= wanted
        ):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, most))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)  # the steps end with it
        announced = announced_in(out)
        assert len(announced) >= wanted
        data = results_of(out)
        there = [f"{r['kind']} {r['step']} {r['name']}" for r in data["results"]]
        assert set(announced) <= set(there)
        assert len(there) <= len(set(announced)) + 1
        size = (out / record.LOG).stat().st_size
        time.sleep(0.2)
        assert (out / record.LOG).stat().st_size == size, "a step went on without the run"


class ManyResults(Measurement):
    def measure(self, item):
        began = time.time()
        for number in range(40):
            self.session.add("kernel", f"{item} {number}", {"numbers": [0.5] * 200}, began)


def test_what_was_recorded_survives_twenty_kills(tmp_path):
    """As above, at twenty moments of a run that does nothing but record."""
    with suppress(ImportError):  # as a run does, once for all its steps
        importlib.import_module("variant_kernels.triton_ops.tuning")
    chance = random.Random(option("SEED", 0))
    chosen = [Step(name, ManyResults, ("a", "b", "c"), 60, 60) for name in ("one", "two", "three")]
    seen = set()
    for kill in range(20):
        run = Run(tmp_path / f"out{kill}", tmp_path / f"work{kill}", time.time())
        run.work.mkdir()
        run.begin({})
        started = processes.fork(
            lambda run=run: runner.run_steps(run, REHEARSAL, chosen, 60.0), tmp_path / "log.txt"
        )
        time.sleep(chance.uniform(0.02, 0.25))
        os.kill(started, signal.SIGKILL)
        os.waitpid(started, 0)
        size = -1
        while (run.out / record.LOG).exists() and size != (run.out / record.LOG).stat().st_size:
            size = (run.out / record.LOG).stat().st_size
            time.sleep(0.02)
        announced = announced_in(run.out)
        there = [f"{r['kind']} {r['step']} {r['name']}" for r in results_of(run.out)["results"]]
        assert set(announced) <= set(there)
        assert len(there) <= len(set(announced)) + 1
        seen.add(len(there))
    assert len(seen) > 5, "the kills fell into the same few moments"


# --- steps that fail ------------------------------------------------------------------------------


class Fails(Measurement):
    def measure(self, item):
        began = time.time()
        if item == "raises":
            raise ValueError("this one is wrong")
        if item == "hangs":
            time.sleep(60)
        if item == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "breaks the GPU":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if item == "leaves a child":
            subprocess.Popen(["sleep", "60"])
        self.session.add("kernel", item, {"process": os.getpid()}, began)


class NeverReady(Fails):
    def __init__(self, session: Session) -> None:
        raise RuntimeError("no model")


def run_steps(tmp_path, chosen, seconds=60.0, work="work", settings=REHEARSAL):
    run = Run(tmp_path / "out", tmp_path / work, time.time())
    run.work.mkdir()
    run.begin({})
    ok = runner.run_steps(run, settings, chosen, seconds)
    data = run.read()
    return ok, {s["name"]: s for s in data["steps"]}, data["results"]


def named(results, kind):
    return {r["name"]: r["data"] for r in results if r["kind"] == kind}


def test_an_item_that_fails_costs_itself_alone(tmp_path):
    items = ("a", "raises", "hangs", "b", "crashes", "c", "breaks the GPU", "d")
    began = time.monotonic()
    ok, outcomes, results = run_steps(
        tmp_path, [Step("bad", Fails, items, 40, 1.0), Step("good", Fails, ("e",), 10, 5)]
    )
    assert not ok
    assert time.monotonic() - began < 20
    measured, failed = named(results, "kernel"), named(results, "failure")
    assert sorted(measured) == ["a", "b", "c", "d", "e"]
    assert failed["raises"]["error"] == "ValueError: this one is wrong"
    assert failed["hangs"]["error"] == "took too long"
    assert failed["crashes"]["error"] == f"ended with status {-signal.SIGKILL}"
    # After an error of the GPU nothing more succeeds in that process.
    assert measured["c"]["process"] != measured["d"]["process"]
    assert outcomes["bad"]["status"] == "failed: raises, hangs, crashes, breaks the GPU"
    assert outcomes["good"]["status"] == "ok"


def test_the_clock_stops_a_step_and_leaves_out_the_next(tmp_path):
    chosen = [Step("long", Fails, ("a", "hangs"), 60, 60), Step("next", Fails, ("b",), 60, 60)]
    began = time.monotonic()
    _, outcomes, results = run_steps(tmp_path, chosen, seconds=runner.FINISH_SECONDS + 3)
    assert time.monotonic() - began < 3 + runner.FINISH_SECONDS
    assert list(named(results, "kernel")) == ["a"]
    assert outcomes["next"]["status"] == "left out: no time is left"
    assert named(results, "failure")["hangs"]["error"] == "the step's time was over"


def test_a_step_that_cannot_be_prepared_is_named(tmp_path):
    _, outcomes, results = run_steps(tmp_path, [Step("never", NeverReady, ("a",), 10, 5)])
    assert outcomes["never"]["status"].startswith("failed: preparation ended with status 1")
    assert "(preparation)" in named(results, "failure")
    assert "RuntimeError: no model" in (tmp_path / "out" / record.LOG).read_text()


def test_a_step_for_failures_runs_after_failed_tests_only(tmp_path):
    after = Step("why", Fails, ("b",), 10, 5, only_after_failure="first")
    _, outcomes, _ = run_steps(tmp_path, [Step("first", Fails, ("a",), 10, 5), after], work="w1")
    assert "why" not in outcomes
    _, outcomes, _ = run_steps(tmp_path, [Step("first", Fails, ("raises",), 10, 5), after])
    assert outcomes["why"]["status"] == "ok"


def test_a_file_that_cannot_be_collected_costs_its_own_tests_alone(tmp_path):
    for name, text in (
        ("test_a.py", "import no_such_package\n"),
        ("test_b.py", "def test_one():\n    pass\n"),
    ):
        (tmp_path / name).write_text(text)
    plugins = ("-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:benchmark")  # unused, slow
    arguments = (*GPU.tests["engine"][:-1], *plugins, f"--rootdir={tmp_path}", str(tmp_path))
    settings = replace(REHEARSAL, tests={"some": arguments})
    step = Step("tests", steps.Tests, ("some",), 30, 30)
    _, outcomes, results = run_steps(tmp_path, [step], settings=settings)
    (counted,) = named(results, "tests").values()
    assert (counted["passed"], counted["errors"], counted["status"]) == (1, 1, 1)
    assert "no_such_package" in counted["failures"][0]["message"]
    assert outcomes["tests"]["status"] == "failed: some"


class Tunes(Fails):
    def measure(self, item):
        from variant_kernels.triton_ops.tuning import cache_dir

        cache_dir().mkdir(parents=True, exist_ok=True)
        path = cache_dir() / f"{item}.json"
        path.write_text(json.dumps({"milliseconds": [1.0]}))
        now = time.time() - 0.5  # the clock of a file may be behind
        os.utime(path, (now, now))
        super().measure("raises" if item == "timed before it failed" else item)


def test_what_any_step_times_to_choose_block_sizes_is_recorded(tmp_path, monkeypatch):
    """Once, in the step that timed it; a generation times shapes that no kernel case has."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("VARIANT_CACHE_DIR", str(tmp_path / "cache"))
    chosen = [Step("one", Tunes, ("a", "timed before it failed", "b"), 10, 5),
              Step("two", Fails, ("c",), 10, 5)]  # fmt: skip
    _, _, results = run_steps(tmp_path, chosen)
    found = [(r["step"], r["name"]) for r in results if r["kind"] == "tuning"]
    assert found == [("one", "a"), ("one", "timed before it failed"), ("one", "b")]


def test_what_a_step_started_ends_with_it(tmp_path):
    run_steps(tmp_path, [Step("parent", Fails, ("leaves a child",), 10, 5)])
    mine = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 60" not in mine.stdout.splitlines()


def test_a_step_that_no_signal_ends_costs_its_seconds_alone(tmp_path, monkeypatch):
    """As one that waits inside the driver of a GPU that hangs."""
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.5)
    child = processes.fork(lambda: time.sleep(8), tmp_path / "log.txt")
    began = time.monotonic()
    with monkeypatch.context() as patched:
        for kill in ("kill", "killpg"):
            patched.setattr(os, kill, lambda child, signal_: None)
        assert processes.wait(child, began + 0.5) is None
    assert time.monotonic() - began < 4
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# --- records, clocks ------------------------------------------------------------------------------


def test_clocks_are_those_of_the_time_of_a_measurement(tmp_path):
    path = tmp_path / "clocks.csv"
    lines = [
        "2026/01/02 03:04:05.500, 1000, 3201, 100.5, 40, 5",
        "2026/01/02 03:04:06.500, 1980, 3201, [N/A], 40, 5",
        "2026/01/02 03:04:07.500, 1980, 3201, 600, 60, 7",
        "2026/01/02 03:04:08.500, 1900, 3201, 700, 61, 9",
        "2026/01/02 03:04:09.500, 345, 32",
    ]
    path.write_text("\n".join(lines))
    start = time.mktime((2026, 1, 2, 3, 4, 7, 0, 0, -1))
    clocks = record.clocks_between(path, start, start + 2)
    assert clocks["clocks.sm"] == [1900, 1940, 1980]
    assert clocks["power.draw"] == [600, 650, 700]
    assert record.clocks_between(path, start + 100, start + 101) == {}
    assert record.clocks_between(tmp_path / "none", start, start + 2) == {}


def test_nvidia_smi_only_reads(tmp_path, monkeypatch):
    """No option that could change a setting of the GPU."""
    shown = tmp_path / "shown"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {shown}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    runner.start_sampler(Run(tmp_path, tmp_path, 0)).wait()
    words = shown.read_text().split()
    assert [word.split("=")[0] for word in words] == ["--query-gpu", "--format", "--loop-ms"]


# --- the plan of a real run -----------------------------------------------------------------------


def test_the_cases_exist_and_run_on_a_gpu():
    for op, name in (*GPU.kernels, *GPU.compiled):
        cases = importlib.import_module(f"benchmarks.bench_{op}").CASES
        (case,) = (case for case in cases if case.name == name)
        assert "cuda" in case.devices
        assert case.settings.get("heads", 30) == 30


@pytest.mark.parametrize("op", ["block_causal_attention", "paged_attention", "sample_tokens"])
def test_the_cases_of_the_targets_are_the_first(op):
    first = importlib.import_module(f"benchmarks.bench_{op}").CASES[0].name
    assert (op, first) in GPU.kernels


def test_engine_and_kernels_fit_the_time():
    """What tells most is planned before the time is over; only later steps may be left out."""
    plan = steps.steps(GPU)
    assert [step.name for step in plan] == [
        *("ceilings", "smoke", "sanitizer", "engine-64", "engine-1", "kernels", "peers"),
        *("training-step", "largest-batch", "profile", "end", "tests"),
    ]
    by_kernels = sum(s.seconds for s in plan[:6] if s.only_after_failure is None)
    assert by_kernels <= 350
    assert len({step.name for step in plan}) == len(plan)


def test_an_unknown_step_and_a_missing_package_are_named(monkeypatch, capsys, tmp_path):
    assert main(["--rehearsal", "--out", str(tmp_path), "nonsense"]) == 2
    assert "no step 'nonsense'" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.gpu.__main__.PACKAGES", ("json", "no_such_package"))
    assert main(["--rehearsal"]) == 2
    assert "not installed: no_such_package" in capsys.readouterr().err
    assert "tyro" not in PACKAGES


def test_nothing_imports_the_command_lines_library():
    """It may be missing on a GPU machine."""
    code = (
        "import sys; sys.modules['tyro'] = None; from benchmarks.gpu.__main__ import "
        "_import_everything as f; f()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- artefacts ------------------------------------------------------------------------------------


@pytest.fixture
def artefacts(tmp_path):
    """A manifest, two libraries and a cache of one entry, as artefacts.py writes them."""
    folder, root = tmp_path / "artefacts", tmp_path / "root"
    source = tmp_path / "source"
    for path, text in (
        ("libraries/_C.so", "library"),
        ("triton/AAAA/kernel.cubin", "code"),
        ("triton/AAAA/kernel.json", "{}"),
        (
            "triton/AAAA/__grp__kernel.json",
            json.dumps({"child_paths": {"kernel.cubin": "/elsewhere/AAAA/kernel.cubin"}}),
        ),
        ("packages/not_here/not_here/__init__.py", "from needed import VALUE"),
        ("packages/not_here/needed.py", "VALUE = 7"),
        ("packages/json/json.py", "raise ImportError"),
    ):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    folder.mkdir()
    (root / "variant_kernels").mkdir(parents=True)
    (root / "csrc").mkdir()
    for name in ("CMakeLists.txt", "setup.py", "csrc/kernel.cpp"):
        (root / name).write_text(name)
    with tarfile.open(folder / unpack.ARCHIVE, "w:xz") as archive:
        for top in ("libraries", "triton", "packages"):
            archive.add(source / top, top)
    return folder, root


def write_manifest(folder, root, **fields):
    import sysconfig

    triton = pytest.importorskip("triton")
    from triton.runtime.cache import triton_key

    manifest = {
        "soabi": sysconfig.get_config_var("SOABI"),
        "sources": unpack.digest_of_sources(root),
        "packages": ["not_here", "json"],
        "commit": "abc",
        "dirty": True,
        "triton": triton.__version__,
        "triton_key": triton_key(),
        "tails": {"AAAA": "-tail"},
        **fields,
    }
    (folder / unpack.MANIFEST).write_text(json.dumps(manifest))


def test_artefacts_are_put_in_place(artefacts, tmp_path):
    folder, root = artefacts
    write_manifest(folder, root)
    notes = unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "packages")
    assert (root / "variant_kernels" / "_C.so").read_text() == "library"
    entry = tmp_path / "cache" / "AAAA"
    assert (entry / "kernel.cubin").read_text() == "code"
    group = json.loads((entry / "__grp__kernel.json").read_text())
    assert group["child_paths"] == {"kernel.cubin": str(entry / "kernel.cubin")}
    assert "artefacts: 1 Triton kernels" in notes
    assert "artefacts: of commit abc with changes" in notes


def test_another_build_of_the_same_triton_finds_the_entries(artefacts, tmp_path):
    import hashlib

    from triton.runtime.cache import _base32, triton_key

    folder, root = artefacts
    write_manifest(folder, root, triton_key="another build")
    notes = unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "packages")
    key = _base32(hashlib.sha256(f"{triton_key()}-tail".encode()).hexdigest())
    assert (tmp_path / "cache" / key / "kernel.cubin").exists()
    assert any("another build" in note for note in notes)


def test_packages_that_are_not_installed_travel(artefacts, tmp_path):
    """And those that are installed stay as they are."""
    folder, root = artefacts
    write_manifest(folder, root)
    notes = unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "packages")
    assert "artefacts: packages not installed here: not_here" in notes
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == [
        "needed.py",
        "not_here",
    ]
    write_manifest(folder, root, soabi="another Python")
    unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_steps_import_the_packages_that_travelled(artefacts, tmp_path, monkeypatch):
    folder, root = artefacts
    write_manifest(folder, root)
    monkeypatch.setattr(command, "ROOT", root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("PYTHONPATH", "TRITON_CACHE_DIR", "VARIANT_CACHE_DIR", "PYTHONUNBUFFERED",
                 "PYTORCH_NVML_BASED_CUDA_CHECK"):  # fmt: skip
        monkeypatch.setenv(name, "")  # set back afterwards
    command.prepare(Namespace(artefacts=folder), tmp_path / "work")
    monkeypatch.delitem(sys.modules, "not_here", raising=False)
    assert importlib.import_module("not_here").VALUE == 7
    child = [sys.executable, "-S", "-c", "import not_here, json; print(not_here.VALUE)"]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


def test_what_travels_is_what_a_run_needs():
    """Every package is either common where torch is, or travels; the environment has them all."""
    from benchmarks.gpu.artefacts import PACKAGES as TRAVELLING
    from benchmarks.gpu.artefacts import _files_of

    assert set(TRAVELLING) <= set(PACKAGES)
    installed = (ROOT / "Makefile").read_text().partition("build/gpu-python/bin/pip install")[2]
    words = installed.splitlines()[0].split()
    distributions = {"PIL": "pillow", "pytest_timeout": "pytest-timeout"}
    assert {distributions.get(name, name) for name in PACKAGES} <= set(words)
    names = {name for name, _ in _files_of("pydantic", TRAVELLING["pydantic"])}
    assert "pydantic/__init__.py" in names
    assert any(name.startswith("pydantic_core/") and name.endswith(".so") for name in names)
    with pytest.raises(SystemExit, match="x travels with no-such-thing, which is not installed"):
        _files_of("x", ("no-such-thing",))


def test_an_extension_that_does_not_load_is_built_anew(tmp_path, monkeypatch):
    """As one that was compiled beside a later C library than the GPU machine's."""
    path = unpack.extension_path(tmp_path)
    path.parent.mkdir()
    path.write_text("not a library")
    calls = []

    def build(command, **options):
        calls.append((command[1:], options["env"]["VARIANT_CUDA"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command.subprocess, "run", build)
    monkeypatch.delitem(sys.modules, "variant_kernels._C")
    monkeypatch.setattr("variant_kernels.__path__", [str(path.parent)])
    first, second = command.usable_extension()
    assert first.startswith("artefacts: the extension does not load here: ")
    assert second.startswith("build without artefacts: built")
    assert calls == [(["setup.py", "build_ext", "--inplace"], "0")]
    assert not path.exists()


def test_an_extension_that_loads_is_kept(monkeypatch):
    monkeypatch.setattr(command.subprocess, "run", None)
    assert command.usable_extension() == []


def test_libraries_of_other_sources_stay_out(artefacts, tmp_path):
    folder, root = artefacts
    write_manifest(folder, root)
    # No source: what Python leaves beside a script, on one of the two machines.
    (root / "csrc" / "__pycache__").mkdir()
    (root / "csrc" / "__pycache__" / "script.pyc").write_text("compiled")
    notes = unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "packages")
    assert "artefacts: the libraries are in place" in notes
    (root / "variant_kernels" / "_C.so").unlink()
    (root / "csrc" / "kernel.cpp").write_text("changed")
    notes = unpack.unpack(folder, tmp_path / "cache", root, tmp_path / "packages")
    assert not (root / "variant_kernels" / "_C.so").exists()
    assert any("sources here" in note for note in notes)
    assert (tmp_path / "cache" / "AAAA" / "kernel.cubin").exists()


def test_without_artefacts_the_run_goes_on(tmp_path):
    (note,) = unpack.unpack(tmp_path / "none", tmp_path / "cache", ROOT, tmp_path / "packages")
    assert note.startswith("no artefacts: FileNotFoundError")


def test_artefacts_are_compiled_without_a_gpu_and_found_again(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    import torch

    from benchmarks.gpu import artefacts
    from variant_kernels.triton_ops.qk_norm import launch_unit_keys

    def case():
        launch_unit_keys(k_BTHD=torch.empty(2, 5, 30, 64, device="cuda", dtype=torch.bfloat16))

    cache = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(artefacts, "cases", lambda settings: [("keys", case)])
    reports = []
    for _ in range(2):
        assert artefacts.compile_part(cache, 0, 1, "") == 0
        reports.append(json.loads((tmp_path / "part-0.json").read_text()))
    first, second = reports
    assert (first["compiled"], second["compiled"], second["found"]) == (1, 0, 1)
    (key,) = first["tails"]
    assert (cache / key / "qk_norm_forward_kernel.cubin").exists()


def test_artefacts_need_a_torch_with_cuda(tmp_path, monkeypatch):
    import torch

    from benchmarks.gpu import artefacts

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"torch .* was built without CUDA"):
        artefacts.main(["--out", str(tmp_path)])


def test_a_case_that_does_not_compile_makes_the_command_fail(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import artefacts

    def case():
        raise ValueError("no such case")

    monkeypatch.setattr(artefacts, "cases", lambda settings: [("wrong", case)])
    assert artefacts.compile_part(tmp_path / "triton", 0, 1, "") == 1
    assert "ValueError: no such case" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "part-0.json").read_text())["failed"] == ["wrong"]
