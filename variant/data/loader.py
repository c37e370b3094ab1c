"""Training samples that are read before they are needed, by worker processes.

What is read when follows from (seed, step, rank): nothing has to be saved, and a run resumes at any
step, with any number of processes and workers.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction, resource_tracker, util
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from variant.data.config import DataSection
from variant.data.images import Indices, epoch_order
from variant.data.samples import Samples, Source
from variant.errors import UserError

PREFETCHED = 2  # parts that each worker reads ahead
# A copy of this process by fork may hang at once: another thread, of gloo, TensorBoard or autograd,
# may hold a lock of the interpreter, which nobody releases in the copy.
START_METHOD = "spawn"
# Windows has no SIGHUP, and no workers here.
WORKER_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# A worker outlives SIGTERM by this, so that the training can finish its step and stop the worker.
SECONDS_AFTER_SIGTERM = 60
# "DataLoader worker (pid 12) is killed by signal: Killed. ", "... (pid(s) 12) exited unexpectedly"
LOST_WORKER = re.compile(r"DataLoader worker \(pid[^.]*?\d\) ([^.]+)")


class Request(NamedTuple):
    """One part of a batch.  indices: of its images.  epoch: from 0."""

    indices: np.ndarray
    epoch: int


@dataclass(frozen=True)
class Plan(Sampler[Request]):
    """The parts that one rank trains on, in order: a function of (seed, step, rank).

    num_train: images of the data set.  batch_size: images of a step, over all ranks.
    own_parts: a batch -> this rank's images of each of the parts in which it is computed.
    first_step, total_steps: the steps that are planned, the last one excluded.
    steps_per_epoch: 0 is a pass over the images.
    """

    seed: int
    num_train: int
    batch_size: int
    own_parts: Callable[[np.ndarray], list[np.ndarray]]
    first_step: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 0

    def __iter__(self) -> Iterator[Request]:
        order, ordered_epoch = np.empty(0, np.int64), -1
        per_epoch = self.steps_per_epoch or self.num_train // self.batch_size
        for step in range(self.first_step, self.total_steps):
            epoch, position = divmod(step, per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = epoch_order(self.seed, epoch, self.num_train), epoch
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            for indices in self.own_parts(batch):
                yield Request(indices, epoch)


class _AnyNumberOfWorkers(DataLoader[Any]):
    """Without torch's advice, at its making and its start, to have no more workers than cores: the
    default of a recipe has more than a small machine, and who waits for a disk may want more."""

    def check_worker_number_rationality(self) -> None:
        pass


class Loader:
    """Reads the samples of a plan ahead, by a DataLoader that starts at the first request.

    Args:
        workers: processes that read; 0 reads in this one when a sample is asked for. Only Linux has
            them. They are new processes, which import the script that was started: it must begin
            the training under ``if __name__ == "__main__":``.
        pin: whether samples are in pinned memory, from which a GPU copies without a wait.
    Raises:
        UserError: there is no space for the temporary file that tells workers what they read.
    """

    def __init__(self, source: Source, plan: Plan, workers: int, *, pin: bool) -> None:
        self.source = source
        self.workers = workers if sys.platform == "linux" else 0
        self._loader = _AnyNumberOfWorkers(
            _SharedReader(source) if self.workers else _Reader(source),
            batch_size=None,  # the plan's requests are batches
            sampler=plan,
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=pin,
            prefetch_factor=PREFETCHED if self.workers else None,
            multiprocessing_context=START_METHOD if self.workers else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it draws from the global one
        )
        self._iterator: Iterator[Any] | None = None

    def samples(self, indices: Indices, epoch: int) -> Samples:
        """The next samples of the plan, which must be these.

        Raises:
            UserError: an image cannot be read, or the workers cannot be started.
        """
        if self._iterator is None:
            self._iterator = self._start() if self.workers else iter(self._loader)
        request, samples = next(self._iterator)
        if request.epoch != epoch or not np.array_equal(request.indices, indices):
            raise AssertionError(f"the plan's next samples are {request}, not {indices}, {epoch}")
        if isinstance(samples, UserError):
            raise samples
        if self.workers:
            self.source.bad.add(samples.bad)  # a worker only lists them
        return samples

    def _start(self) -> Iterator[Any]:
        _check_locks()
        # A signal that comes while a worker imports its modules waits for the worker's handlers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, WORKER_SIGNALS)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def close(self) -> None:
        """Stop the workers; what was read ahead is lost."""
        self._iterator = None


@contextmanager
def reading_ahead(source: Source, plan: Plan, workers: int, *, pin: bool) -> Iterator[Loader]:
    """A :class:`Loader` within the block, in which the end of a worker is one line.

    Raises:
        UserError: a worker ended by itself. torch raises RuntimeError then, from a handler of
            signals: anywhere in the block.
    """
    loader = Loader(source, plan, workers, pin=pin)
    try:
        yield loader
    except RuntimeError as error:
        found = LOST_WORKER.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"a process that reads images {found[1]}; if memory was short, set data.workers lower. "
            'A script must start a training under `if __name__ == "__main__":`'
        ) from None
    finally:
        loader.close()


def refuse_in_worker() -> None:
    """Raises: UserError, if a new worker is importing the script that started the training."""
    # The attribute by which multiprocessing itself knows.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a process that reads images imports the script that started the training, and the "
            'script starts another; put the call under `if __name__ == "__main__":`'
        )


class _Reader(Dataset[Any]):
    """Samples by request; an error that names a file travels as a value, without a traceback."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, request: Request) -> tuple[Request, Samples | UserError]:
        try:
            return request, self.source.samples(request.indices, request.epoch)
        except UserError as error:
            return request, UserError(str(error))


class _SharedReader(_Reader):
    """Samples by request in a worker, which gets the source from an unnamed temporary file.

    A process is started through a pipe, which the parent fills as the child reads: with a source in
    it, workers would import their modules one after another.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        folder = "the temporary folder"
        try:
            folder = tempfile.gettempdir()  # raises where there is none
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  the workers' descriptors are its
            # The usual pickler: that of processes would put tensors into shared memory.
            pickle.dump(source, self._file, pickle.HIGHEST_PROTOCOL)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{folder}: the list of what workers read cannot be written: "
                f"{error.strerror or error}. TMPDIR can name another folder"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited_reader, (reduction.DupFd(self._file.fileno()),)


def _inherited_reader(shared: Any) -> _Reader:
    descriptor = shared.detach()
    # Not read(): the place in the file is common to all workers.
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        source = pickle.loads(content)
    os.close(descriptor)
    return _Reader(source)


def _check_locks() -> None:
    """Workers need locks, which take shared memory; torch leaves half an iterator without them."""
    _start_tracker()
    try:
        multiprocessing.get_context(START_METHOD).Lock()
    except OSError as error:
        reason = f" ({error.strerror})" if error.errno else ""  # 0 where only a part was written
        raise UserError(
            "processes that read images cannot be started: too little shared memory; free some in "
            f"/dev/shm{reason}"
        ) from None


def _start_tracker() -> None:
    """Start the process of multiprocessing that removes the locks of a training that was killed.

    It would print a warning then, below the last line of the training; a process takes the filters
    of warnings from the options of the one that starts it.
    """
    silent = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(silent)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(silent)


def num_workers(section: DataSection) -> int:
    """Workers that a source needs: decoding files takes long, reading tokens a little."""
    return {"folder": section.workers, "tokens": min(section.workers, 1)}.get(section.kind, 0)


def _unchanged(value: Any) -> Any:
    return value


def _begin_worker(worker: int) -> None:
    # Ctrl-C and the SIGHUP of a closed terminal reach the whole group of processes, SIGTERM perhaps
    # too: the training stops after its step, and stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WORKER_SIGNALS)
    # torch's worker looks for another parent than at its start: a training that was killed while
    # this process imported its modules had been replaced before.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The last of multiprocessing's own steps at the end of a process. The interpreter's would come
    # next, and abort the process where they stop the thread that hands over samples inside torch.
    util.Finalize(None, os._exit, args=(0,), exitpriority=-100)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
