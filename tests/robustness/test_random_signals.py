"""Stopped trainings and generations; and the differences that must be found."""

import signal

import pytest
import torch

from tests.robustness import signals
from tests.robustness.command import run_generator
from tests.robustness.forked import Failed, option


@pytest.mark.timeout(10_000)
@pytest.mark.parametrize("command", signals.COMMANDS)
def test_a_stopped_run_equals_an_undisturbed_one(command):
    cases = max(1, option("SIGNALS", 3) // len(signals.COMMANDS))
    run_generator("signals", "--only", command, "--cases", cases)


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "two\nlines"), (1, ""), (-signal.SIGSEGV, ""), (130, ""), (143, "a\nb")],
)
def test_a_wrong_end_is_found(code, text):
    with pytest.raises(Failed, match="exit code"):
        signals._check_exit("train", code, text, signal.SIGTERM)


@pytest.mark.parametrize("code", [0, -signal.SIGTERM, 143])
def test_a_right_end_holds(code):
    signals._check_exit("train", code, "variant: stopped.", signal.SIGTERM)


def test_a_difference_of_one_bit_is_found():
    a = {"module": {"w": torch.tensor([1.0, 2.0])}, "history": [{"loss": 0.5}], "step": 3}
    b = {"module": {"w": torch.tensor([1.0, 2.0])}, "history": [{"loss": 0.5}], "step": 3}
    assert signals._difference(a, b) == ""
    b["module"]["w"][1] = torch.nextafter(b["module"]["w"][1], torch.tensor(3.0))
    assert signals._difference(a, b) == "/module/w"
    b["module"]["w"] = a["module"]["w"]
    b["history"][0]["loss"] = 0.25
    assert signals._difference(a, b) == "/history/0/loss"
