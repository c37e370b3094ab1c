"""Signals that stop a training run at the end of a step."""

import signal
from contextlib import contextmanager

import pytest

from variant.training.interrupt import Interrupt

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Arrived(Exception):
    """What the handler of before raises."""


@contextmanager
def handlers(**own):
    """Handlers of the signals by their names within the block; the others raise Arrived."""

    def arrive(signum, frame):
        raise Arrived(signum)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, own.get(number.name, arrive))
    try:
        yield {number: signal.getsignal(number) for number in SIGNALS}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
def test_only_ctrl_c_ends_a_run_that_is_already_stopping(first):
    with handlers() as before:
        with Interrupt().listening() as interrupt:
            assert interrupt.signum is None
            signal.raise_signal(first)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
            assert interrupt.signum == first
            with pytest.raises(Arrived):
                signal.raise_signal(signal.SIGINT)
            assert interrupt.signum == first
        assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("ignored", SIGNALS)
def test_a_signal_that_was_ignored_before_stays_ignored(ignored):
    with handlers(**{ignored.name: signal.SIG_IGN}), Interrupt().listening() as interrupt:
        signal.raise_signal(ignored)
        assert interrupt.signum is None
        other = next(number for number in SIGNALS if number != ignored)
        signal.raise_signal(other)
        signal.raise_signal(ignored)
        assert interrupt.signum == other
        assert signal.getsignal(ignored) is signal.SIG_IGN
