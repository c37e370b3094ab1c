"""Two ranks of a test program, forked from the process that has done the imports of both."""

import faulthandler
import os
import signal
import sys
import time

# Seconds after which a rank prints the stack of every thread and ends: before its test's time is
# over, which would tell only that the test waits for a program.
TOO_LONG = 200.0


def run_ranks(work, *args, grace=0.0):
    """Call ``work(rank, *args)`` in a process of its own for each of two ranks, and wait for both.

    The other one would wait for a rank that failed: it is terminated.

    Args:
        grace: seconds that it has before.
    Returns:
        the id and the exit code of each process, in the order of ranks.
    """
    children = [_start(work, rank, *args) for rank in range(2)]
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            time.sleep(grace)
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGTERM)
    return [(child, codes[child]) for child in children]


def _start(work, *args):
    child = os.fork()  # before any thread of OpenMP exists
    if child == 0:
        faulthandler.dump_traceback_later(TOO_LONG, exit=True)
        work(*args)
        sys.exit()  # as a process that was started alone: coverage.py saves its record then
    return child
