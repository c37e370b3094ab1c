"""CUDA graphs: a graph replays all kernels of a function with one launch.

A generation of VAR-d30 launches about 14,000 kernels. At small batches the time to launch them from
Python, not the GPU, limits the speed. A graph is recorded once per choice of everything that Python
decides (batch size, schedule, filters), and replayed with new labels, image ids, seed and guidance,
which are tensors.
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

from variant.engine.memory import idle_pool_bytes
from variant_kernels import device_lock

Tensors = tuple[Tensor, ...]

# Recordings that are kept. Without a limit, a slider over a filter would fill the GPU with them.
MAX_GRAPHS = 32


@dataclass(frozen=True)
class Recording:
    """replay: runs the kernels again and overwrites outputs.  first: result of the warm-up run."""

    replay: Callable[[], object]
    outputs: Tensors
    first: Tensors


class Recorder(Protocol):
    """Records the kernels that a function launches."""

    def record(self, function: Callable[[], Tensors]) -> Recording:
        """Runs the function at least once. A replay reads the same tensors as the recorded run."""
        ...

    def serialized(self) -> AbstractContextManager[None]:
        """Work queued in this block starts after that of the previous block, on any stream."""
        ...

    def clear(self) -> None:
        """Frees the memory that recordings share; called when no recording is left."""
        ...

    def idle_bytes(self) -> int:
        """Bytes of the memory that recordings share which no result occupies between two calls."""
        ...


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection inside: destroying another graph would invalidate the capture."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Inside, cuBLAS allocates its workspaces anew: in the pool of the graph that is captured.

    It would otherwise go on with those of the warm-up run, which are in the ordinary pool, and
    whoever clears them (as ``torch.compile`` with its own graphs does) would leave the graph with
    freed memory. Cleared again afterwards: no other work may use memory of the pool.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None:  # this torch has no CUDA
        yield
        return
    clear()
    try:
        yield
    finally:
        clear()


class GraphRecorder:
    """Records CUDA graphs into one memory pool: no two run at a time, so tensors may overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all captures, because libraries keep a workspace for each stream. Not
        # torch's capture stream: it belongs to the device that captured first.
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def serialized(self) -> Iterator[None]:
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
            # The warm-up run: libraries allocate workspaces, kernels are compiled and tuned. Its
            # result goes to the first caller. On the stream of the capture, as CUDA requires.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                first = function()
            current.wait_stream(self._stream)
            for tensor in first:
                tensor.record_stream(current)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory meanwhile; in the default mode that is an error.
            recording = torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            )
            locked = device_lock.CAPTURE_OR_TIMING
            with locked, _without_collections(), _own_workspaces(), recording:
                outputs = function()
        return Recording(graph.replay, outputs, first)

    def clear(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()

    def idle_bytes(self) -> int:
        return idle_pool_bytes(self._device, self._pool)


class GraphCache:
    """Recordings by key: recorded at the first use, replayed at later ones.

    Args:
        recorder: a :class:`GraphRecorder` on a GPU.
        max_graphs: recordings that are kept; the least recently used are dropped first.
    """

    def __init__(self, recorder: Recorder, max_graphs: int = MAX_GRAPHS) -> None:
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._recorded: dict[Hashable, tuple[Tensors, Recording, Callable[..., Tensors]]] = {}
        # A recording has one set of input and output tensors: one caller at a time.
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._recorded)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._recorded

    def idle_bytes(self) -> int:
        """Bytes that a recording, and nothing else, may use besides free memory; 0 without any."""
        return self._recorder.idle_bytes() if self._recorded else 0

    def clear(self) -> None:
        """Drop all recordings and free their memory."""
        with self._lock, self._recorder.serialized():
            self._recorded.clear()
            self._recorder.clear()

    def run(self, key: Hashable, function: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """``function(*inputs)`` as new tensors.

        Args:
            key: identifies everything that decides the kernels, including the inputs' shapes.
            function: launches the same kernels for all values of its inputs.
        """
        with self._lock, self._recorder.serialized():
            if key not in self._recorded:
                # Tensors created in inference mode, among them the inputs and the random state of
                # a graph, could not be written to by a later call outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    static = tuple(tensor.clone() for tensor in inputs)
                    recording = self._record(lambda: function(*static))
                # Keep the function: it holds the tensors that the graph reads. Do not keep the
                # first result: it belongs to the caller.
                self._recorded[key] = static, replace(recording, first=()), function
                while len(self._recorded) > self._max_graphs:
                    del self._recorded[next(iter(self._recorded))]
                return recording.first
            static, recording, _ = self._recorded[key] = self._recorded.pop(key)
            for target, source in zip(static, inputs, strict=True):
                target.copy_(source)
            recording.replay()
            # Copied: the next replay, of this recording or another, overwrites this memory.
            return tuple(tensor.clone() for tensor in recording.outputs)

    def _record(self, function: Callable[[], Tensors]) -> Recording:
        try:
            return self._recorder.record(function)
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
        # Here the frame of the failed recording is gone, and its tensors are freed. The pool of
        # earlier graphs cannot be used for anything else, so drop them all and try once more.
        self._recorded.clear()
        self._recorder.clear()
        return self._recorder.record(function)
