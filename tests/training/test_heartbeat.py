"""Which process is lost: silent ones, ones that ended with an error, one whose store is gone."""

import pytest

from variant.training import heartbeat
from variant.training.heartbeat import Heartbeat


class Store:
    """A key-value store of this process; it may fail."""

    def __init__(self):
        self.values, self.works = {}, True

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self._check()
        self.values[key] = value.encode()

    def multi_get(self, keys):
        self._check()
        return [self.values[key] for key in keys]

    def _check(self):
        if not self.works:
            raise RuntimeError("no connection")


@pytest.fixture
def two(monkeypatch):
    """(store, heartbeats of two ranks, a list of exit codes, a clock that sleeping moves)."""
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        heartbeat.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    store, codes = Store(), []
    ranks = [Heartbeat(store, rank, 2, codes.append) for rank in range(2)]
    for rank in ranks:
        rank._read()
    return store, ranks, codes, clock


def test_a_silent_process_is_named_with_its_number(two):
    _, (first, _), _, _ = two
    assert first.reason().startswith("rank 1 (process ")
    assert "is lost: no sign of life for 5 s" in first.reason()


def test_a_process_that_ended_by_an_error_is_named_with_it_and_one_that_finished_is_not(two):
    _, (first, second), _, _ = two
    second.end()
    assert first.reason() is None
    second.end("a bad image")
    assert first.reason() == "rank 1 has ended: a bad image"


def test_a_store_that_does_not_answer_is_the_process_that_holds_it(two, monkeypatch):
    store, (first, _), _, _ = two
    monkeypatch.setenv("MASTER_ADDR", "node7")
    store.works = False
    assert "(MASTER_ADDR node7, rank 0 or torchrun) is lost" in first.reason()


def test_a_process_that_waits_for_a_lost_one_prints_a_line_and_ends(two, monkeypatch, capfd):
    _, (first, _), codes, clock = two

    def wait(seconds):
        clock[0] += seconds
        return clock[0] > 60

    monkeypatch.setattr(first._stopping, "wait", wait)
    first._watch()
    assert codes == [1]
    assert heartbeat.LOST_AFTER <= clock[0] < 60
    line = capfd.readouterr().err
    assert line.startswith("variant: error: rank 0: rank 1 (process ")
    assert line.count("\n") == 1
