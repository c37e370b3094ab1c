"""The harness finds what it looks for: crashes, hangs, exits, memory, and failures of a case."""

import os
import signal
import time

import pytest

from tests.robustness.forked import MIB, Failed, Limits, main, run_cases
from tests.robustness.progress import Progress

LIMITS = Limits(cpu_seconds=0.3, wall_seconds=5, memory=200 * MIB)


def fails(case):
    raise Failed(f"case {case} is\nwrong")


def crashes(case):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(case):
    while True:
        pass


def waits(case):
    signal.pause()


def exits(case):
    os._exit(3)


def takes_memory(case):
    return len(bytes(400 * MIB))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (fails, "case 2 is wrong"),
        (crashes, "crash: killed by SIGSEGV"),
        (hangs, "not done after 0.3 s of CPU"),
        (waits, "no answer after 5 s"),
        (exits, "ended the process with exit code 3"),
        (takes_memory, "MemoryError at "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_case_is_named_and_the_others_run(wrong, text):
    def run(case):
        return wrong(case) if case == 2 else case * 10

    results = list(run_cases(run, range(5), LIMITS))
    assert [(case, value) for case, _, value in results if case != 2] == [
        (0, 0),
        (1, 10),
        (3, 30),
        (4, 40),
    ]
    assert all(found is None for case, found, _ in results if case != 2)
    assert results[2][0] == 2
    assert text in results[2][1]


def test_a_case_that_computes_for_long_does_not_hang():
    def computes(case):
        until = time.process_time() + (0.7 if case == 1 else 0)
        while time.process_time() < until:
            pass
        return case

    limits = Limits(cpu_seconds=5, wall_seconds=0.2)
    assert list(run_cases(computes, range(3), limits)) == [(n, None, n) for n in range(3)]


def test_a_crashed_case_is_described():
    (result,) = run_cases(crashes, [7], LIMITS, describe=lambda case: f"call {case}")
    assert result[1] == "call 7: crash: killed by SIGSEGV"


def test_the_case_that_runs_is_told_about(monkeypatch):
    monkeypatch.setattr("tests.robustness.forked.TICK", 0.02)
    told = []

    def run(case):
        if case == 3:
            time.sleep(0.2)

    assert len(list(run_cases(run, [2, 3, 4], LIMITS, waiting=told.append))) == 3
    assert told.count(3) >= 2


def test_progress_is_told_at_once_and_then_every_ten_seconds(capsys):
    now = [0.0]
    progress = Progress("generator", 100, clock=lambda: now[0])
    now[0] = 3
    progress.prepared()
    for second in range(4, 34):
        now[0] = second
        progress.case(failed=second == 20)
        progress.waiting(second)
    assert capsys.readouterr().err.splitlines() == [
        "generator: preparing 100 cases",
        "generator: prepared after 3 s",
        "generator: 1 of 100 cases, 0 failures, 1 s, about 99 s left",
        "generator: 11 of 100 cases, 0 failures, 11 s, about 89 s left",
        "generator: 21 of 100 cases, 1 failures, 21 s, about 79 s left",
    ]
    now[0] = 44.5
    progress.waiting(34)
    expected = "generator: 30 of 100 cases, 1 failures, 42 s; case 34 runs\n"
    assert capsys.readouterr().err == expected


def test_a_generator_tells_its_progress_before_its_first_case_ends(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generator", "--seed", "1", "--cases", "2"])
    seen = []

    def prepare(arguments):
        seen.append(capsys.readouterr().err)
        return ""

    monkeypatch.setattr("tests.robustness.forked.single_thread", lambda: None)
    assert main("generator", lambda seed, case: None, 5, LIMITS, prepare=prepare) == 0
    assert seen == ["generator: preparing 2 cases\n"]
    output = capsys.readouterr()
    assert "generator: 1 of 2 cases, 0 failures" in output.err
    assert output.out.startswith("generator: 2 cases, 0 failures, ")
