"""The harness finds what it looks for: crashes, hangs, exits, memory, and failures of a case."""

import os
import signal

import pytest

from tests.robustness.forked import MIB, Failed, Limits, run_cases

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


def test_a_crashed_case_is_described():
    (result,) = run_cases(crashes, [7], LIMITS, describe=lambda case: f"call {case}")
    assert result[1] == "call 7: crash: killed by SIGSEGV"
