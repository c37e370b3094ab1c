"""The processes of one training run, as torchrun starts them: what they share and agree on.

A process is called by its rank, 0 to size - 1. The functions of a run with one process do nothing.
"""

from __future__ import annotations

import gc
import hashlib
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from variant.data.loader import refuse_in_worker
from variant.errors import UserError
from variant.training.heartbeat import Heartbeat
from variant.training.interrupt import Interrupt

# Lost processes are noticed by their heartbeat, so a long pause, e.g. for a file, is no error.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
MEETING_TIMEOUT = timedelta(minutes=5)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The processes of a run, seen from one of them; only rank 0 prints and writes files.

    Every method is called by all processes, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` things, which are divided evenly and in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def parts(self, batch: np.ndarray, count: int) -> list[np.ndarray]:
        """This rank's images of each of ``count`` parts of a batch.

        A part is the same images for any number of ranks. Losses that are no means over images,
        such as the adaptive weight or the entropy term, are therefore the same, too.
        """
        return [part[self.share(len(part))] for part in np.array_split(batch, count)]

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, bit-equal on every rank."""
        if self.size == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device="cpu")
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own)
        # Added in the order of the ranks: sums inside the operation may differ between ranks.
        return np.sum([part.numpy() for part in gathered], axis=0).tolist()

    def added(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on its device and bit-equal on every rank."""
        if self.size == 1:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous())
        return torch.stack(gathered).sum(dim=0, dtype=values.dtype)  # in the order of the ranks

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, device="cpu")
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of the ranks; it must be one that pickle takes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def require_same(self, what: str, value: str) -> None:
        """Check that every rank has the same text.

        Raises:
            UserError: naming the first two values that differ and their ranks.
        """
        if self.size == 1:
            return
        number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        # One operation for both: the least number is minus the largest of the negated ones.
        limits = torch.tensor((number, -number), device="cpu")
        dist.all_reduce(limits, dist.ReduceOp.MAX)
        if limits[0] == -limits[1]:
            return
        values = self.gathered(value)
        other = next(rank for rank in range(self.size) if values[rank] != values[0])
        raise UserError(
            f"all processes must have the same {what}; rank 0 has {values[0]:.300}, rank {other} "
            f"has {values[other]:.300}"
        )

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """Rank 0 runs the block first, then all other ranks run it."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()


def rank_of_environment() -> tuple[int, int]:
    """Rank and number of processes, from the variables that torchrun sets; (0, 1) without them.

    Raises:
        UserError: only some of them are set, or they are no numbers.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < size:
            raise ValueError
    except ValueError:
        raise UserError(
            "the variables RANK and WORLD_SIZE must be numbers with 0 <= RANK < WORLD_SIZE, as "
            f"torchrun sets them; got {os.environ.get('RANK')!r:.50} and "
            f"{os.environ['WORLD_SIZE']!r:.50}"
        ) from None
    missing = [name for name in VARIABLES if size > 1 and name not in os.environ]
    if missing:
        raise UserError(
            f"the variables {', '.join(missing)} must be set, because WORLD_SIZE is {size}; start "
            "the processes by torchrun"
        )
    return rank, size


def device_of_rank() -> torch.device:
    """The GPU of this process where there are GPUs, else the CPU.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or LOCAL_RANK is no number.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rank_of_environment()[1] == 1:
        return torch.device("cuda")
    local, count = local_rank(os.environ), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine has no GPU: there are {count}; start at most as many "
            f"processes (--nproc-per-node {count})"
        )
    return torch.device("cuda", local)


def local_rank(environment: Mapping[str, str]) -> int:
    """The number of this process on its machine, by torchrun's variable LOCAL_RANK; 0 without it.

    Raises:
        UserError: no such number.
    """
    word = environment.get("LOCAL_RANK", "0")
    try:
        local = int(word)
        if local < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"the variable LOCAL_RANK must be an integer >= 0, as torchrun sets it; got "
            f"{word!r:.50}"
        ) from None
    return local


@contextmanager
def connected(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone; connected within the block.

    If a process is lost, the others end: the block raises, or, if it waits for the lost one, the
    process prints a line and exits with code 1, within 60 seconds.

    Raises:
        UserError: a process does not come within 5 minutes; a process is lost; this is a worker
            that reads images for another training.
    """
    refuse_in_worker()
    rank, size = rank_of_environment()
    if size == 1:
        yield Ranks()
        return
    if dist.is_initialized():
        raise UserError(
            "torch.distributed must not be initialized: training does it with its own time limits"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    heartbeat = _meet(device, rank, size)
    try:
        yield Ranks(rank, size)
        dist.barrier()
    except BaseException as error:
        _leave(heartbeat, error)
        raise
    heartbeat.end()
    gc.collect()
    dist.destroy_process_group()
    heartbeat.stop()


def _meet(device: torch.device, rank: int, size: int) -> Heartbeat:
    """Connect to the other processes; returns a heartbeat that runs."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=MEETING_TIMEOUT)))
        store = PrefixStore("variant", store)
        own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        heartbeat = Heartbeat(PrefixStore("heartbeat", own), rank, size)
        for other in range(size):
            _wait_for(store, other)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:  # torch.distributed's are RuntimeErrors
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"rank {rank} cannot connect to the others at {where}: {reason}") from error
    heartbeat.start()
    return heartbeat


def _wait_for(store: Any, other: int) -> None:
    try:
        store.wait([f"heartbeat/heartbeat/{other}"], MEETING_TIMEOUT)
    except RuntimeError:
        minutes = MEETING_TIMEOUT.total_seconds() / 60
        raise UserError(f"rank {other} did not start within {minutes:.0f} minutes") from None


def _leave(heartbeat: Heartbeat, error: BaseException) -> None:
    """Close the connection after an error.

    Raises:
        UserError: the error is that another process is lost.
    """
    errors = [error]
    if isinstance(error, KeyboardInterrupt) and error.__context__ is not None:
        # torchrun sends SIGTERM as soon as a process is lost: it came while the error was handled.
        errors.append(error.__context__)
    # Errors of torch.distributed are RuntimeErrors; a UserError is this process's own.
    failed = isinstance(errors[-1], RuntimeError)
    with Interrupt().listening():  # nor does SIGTERM end the search
        reason = heartbeat.reason() if failed else None
    own = "" if isinstance(error, SystemExit) else " ".join(f"{error}".split())[:500]
    if own == "" and not isinstance(error, SystemExit):
        own = type(error).__name__
    heartbeat.leave_soon(reason or own)
    heartbeat.end(own)
    # The frames of the traceback hold the model; DistributedDataParallel must be deleted before the
    # group: else its reducer deletes the group and, while it holds the interpreter's lock, waits
    # for a thread that needs the lock (torch 2.13).
    for one in errors:
        traceback.clear_frames(one.__traceback__)
    gc.collect()
    with suppress(RuntimeError):
        dist.destroy_process_group()
    heartbeat.stop()
    if reason is not None:
        raise UserError(f"rank {heartbeat.rank}: {reason}") from error
