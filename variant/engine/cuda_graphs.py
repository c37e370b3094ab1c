"""Captured functions: on a GPU one graph replays all that a generation launches.

A generation of VAR-d30 is some 14,000 launches; issued from Python they, and not the GPU, set the
time at small batches. A graph is recorded once for everything that Python decides (batch, schedule,
filters) and replayed with new labels, image ids, seed and guidance, which are tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from variant_kernels import device_lock

Tensors = tuple[Tensor, ...]

# Recordings that wait for the next call: a slider over top_p must not fill the GPU with graphs.
KEPT = 32


@dataclass(frozen=True)
class Recording:
    """replay repeats what was recorded and fills outputs; first is what the function gave."""

    replay: Callable[[], object]
    outputs: Tensors
    first: Tensors


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, function: Callable[[], Tensors]) -> Recording:
        """The function runs at least once; it reads no tensor that a replay must not read."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside, work is queued behind that of the last turn, whatever stream it was on."""
        ...

    def forget(self) -> None:
        """No recording is left: give back the memory that they shared."""
        ...


@contextmanager
def _without_collections() -> Iterator[None]:
    """A graph that the garbage collector destroys meanwhile would end a capture."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class GraphRecorder:
    """CUDA graphs that share one memory pool: they never run at once, so tensors may overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Its own, and one for all: torch's belongs to the device that captured first, and
        # libraries keep a workspace for every stream that they meet.
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None:
            stream.wait_event(self._last)
        try:
            yield
        finally:
            self._last = torch.cuda.Event()
            self._last.record(stream)

    def record(self, function: Callable[[], Tensors]) -> Recording:
        with torch.cuda.device(self._device):
            # Once as it is: libraries allocate workspaces, kernels are compiled and tuned, and its
            # result is the first caller's. On a stream of its own, as capture demands.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                first = function()
            current.wait_stream(self._stream)
            for tensor in first:
                tensor.record_stream(current)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating: by default that would end the capture.
            recording = torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            )
            with device_lock.CAPTURE_OR_TIMING, _without_collections(), recording:
                outputs = function()
        return Recording(graph.replay, outputs, first)

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()


class Captures:
    """Recordings by key: made at the first use, replayed at the later ones.

    Args:
        recorder: what records; a :class:`GraphRecorder` on a GPU.
        kept: recordings beyond so many go, those first that were not used for longest.
    """

    def __init__(self, recorder: Recorder, kept: int = KEPT) -> None:
        self._recorder = recorder
        self._kept = kept
        self._recorded: dict[Hashable, tuple[Tensors, Recording, Callable[..., Tensors]]] = {}
        # Inputs and outputs of a recording are one set of tensors: one caller at a time.
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, key: Hashable, function: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """``function(*inputs)``, new tensors.

        Args:
            key: all that ``function`` depends on beyond its inputs, their shapes included.
            function: launches the same work whatever its inputs hold.
        """
        with self._lock, self._recorder.turn():
            if key not in self._recorded:
                # What inference mode makes, the inputs and the random state of a graph among it,
                # could not be written to by a later call outside it.
                with torch.inference_mode(False), torch.no_grad():
                    static = tuple(tensor.clone() for tensor in inputs)
                    recording = self._record(lambda: function(*static))
                # The function is kept, and with it all that the recorded work still reads; the
                # first result is the caller's alone.
                self._recorded[key] = static, replace(recording, first=()), function
                while len(self._recorded) > self._kept:
                    del self._recorded[next(iter(self._recorded))]
                return recording.first
            static, recording, _ = self._recorded[key] = self._recorded.pop(key)
            for target, source in zip(static, inputs, strict=True):
                target.copy_(source)
            recording.replay()
            # The next replay, of this recording or another, writes where these lie.
            return tuple(tensor.clone() for tensor in recording.outputs)

    def _record(self, function: Callable[[], Tensors]) -> Recording:
        try:
            return self._recorder.record(function)
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
        # Out here nothing holds what it had made. What earlier recordings share is no other's to
        # use, however idle: they make room, and are recorded again when they are wanted.
        self._recorded.clear()
        self._recorder.forget()
        return self._recorder.record(function)
