"""Killed trainings of one and of two processes; and the differences that must be found."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.robustness import kills
from tests.robustness.command import run_generator
from tests.robustness.forked import Failed, option

KILLS = option("KILLS", 4)


@pytest.mark.timeout(10_000)
# Of two processes tests/training/test_distributed.py kills one in CI.
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_killed_training_ends_as_an_undisturbed_one(ranks):
    # A case has up to five kills; two processes need more time for each.
    cases = max(1, KILLS // 6 if ranks == 2 else KILLS // 3)
    run_generator("kills", "--ranks", str(ranks), "--cases", str(cases))


SITTING = kills.Sitting([-9, 1], ["", "variant: error: rank 1: rank 0 (process 7) is lost"], 5.0)


def test_ends_that_must_not_be_are_found():
    kills._check_codes("two", SITTING, {0: (3, 0.0)})
    for codes, errors, killed in (
        ([1, 1], ["", ""], {0: 0}),  # nobody died
        ([-9, 1], ["", "RuntimeError: connection closed"], {0: 0}),  # does not name the lost one
        ([-9, 1], SITTING.errors, {1: 0}),  # died although it was not to be killed
        ([0, -11], ["", ""], {1: 0}),
    ):
        with pytest.raises(Failed):
            kills._check_codes("two", kills.Sitting(codes, errors, 5.0), killed)
    with pytest.raises(Failed, match="took 200 s"):
        kills._check_codes("two", kills.Sitting(SITTING.codes, SITTING.errors, 200.0), {0: 0})


class Played:
    """Runs of two processes that end with these codes, one after another."""

    ranks = 2
    events = whole = dict.fromkeys(kills.KINDS[2], 9)

    def __init__(self, root, codes):
        self.root, self.codes = root, iter(codes)

    def start(self, mode, out, planned):
        codes = next(self.codes)
        died = [rank for rank, code in enumerate(codes) if code < 0]
        if died:  # one or both, whatever was drawn
            planned |= dict.fromkeys(died, (1, 0.0))
        line = f"rank {min(died, default=0)} (process 7) is lost"
        return kills.Sitting(codes, [line, line], 5.0)


def test_only_kills_that_happened_count(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "_check_equal", lambda *_: None)
    alarm = -signal.SIGALRM
    runs = [[-9, 1], [alarm, alarm], [1, -9], [0, 0]]
    assert kills.check(Played(tmp_path, runs), 0, 0) == 3  # the moment of the last never came
    assert kills.check(Played(tmp_path, [[0, 0]]), 0, 0) == 0


def test_a_checkpoint_that_is_gone_older_or_damaged_is_found(tmp_path):
    assert kills._check_checkpoint("run", tmp_path, -1) == -1
    with pytest.raises(Failed, match="is gone"):
        kills._check_checkpoint("run", tmp_path, 3)
    path = Path(tmp_path / "var-last.pt")
    torch.save({"step": 3}, path)
    with pytest.raises(Failed, match=r"var-last.pt: is damaged"):
        kills._check_checkpoint("run", tmp_path, 3)
    shutil.rmtree(tmp_path)
