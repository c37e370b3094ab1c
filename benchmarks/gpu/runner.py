"""Runs steps one after the other until the time is over; a step costs no more than its seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tarfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.record import ARCHIVE, CLOCK_FIELDS, CLOCKS, LOG, RESULTS, Run
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import Session, Step

# Kept for the archive at the end.
FINISH_SECONDS = 4.0
# A step is not begun with less than this.
LEAST_SECONDS = 2.0
SAMPLE_MILLISECONDS = 500
# What the process of a step cannot recover from: every later call on the GPU would fail.
FATAL = ("CUDA error", "CUDA driver error", "device-side assert", "an illegal memory access")
FATAL_STATUS = 3
# Not archived: what travelled there anyway.
NOT_ARCHIVED = ("lock", "triton", "bin")


def run_steps(run: Run, settings: Settings, steps: Sequence[Step], seconds: float) -> bool:
    """Run the steps within ``seconds`` from ``run.started``; returns whether all succeeded."""
    ends = time.monotonic() + run.started + seconds - time.time() - FINISH_SECONDS
    sampler = start_sampler(run)
    ok = True
    try:
        for step in steps:
            if step.only_after_failure and not _tests_failed(run, step.only_after_failure):
                continue
            left = ends - time.monotonic()
            began = time.monotonic()
            if left < LEAST_SECONDS:
                status = "left out: no time is left"
            else:
                _say(run, f"== {step.name}, at most {min(step.seconds, left):.0f} s")
                status = run_step(run, settings, step, min(ends, began + step.seconds))
            spent = round(time.monotonic() - began, 2)
            run.add_step({"name": step.name, "status": status, "seconds": spent})
            _say(run, f"   {step.name}: {status}, {spent:.1f} s")
            ok = ok and status == "ok"
            _remove_leftovers(run)
    finally:
        if sampler is not None:
            sampler.kill()
            sampler.wait()
    run.set(complete=True)
    archive(run)
    return ok


def run_step(run: Run, settings: Settings, step: Step, ends: float) -> str:
    """Measure a step's items, in a new process after each one that hung or crashed.

    Args:
        ends: seconds of ``time.monotonic``.
    Returns:
        "ok", or what failed.
    """
    remaining, failed = list(step.items), []
    progress = run.work / f"{step.name}.progress"
    while remaining and time.monotonic() < ends - 0.5:
        progress.write_text("")
        child = processes.fork(
            lambda items=tuple(remaining): _measure(run, settings, step, items, progress),
            run.out / LOG,
        )
        status = processes.wait(child, ends, lambda: _hangs(progress, step.item_seconds))
        lines = [json.loads(line) for line in progress.read_text().splitlines()]
        failed += [line["item"] for line in lines if line["state"] == "failed"]
        begun = [line["item"] for line in lines if line["state"] == "began"]
        finished = {line["item"] for line in lines if line["state"] != "began"}
        if status == 0:
            remaining = []
            break
        out_of_time = status is None and time.monotonic() >= ends
        if begun and begun[-1] not in finished:
            text = "took too long" if status is None else f"ended with status {status}"
            _failure(run, step, begun[-1], "the step's time was over" if out_of_time else text)
            failed.append(begun[-1])
        elif not begun:
            text = "took too long" if status is None else f"ended with status {status}; see the log"
            _failure(run, step, "(preparation)", text)
            return f"failed: preparation {text}"
        remaining = remaining[len(begun) :]
    if remaining:
        failed += remaining
        names = ", ".join(remaining)
        return f"time was over before: {names}" if len(names) < 100 else "time was over"
    return f"failed: {', '.join(failed)}" if failed else "ok"


def _tuning() -> dict[Path, int]:
    """The files of what was timed to choose block sizes, and when each was written last."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from variant_kernels.triton_ops.tuning import cache_dir

    return {path: path.stat().st_mtime_ns for path in sorted(cache_dir().glob("*.json"))}


def _add_tuning(session: Session, since: float, known: dict[Path, int]) -> dict[Path, int]:
    """Record what was timed to choose block sizes: each config's milliseconds.

    ``python -m benchmarks.shipped_choices`` makes them the package's choices.

    Args:
        known: what was there before. Times are compared with each other alone: that of a file may
            be some milliseconds before that of the clock.
    Returns:
        what is there now.
    """
    found = _tuning()
    for path, written in found.items():
        if known.get(path) != written:
            session.add("tuning", path.stem, json.loads(path.read_text()), since)
    return found


def _measure(
    run: Run, settings: Settings, step: Step, items: Sequence[str], progress: Path
) -> None:
    """In the process of the step."""
    compiled = _count_compiled()
    began = time.time()

    def note(item: str, state: str) -> None:
        with progress.open("a") as file:
            file.write(json.dumps({"item": item, "state": state, "at": time.time()}) + "\n")

    session, tuning = Session(run, settings, step.name), _tuning()
    measurement = step.work(session)
    print(f"-- {step.name}: prepared in {time.time() - began:.1f} s", flush=True)
    for item in items:
        note(item, "began")
        print(f"-- {step.name}: {item}", flush=True)
        try:
            measurement.measure(item)
            state = "ended"
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            _failure(run, step, item, text[:1000])
            state = "failed"
            if any(words in text for words in FATAL):
                note(item, state)
                raise SystemExit(FATAL_STATUS) from error
            del error
        note(item, state)
        tuning = _add_tuning(session, began, tuning)
        if compiled["found"] or compiled["compiled"]:
            run.add("triton", step.name, "cache", compiled, began)


def _count_compiled() -> dict[str, Any]:
    """Counts what Triton finds in its cache, and names what it compiles."""
    counts: dict[str, Any] = {"found": 0, "compiled": []}
    try:
        from triton import knobs
    except ImportError:
        return counts

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            counts["found"] += 1
        else:
            counts["compiled"].append(src.name)

    knobs.compilation.listener = listener
    return counts


def _hangs(progress: Path, seconds: float) -> bool:
    lines = progress.read_text().splitlines()
    if not lines:
        return False
    try:
        last = json.loads(lines[-1])
    except ValueError:
        return False  # half a line, a moment ago
    return last["state"] == "began" and time.time() - last["at"] > seconds


def _failure(run: Run, step: Step, item: str, text: str) -> None:
    run.add("failure", step.name, item, {"error": text}, time.time())


def _tests_failed(run: Run, step: str) -> bool:
    return any(
        result["step"] == step and (result["kind"] == "failure" or result["data"].get("failures"))
        for result in run.read()["results"]
        if result["kind"] in ("tests", "failure")
    )


def _say(run: Run, text: str) -> None:
    """Print a line, and keep it in the log."""
    print(text, flush=True)
    with (run.out / LOG).open("a") as file:
        file.write(text + "\n")


# --- clocks, leftovers, the archive ---------------------------------------------------------------


def start_sampler(run: Run) -> subprocess.Popen[bytes] | None:
    """nvidia-smi printing clocks and power twice a second; it reads, and changes no setting."""
    if shutil.which("nvidia-smi") is None:
        _say(run, "nvidia-smi is not installed: no clocks")
        return None
    command = [
        "nvidia-smi",
        f"--query-gpu=timestamp,{','.join(CLOCK_FIELDS)}",
        "--format=csv,noheader,nounits",
        f"--loop-ms={SAMPLE_MILLISECONDS}",
    ]
    with (run.work / CLOCKS).open("w") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=processes.end_with_parent,
        )


def _remove_leftovers(run: Run) -> None:
    """Half-written files of processes that were killed."""
    for path in run.out.iterdir():
        if path.name not in (RESULTS, LOG, ARCHIVE) and path.is_file():
            path.unlink()


def archive(run: Run) -> None:
    """``logs.tar.gz`` of the folder of work: clocks, tuning, progress."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        top = Path(entry.name).parts[1:2]
        return None if top and top[0] in NOT_ARCHIVED else entry

    temporary = run.out / f".{ARCHIVE}.part"
    with tarfile.open(temporary, "w:gz") as file:
        file.add(run.work, arcname="logs", filter=wanted)
    os.replace(temporary, run.out / ARCHIVE)


def summary(run: Run) -> str:
    """The steps and the failures, a line each."""
    data = run.read()
    lines = [f"{s['name']:16} {s['seconds']:7.1f} s  {s['status']}" for s in data["steps"]]
    for result in data["results"]:
        if result["kind"] == "failure":
            lines.append(f"failed: {result['step']}, {result['name']}: {result['data']['error']}")
    counted = [r for r in data["results"] if r["kind"] not in ("failure", "triton", "tuning")]
    misses = sum(len(r["data"]["compiled"]) for r in data["results"] if r["kind"] == "triton")
    lines.append(f"{len(counted)} results; {misses} Triton kernels were compiled here")
    return "\n".join(line[:300] for line in lines)
