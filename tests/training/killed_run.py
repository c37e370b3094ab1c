"""Run as a program: both trainings in sittings, each but the last killed at a later event.

An event is a step, or either side of the renaming of a finished file. The recipe comes pickled from
standard input; the arguments are the folder of runs that are never stopped, that of runs that are
killed, and the number of events that each sitting has more than the one before it. Prints the
number of kills of each task as JSON.
"""

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  an optimizer imports it at first use
from tiny_runs import CPU, is_killed, quiet

from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var

TASKS = {"vae": (VAETask, train_vae), "var": (VARTask, train_var)}


def kill_at(task, event):
    """Kill this process at its ``event``-th event, counted from 1."""
    seen = [0]
    loss, replace = task.loss, os.replace

    def count():
        seen[0] += 1
        if seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_loss(*args, **rest):
        count()
        return loss(*args, **rest)

    def counted_replace(*args, **rest):
        count()
        replace(*args, **rest)
        count()

    task.loss, os.replace = counted_loss, counted_replace


def sitting(recipe, kind, folder, event=None):
    """Train in a child process; returns whether it was killed."""

    def work():
        task, train = TASKS[kind]
        if event is not None:
            kill_at(task, event)
        resume = (folder / f"{kind}-last.pt").exists()
        train(recipe, folder, resume=resume, console=quiet(), device=CPU)

    return is_killed(work)


def main():
    recipe = pickle.load(sys.stdin.buffer)  # from the test
    whole, parted, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    kills = dict.fromkeys(TASKS, 0)
    for kind in TASKS:
        assert not sitting(recipe, kind, whole)
        while sitting(recipe, kind, parted, 1 + stride * kills[kind]):
            kills[kind] += 1
    print(json.dumps(kills))


if __name__ == "__main__":
    main()
