"""Triton compiles as for a GPU that is not present.

    with gpu() as h200:
        q_BLHD = torch.empty(2, 680, 30, 64, device="cuda", dtype=torch.bfloat16)
        launch_block_causal_attention_forward(q_BLHD=q_BLHD, ...)
    for launch in h200.launches:
        print(launch.name, launch.grid, launch.registers, launch.asm["ptx"])

Inside the context tensors on ``"cuda"`` have shapes, strides and alignment, and no values. The
launchers of ``variant_kernels.triton_ops`` run unchanged; Triton specialises and compiles their
kernels through its ordinary JIT, so that its cache on disk gets the entries that a process with
such a GPU looks up. No kernel runs. Needs Triton 3.6 or newer, ptxas (in Triton's package), no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from variant_kernels.ops import registry
from variant_kernels.ops.library import NAMESPACE
from variant_kernels.triton_ops import common, tuning
from variant_kernels.triton_ops.tuning import Config

WARP = 32


@dataclass(frozen=True)
class Machine:
    """What launchers and Triton ask a GPU for.

    capability: compute capability. processors: streaming multiprocessors. shared_memory: the most
    bytes that one program can have. registers: 32-bit registers of one processor.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_memory: int
    shared_memory_of_processor: int
    memory: int
    l2_bytes: int
    registers: int = 65536
    threads: int = 2048


H200 = Machine("NVIDIA H200", (9, 0), 132, 232448, 233472, 150_754_820_096, 62_914_560)
A100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 85_094_825_984, 41_943_040)


@dataclass
class Launch:
    """One call of a kernel: what Triton would have handed to the GPU.

    grid: three counts of programs.  arguments: every argument by name, compile-time constants
    included.  kernel: Triton's ``CompiledKernel``.  config: the block sizes where a launcher tries
    several to choose one; None for its final launch.
    """

    name: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    kernel: Any
    config: Config | None

    @property
    def asm(self) -> Mapping[str, Any]:
        """``ttir``, ``ttgir``, ``llir``, ``ptx`` as text, ``cubin`` as bytes."""
        return self.kernel.asm

    @property
    def num_warps(self) -> int:
        """Warps of one program."""
        return self.kernel.metadata.num_warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory of one program."""
        return self.kernel.metadata.shared

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return resources(self.asm["cubin"])[0]

    @cached_property
    def stack(self) -> int:
        """Bytes of the stack of a thread; it holds only spilled registers."""
        return resources(self.asm["cubin"])[1]

    def programs_per_processor(self, machine: Machine = H200) -> int:
        """How many programs fit on one processor at a time, by registers, memory and threads."""
        # Registers are given out to warps in units of 256; 1 KB of shared memory is the system's.
        per_warp = -(-self.registers * WARP // 256) * 256
        return min(
            machine.registers // (per_warp * self.num_warps),
            machine.shared_memory_of_processor // (self.shared + 1024),
            machine.threads // (WARP * self.num_warps),
            32,
        )


@dataclass
class Recording:
    """Everything that was launched on the GPU; ``failures`` are configs that do not fit it."""

    launches: list[Launch] = field(default_factory=list)
    failures: list[tuple[str, Config, str]] = field(default_factory=list)
    # Names of kernels whose machine code the compiler made, or Triton's cache on disk held.
    compiled: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def of(self, name: str) -> list[Launch]:
        """The launches of the kernel with this name."""
        return [launch for launch in self.launches if launch.name == name]


@lru_cache(maxsize=512)
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"offline_triton: cuobjdump printed no registers: {text}")
    return int(match.group(1)), int(match.group(2))


class _Launcher:
    """Stands where Triton's compiled launcher does; ``last`` is the call that it got."""

    last: tuple[Any, ...] | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self._names = source.fn.arg_names

    def __call__(self, x: int, y: int, z: int, *more: Any) -> None:
        # stream, function, packed metadata, launch metadata, two hooks; then the arguments.
        arguments = dict(zip(self._names, more[6:], strict=True))
        _Launcher.last = ((x, y, z), arguments)


class _Utilities:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def get_device_properties(self, device: int) -> dict[str, int]:
        machine = self._machine
        return {
            "max_shared_mem": machine.shared_memory,
            "max_num_regs": machine.registers,
            "multiprocessor_count": machine.processors,
            "warpSize": WARP,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 3_201_000,
            "mem_bus_width": 6144,
        }

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads of a program).

        Without a module, Triton does not ask whatever driver is active later to unload it.
        """
        return None, object(), 0, 0, 1024


class _Driver:
    """What Triton's JIT asks a driver for, answered from a ``Machine``."""

    launcher_cls = _Launcher

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.utils = _Utilities(machine)

    def get_current_target(self) -> GPUTarget:
        major, minor = self._machine.capability
        return GPUTarget("cuda", major * 10 + minor, WARP)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._machine.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def gpu(
    machine: Machine = H200, *, every_config: bool = True, value: int | None = None
) -> Iterator[Recording]:
    """A context in which Triton kernels are launched on a ``machine`` that is not present.

    Args:
        every_config: where a launcher times several block sizes, launch each of them, then the
            first one that fits; else only the first one.
        value: what Python reads from a tensor (``item()``), which has no values; None raises.
    Raises:
        RuntimeError: Triton is interpreting (``TRITON_INTERPRET=1``).
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("offline_triton: kernels are interpreted; unset TRITON_INTERPRET")
    recording = Recording()
    # The config that `best` tries at the moment.
    trying: list[Config | None] = [None]
    launched: list[JITFunction] = []
    run = JITFunction.run

    def compiled(*, src: Any, cache_hit: bool, **_: Any) -> None:
        (recording.found if cache_hit else recording.compiled).append(src.name)

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in launched:
            # A kernel of the process's own GPU, or of an earlier machine.
            self.device_caches.clear()
            launched.append(self)
        _Launcher.last = None
        kernel = run(self, *args, grid=grid, warmup=warmup, **options)
        if _Launcher.last is not None:
            launch = Launch(self.fn.__name__, *_Launcher.last, kernel, trying[0])
            recording.launches.append(launch)
        return kernel

    def best(
        kernel: Any,
        configs: Sequence[Config],
        key: tuple[Any, ...],
        launch: Callable[[Config], object],
        device: torch.device,
    ) -> Config:
        fitting = []
        for config in configs if every_config else ():
            trying[0] = config
            try:
                launch(config)
                fitting.append(config)
            except (OutOfResources, PTXASError, CompilationError) as error:
                recording.failures.append((kernel.__name__, config, str(error)))
        trying[0] = None
        if every_config and not fitting:
            raise RuntimeError(f"{kernel.__name__}: none of its {len(configs)} block sizes fits")
        return fitting[0] if fitting else configs[0]

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_fresh_state(launched))
        enter(knobs.compilation.scope())
        knobs.compilation.listener = compiled
        enter(patch.object(triton.runtime.driver, "_active", _Driver(machine)))
        enter(patch.object(JITFunction, "run", record))
        enter(patch.object(tuning, "best", best))
        for name, replacement in _torch_cuda(machine).items():
            enter(patch.object(torch.cuda, name, replacement))
        enter(patch.object(FakeTensor, "data_ptr", _addresses()))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(_OpsLaunch(value))
        yield recording


_CONVOLUTIONS = (torch.ops.aten._convolution.default, torch.ops.aten.convolution.default)


class _OpsLaunch(TorchDispatchMode):
    """Our ops call their launchers here too; without this only their fakes would run."""

    def __init__(self, value: int | None) -> None:
        super().__init__()
        self._value = value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for op in registry._ops if func.namespace == NAMESPACE else ():
            if func is op.overload:
                return op._run(*args)
            if func is op.gradient:
                return op.run_gradient(*args)
        if self._value is not None and func is torch.ops.aten._local_scalar_dense.default:
            kind = float if args[0].is_floating_point() else int
            return bool(self._value) if args[0].dtype is torch.bool else kind(self._value)
        if func in _CONVOLUTIONS and args[0].device.type == "cuda":
            # The choice of a library would look for the driver; the shape is that on a CPU.
            out = func(*(x.to("cpu") if isinstance(x, torch.Tensor) else x for x in args))
            dense = torch.empty_like(out, device=args[0].device)
            last = args[0].is_contiguous(memory_format=torch.channels_last)
            return dense.to(memory_format=torch.channels_last) if last else dense
        return func(*args, **(kwargs or {}))


def _addresses() -> Callable[[torch.Tensor], int]:
    """``Tensor.data_ptr`` of tensors without memory: one range for each storage.

    The alignment is that of the real address: allocations start at multiples of 512.
    """
    ranges: dict[int, int] = {}

    def data_ptr(tensor: torch.Tensor) -> int:
        number = ranges.setdefault(tensor.untyped_storage()._cdata, 1 + len(ranges) % 2**20)
        return number * 2**40 + tensor.storage_offset() * tensor.element_size()

    return data_ptr


def _torch_cuda(machine: Machine) -> dict[str, Any]:
    """Replacements of functions of ``torch.cuda``."""
    properties = SimpleNamespace(
        name=machine.name,
        major=machine.capability[0],
        minor=machine.capability[1],
        multi_processor_count=machine.processors,
        total_memory=machine.memory,
        L2_cache_size=machine.l2_bytes,
    )
    return {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: machine.capability,
        "get_device_name": lambda device=None: machine.name,
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
    }


@contextmanager
def _fresh_state(launched: list[JITFunction]) -> Iterator[None]:
    """What the process knows of a GPU is forgotten before and after."""
    device_facts = (common.family, common.num_processors, tuning._device_name)
    for fact in device_facts:
        fact.cache_clear()
    try:
        yield
    finally:
        for fact in device_facts:
            fact.cache_clear()
        for kernel in launched:
            kernel.device_caches.clear()
