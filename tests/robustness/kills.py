"""Trainings of one or two processes that are killed at random moments, checkpoint writes included.

A run of 40 steps is killed and resumed until it ends. Once there is a checkpoint, every restart
finds a whole one, not older than the one before; in the end weights, moments, average and losses
equal those of a run that nobody disturbed, bit by bit. Of two processes one or both are killed; a
survivor ends by itself within a minute, with a line that names the lost one.

    python -m tests.robustness.kills --seed 7 --cases 3 --ranks 2
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness import forked
from tests.robustness.forked import Failed

MODULE = "tests.robustness.kills"
LIMITS = forked.Limits(cpu_seconds=900, wall_seconds=1800, memory=8 * forked.GIB)
STEPS = 40
# Kills of one case; then the run goes to its end.
MOST_KILLS = 5
# Seconds within which a process dies after its event began: in the middle of a write, perhaps.
LATEST = 0.03
# Seconds that a survivor has; it notices a lost process by its heartbeat.
SURVIVE = 60.0
KINDS = {1: ("single",), 2: ("ddp", "fsdp2")}


@dataclass
class Sitting:
    """One start of the run: the exit code of each process, and what it printed as errors."""

    codes: list[int]
    errors: list[str]
    seconds: float


class Files:
    """The recipe, and an undisturbed run for each of ``modes`` with the number of its events."""

    def __init__(self, root: Path, ranks: int, modes: set[str]) -> None:
        self.root, self.ranks = root, ranks
        self._make_images()
        self.events: dict[str, int] = {}
        self.whole: dict[str, Path] = {}
        self.vae = root / "vae"
        done = self.start(None, self.vae, train_vae=True)
        assert done.codes == [0], done.errors
        for mode in sorted(modes):
            self.whole[mode] = root / mode
            done = self.start(mode, self.whole[mode])
            assert done.codes == [0] * ranks, done.errors
            self.events[mode] = int((self.whole[mode] / "events").read_text())

    def _make_images(self) -> None:
        from PIL import Image

        for part in ("train", "held_out"):
            for label in range(2):
                folder = self.root / "images" / part / f"class{label}"
                folder.mkdir(parents=True)
                for index in range(4 if part == "train" else 1):
                    shade = (200 * label, 20 * index, 100)
                    Image.new("RGB", (12, 10), shade).save(folder / f"{index}.png")

    def recipe(self, mode: str | None) -> Any:
        """A recipe of 40 steps in 20 epochs, with an average and frequent checkpoints."""
        import dataclasses

        from tiny_runs import tiny_recipe

        from variant.training.checkpoint_schedule import OutputSection
        from variant.training.ema import EMASection
        from variant.training.parallel import ParallelSection

        parallel: Any = "auto" if mode in (None, "single") else mode
        recipe, replace = tiny_recipe(self.root / "images"), dataclasses.replace
        optim = replace(recipe.optim, batch_size=4)
        weights = None if mode is None else str(self.vae / "vae-best.safetensors")
        return replace(
            recipe,
            vae_training=replace(recipe.vae_training, epochs=1, optim=optim, weights=weights),
            data=replace(recipe.data, workers=1),
            optim=optim,
            schedule=replace(recipe.schedule, joint=10, transition=5, refinement=5),
            eval=replace(recipe.eval, every=3),
            ema=EMASection(0.9),
            output=OutputSection(checkpoint_every=6, checkpoint_steps=3, keep=2),
            parallel=ParallelSection(parallel),
        )

    def start(
        self,
        mode: str | None,
        out: Path,
        kills: dict[int, tuple[int, float]] | None = None,
        *,
        train_vae: bool = False,
    ) -> Sitting:
        """Start or resume the run in forked children.

        Args:
            kills: by rank, the number of the event and the seconds after which the process dies.
        """
        ranks = 1 if train_vae else self.ranks
        out.mkdir(exist_ok=True)
        agent, port = _start_store() if ranks > 1 else (None, 0)
        started, children = time.monotonic(), []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                kill = (kills or {}).get(rank)
                self._child(mode, out, rank, ranks, port, kill, train_vae=train_vae)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if agent is not None:
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
        errors = [(self.root / f"errors{rank}").read_text() for rank in range(ranks)]
        return Sitting(codes, errors, time.monotonic() - started)

    def _child(
        self,
        mode: str | None,
        out: Path,
        rank: int,
        ranks: int,
        port: int,
        kill: tuple[int, float] | None,
        *,
        train_vae: bool,
    ) -> None:
        code = 70
        try:
            errors = os.open(
                self.root / f"errors{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
            )
            os.dup2(errors, 2)
            if ranks > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "GLOO_SOCKET_IFNAME": "lo",
                }
            count = _count_events(kill)
            self._train(mode, out, train_vae=train_vae)
            if rank == 0 and kill is None and not train_vae:
                (out / "events").write_text(str(count[0]))
            code = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _train(self, mode: str | None, out: Path, *, train_vae: bool) -> None:
        import torch
        from rich.console import Console

        from variant.training.checkpointer import Checkpointer
        from variant.training.vae_task import train_vae as vae
        from variant.training.var_task import train_var as var

        console, cpu = Console(file=io.StringIO()), torch.device("cpu")
        if train_vae:
            vae(self.recipe(mode), out, console=console, device=cpu)
            return
        resume = Checkpointer(out, "var").exists
        var(self.recipe(mode), out, resume=resume, console=console, device=cpu)


def _start_store() -> tuple[int, int]:
    """A process that holds the store at which the ranks meet, as torchrun does; and its port."""
    reading, writing = os.pipe()
    agent = os.fork()
    if agent == 0:
        try:
            from datetime import timedelta

            from torch._C._distributed_c10d import TCPStore

            store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60))
            os.write(writing, str(store.port).encode())
            signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 120)
    assert ready, "no store"
    port = int(os.read(reading, 10))
    os.close(reading)
    return agent, port


def _count_events(kill: tuple[int, float] | None) -> list[int]:
    """Count steps and operations on files; a timer ends the process after one of them begins."""
    from variant.training.trainer import Trainer

    count, owner = [0], os.getpid()

    def counted(function: Any) -> Any:
        def call(*args: Any, **rest: Any) -> Any:
            if os.getpid() != owner:  # a process that reads images
                return function(*args, **rest)
            count[0] += 1
            if kill is not None and count[0] == kill[0]:
                if kill[1] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.signal(signal.SIGALRM, signal.SIG_DFL) if _in_main() else None
                signal.setitimer(signal.ITIMER_REAL, kill[1])  # the default action: no clean-up
            return function(*args, **rest)

        return call

    for name in ("replace", "fsync", "link", "unlink", "rename", "truncate", "open"):
        setattr(os, name, counted(getattr(os, name)))
    Trainer._train_step = counted(Trainer._train_step)
    return count


def _in_main() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def drawn(seed: int, case: int, ranks: int) -> tuple[str, random.Random]:
    """The mode of a case, and what its kills are drawn from."""
    rng = forked.rng_of(seed, case)
    return rng.choice(KINDS[ranks]), rng


def check(files: Files, seed: int, case: int) -> int:
    """One run; returns how often a process died: a resumed run may end before its moment comes."""
    mode, rng = drawn(seed, case, files.ranks)
    out = Path(tempfile.mkdtemp(prefix=f"kills{case}-", dir=files.root))
    told, deaths, newest = [], 0, -1
    try:
        while True:
            kills = _draw_kills(rng, files, mode) if len(told) < MOST_KILLS else {}
            done = files.start(mode, out, kills)
            if kills:
                told.append(", ".join(f"rank {r} at {e} + {s:.3f}" for r, (e, s) in kills.items()))
            what = f"{mode}, killed {'; '.join(told)}"
            deaths += bool(_check_codes(what, done, kills))
            newest = _check_checkpoint(what, out, newest)
            if done.codes == [0] * files.ranks:
                break
        _check_equal(what, files.whole[mode], out)
        return deaths
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _draw_kills(rng: random.Random, files: Files, mode: str) -> dict[int, tuple[int, float]]:
    """One moment for one process or, of two, sometimes for both."""
    ranks = list(range(files.ranks))
    if files.ranks > 1 and rng.random() < 0.7:
        ranks = [rng.choice(ranks)]
    kills = {}
    for rank in ranks:
        delay = 0.0 if rng.random() < 0.3 else rng.uniform(1e-4, LATEST)
        kills[rank] = (rng.randint(1, files.events[mode]), delay)
    return kills


def _check_codes(what: str, done: Sitting, kills: dict[int, Any]) -> set[int]:
    """The ranks that died."""
    died = {rank for rank, code in enumerate(done.codes) if code in (-9, -signal.SIGALRM)}
    if not died <= kills.keys():
        raise Failed(f"{what}: exit codes {done.codes}")
    for rank, code in enumerate(done.codes):
        text = " ".join(done.errors[rank].split())
        if rank in died or code == 0:
            continue
        if not died:
            raise Failed(f"{what}: rank {rank} ends with {code}: {text[-300:]}")
        if not re.search(rf"rank {min(died)}\b.* is lost|that the others meet at", text):
            raise Failed(f"{what}: rank {rank} does not name the lost one: {text[-300:]}")
    if died and done.seconds > SURVIVE + 60:  # the run itself takes a while too
        raise Failed(f"{what}: it took {done.seconds:.0f} s to end")
    return died


def _check_checkpoint(what: str, out: Path, before: int) -> int:
    """The step of the newest checkpoint, which must be whole; at least that of before."""
    from variant.errors import UserError
    from variant.training.checkpointer import Checkpointer

    checkpointer = Checkpointer(out, "var")
    if not checkpointer.exists:
        if before >= 0:
            raise Failed(f"{what}: the checkpoint is gone")
        return -1
    try:
        step = checkpointer.read()["step"]
    except UserError as error:
        raise Failed(f"{what}: {error}") from None
    if step < before:
        raise Failed(f"{what}: the newest checkpoint is of step {step}; it was of {before}")
    return step


def _check_equal(what: str, expected: Path, out: Path) -> None:
    from safetensors.torch import load_file

    from tests.robustness.signals import _difference

    for name in ("var-best.safetensors", "model.safetensors"):
        difference = _difference(load_file(out / name), load_file(expected / name))
        if difference:
            raise Failed(f"{what}: {name} differs from that of an undisturbed run in {difference}")
    ours, theirs = _state(out), _state(expected)
    difference = _difference(ours, theirs)
    if difference:
        raise Failed(f"{what}: the checkpoint differs from an undisturbed run's in {difference}")
    names = [sorted(path.name for path in folder.iterdir()) for folder in (out, expected)]
    left = set(names[0]) - set(names[1])
    if left:
        raise Failed(f"{what}: leaves {sorted(left)}")


def _state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint with all of its tensors, without times."""
    import torch

    from variant.training.checkpoint_folder import read_into, stored_tensors
    from variant.training.checkpointer import Checkpointer

    checkpointer = Checkpointer(folder, "var")
    state = checkpointer.read()
    assert state["step"] == STEPS, state["step"]
    if checkpointer.path.is_dir():
        tensors = {
            name: torch.empty(value.shape, dtype=value.dtype)
            for name, value in stored_tensors(checkpointer.path).items()
        }
        read_into(checkpointer.path, tensors)
        state |= {"module": tensors, "ema": None}
    for name in ("seconds", "log"):  # measured
        state.pop(name)
    for entry in state["history"]:
        entry.pop("seconds")
    return state


def main() -> int:
    made: list[Files] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def prepare(arguments: argparse.Namespace) -> str:
        folder = tempfile.TemporaryDirectory(prefix="kills-")
        folders.append(folder)
        ranks, cases = arguments.ranks, forked.cases_of(arguments)
        modes = {drawn(arguments.seed, case, ranks)[0] for case in cases}
        made.append(Files(Path(folder.name), ranks, modes))
        return f" --ranks {ranks}"

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)

    def finish(kills: list[int]) -> list[str]:
        print(f"{sum(kills)} kills")
        return []

    sys.path[:0] = [os.getcwd(), str(Path(__file__).parents[1] / "training")]
    _import_everything()
    return forked.main(
        MODULE,
        lambda seed, case: check(made[0], seed, case),
        forked.option("KILLS", 2),
        LIMITS,
        extra=extra,
        prepare=prepare,
        finish=finish,
    )


def _import_everything() -> None:
    """Forked children need not import again; nothing here starts a thread."""
    import torch._dynamo  # an optimizer imports it at first use
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    import variant.training.var_task  # noqa: F401


if __name__ == "__main__":
    raise SystemExit(main())
