"""Run as a program: tokens in sittings, each but the last killed at a later event.

An event is either side of the renaming of a finished file, or the middle of the writing of one. The
recipe comes pickled from standard input; the arguments are the folder of the tokens, and the number
of events that each sitting has more than the one before it. After a kill, every shard must be
whole. Prints the number of kills.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

from tiny_runs import CPU, is_killed

from variant.data import shards
from variant.training.tokenize import tokenize


def kill_at(event):
    """Kill this process at its ``event``-th event, counted from 1."""
    seen = [0]
    replace, fsync = os.replace, os.fsync

    def count():
        seen[0] += 1
        if seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(*args, **rest):
        count()
        replace(*args, **rest)
        count()

    def counted_fsync(descriptor):
        count()
        fsync(descriptor)

    os.replace, os.fsync = counted_replace, counted_fsync


def sitting(recipe, out, event):
    """Tokenize in a child process; returns whether it was killed."""

    def work():
        kill_at(event)
        tokenize(recipe, out, 3, vae_folder=out, device=CPU, shard_size=10)

    return is_killed(work)


def main():
    recipe = pickle.load(sys.stdin.buffer)  # from the test
    out, stride = Path(sys.argv[1]), int(sys.argv[2])
    kills = 0
    while sitting(recipe, out, 1 + stride * kills):
        kills += 1
        for path in out.glob("*.tar"):
            digest = shards.hashlib.sha256(path.read_bytes()).hexdigest()
            assert shards.read_digest(path) == digest, path
        if (out / shards.MANIFEST_NAME).exists():
            shards.read_manifest(out)
    print(kills)


if __name__ == "__main__":
    main()
