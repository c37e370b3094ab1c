"""Compiles here what a run would compile there: libraries, and the Triton kernels that it launches.

    make gpu-artefacts
    python -m benchmarks.gpu.artefacts [--out build/gpu-artefacts] [--jobs 2] [--check]

It runs under the Python, torch and Triton of the GPU machine, without a GPU
(``benchmarks.offline_triton``), and after ``setup.py build_ext --inplace`` for that Python. The
folder it writes, a few MB, travels with the checkout. ``--check`` runs everything again in a new
process and counts what is not found in the cache.

An entry of Triton's cache is found again where Triton's version, its ptxas, the kernel's source and
the arguments' types and alignment are the same. Another build of the same Triton version has other
keys: ``unpack`` renames the entries for it. A miss costs a second of compiling; the run counts
misses.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.gpu import processes
from benchmarks.gpu.settings import GPU, Settings
from benchmarks.gpu.unpack import ARCHIVE, MANIFEST, digest_of_sources

ROOT = Path(__file__).resolve().parents[2]
# With the checkout it must be less than the 64 MiB that may travel.
MOST_BYTES = 40 * 2**20
LIBRARIES = ("_C" + sysconfig.get_config_var("EXT_SUFFIX"), "_cuda.so")
# Packages that a machine with torch may lack, by import name, with what each of them needs besides.
PACKAGES = {
    "pydantic": ("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    "pytest_timeout": ("pytest-timeout",),
    "hypothesis": ("hypothesis", "sortedcontainers"),
}
CASE_SECONDS = 900
# Of a kernel's files a launch needs these only; the assembly texts are ten times as large.
KEPT = (".cubin", ".json", ".so")
FILTERS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}

Case = tuple[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a case failed or, with --check, was not found.

    Raises:
        SystemExit: this torch has no CUDA, or what travels is incomplete or too large.
    """
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.artefacts")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-artefacts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="count what the cache lacks")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if torch.version.cuda is None:
        raise SystemExit(
            f"benchmarks.gpu.artefacts: torch {torch.__version__} was built without CUDA, and does "
            "not know tensors of a GPU; install one with CUDA (ARTEFACTS_PACKAGES), which needs no "
            "GPU"
        )
    cache = options.out / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        index, count = map(int, options.part.split("/"))
        return compile_part(cache, index, count, options.only)
    command = [sys.executable, "-m", "benchmarks.gpu.artefacts", "--out", str(options.out)]
    command += ["--only", options.only]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen([*command, "--part", f"{index}/{options.jobs}"], env=environment)
        for index in range(options.jobs)
    ]
    statuses = [job.wait() for job in jobs]
    failed = any(statuses)
    reports = [
        json.loads((options.out / f"part-{index}.json").read_text())
        for index in range(options.jobs)
    ]
    compiled = sum(report["compiled"] for report in reports)
    found = sum(report["found"] for report in reports)
    print(f"{compiled} kernels compiled, {found} found in the cache")
    if options.check:
        return int(failed or compiled > 0)
    tails = {key: tail for report in reports for key, tail in report["tails"].items()}
    _write(options.out, cache, tails)
    return int(failed)


# --- what is compiled -----------------------------------------------------------------------------


def compile_part(cache: Path, index: int, count: int, only: str) -> int:
    """Compile every ``count``-th case, each in a process of its own; the report goes beside the
    cache, what the processes print into ``log.txt``."""
    import torch  # once for all processes

    assert not torch.cuda.is_initialized()
    total: dict[str, Any] = {"compiled": 0, "found": 0, "tails": {}, "failed": []}
    for number, (name, case) in enumerate(cases(GPU)):
        if number % count != index or only not in name:
            continue
        began = time.monotonic()
        report = cache.parent / f"case-{number}.json"
        report.unlink(missing_ok=True)
        child = processes.fork(
            lambda case=case, report=report: _compile_case(case, report), cache.parent / "log.txt"
        )
        status = processes.wait(child, began + CASE_SECONDS)
        done = json.loads(report.read_text()) if report.exists() else {"launches": 0}
        for field in ("compiled", "found"):
            total[field] += done.get(field, 0)
        total["tails"] |= done.get("tails", {})
        if status != 0:
            total["failed"].append(name)
        print(
            f"{name}: {done['launches']} launches, {done.get('compiled', 0)} compiled, "
            f"{done.get('unfit', 0)} do not fit, {time.monotonic() - began:.0f} s"
            + ("" if status == 0 else f"; FAILED with {status}, see log.txt"),
            flush=True,
        )
        report.unlink(missing_ok=True)
    (cache.parent / f"part-{index}.json").write_text(json.dumps(total))
    return int(bool(total["failed"]))


def _compile_case(case: Callable[[], object], report: Path) -> None:
    """In the process of a case; what was compiled before an error counts."""
    from benchmarks.offline_triton import gpu

    with _tails() as tails, _launchers(), _double_of_torch(), gpu(value=1) as launched:
        try:
            case()
        finally:
            facts = {
                "launches": len(launched.launches),
                "compiled": len(launched.compiled),
                "found": len(launched.found),
                "unfit": len(launched.failures),
                "tails": tails,
            }
            report.write_text(json.dumps(facts))


def cases(settings: Settings) -> Iterator[Case]:
    """(name, function that launches every kernel of it) of everything that a run measures."""
    for op, name in dict.fromkeys((*settings.kernels, *settings.compiled)):
        yield f"{op} {name}", lambda op=op, name=name: _bench_case(op, name)
    for batch in settings.batches:
        yield f"engine, batch {batch}", lambda batch=batch: _engine(settings, batch)
    yield "training step", lambda: _training(settings)
    yield "largest batch", lambda: _engine(settings, max(settings.memory_small))
    yield from _smoke()


def _bench_case(op: str, name: str) -> None:
    """Our implementations of a case of a bench file."""
    import torch

    module = importlib.import_module(f"benchmarks.bench_{op}")
    (case,) = (case for case in module.CASES if case.name == name)
    comparison = module.build(case, "cuda", True)
    with torch.enable_grad() if comparison.gradient else torch.inference_mode():
        for implementation in ("triton", "op", "two-ops", "exact"):
            call = comparison.calls.get(implementation)
            if call is not None:
                call()


def _engine(settings: Settings, batch: int) -> None:
    import torch

    from variant.bench.models import build

    var, vae = build(settings.model, "cuda")
    for engine in _engines(var, vae, dtype=getattr(torch, settings.dtype)):
        for depth in (settings.depths[0], settings.depths[-1]):
            engine.generate(
                list(range(batch)),
                depth=depth,
                bridge=settings.bridge,
                max_batch=batch,
                seed=0,
                **FILTERS,
            )


def _engines(var: Any, vae: Any, **options: Any) -> Iterator[Any]:
    """An engine with graphs and one without: kernels of a graph get their numbers as tensors, so
    that Triton compiles them apart."""
    from variant.engine.engine import Engine

    yield Engine(var, vae, **options)
    yield Engine(var, vae, **options, capture=False)


def _training(settings: Settings) -> None:
    from benchmarks.training_step import TrainingSteps

    steps = TrainingSteps(
        Namespace(
            model=settings.model,
            batch=settings.training_batch,
            depths=list(settings.training_depths),
            bridge=settings.bridge,
            dtype=settings.dtype,
            device="cuda",
            var_repo=None,
        )
    )
    for call in steps.calls.values():
        call()


def _smoke() -> Iterator[Case]:
    """The launches of the smoke tests, up to where a test looks at values."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    module = importlib.import_module("tests.gpu.test_small_cases")
    for name, test in vars(module).items():
        if name.startswith("test_"):
            marks = [m for m in test.pytestmark if m.name == "parametrize"]
            for values in product(*(mark.args[1] for mark in marks)):
                arguments = {mark.args[0]: v for mark, v in zip(marks, values, strict=True)}
                yield f"{name} {list(arguments.values())}", lambda t=test, a=arguments: _blind(t, a)
    yield "golden model", _golden


def _blind(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    # An assertion about values, after the launches.
    with suppress(DataDependentOutputException):
        test(**arguments)


def _golden() -> None:
    import torch

    from benchmarks.golden_weights import golden_configs
    from variant.models.var import VAR
    from variant.models.vqvae import VQVAE

    facts, var_config, vae_config = golden_configs("plain")
    with torch.device("cuda"):
        var, vae = VAR(var_config), VQVAE(vae_config)
    for module in (var, vae):
        module.to("cuda").eval().requires_grad_(False)
    labels_B = torch.zeros(2, dtype=torch.int64, device="cuda")
    tokens_BL = torch.zeros(2, var.layout.total, dtype=torch.int64, device="cuda")
    depths = (None, facts["subnet"]["depth"])
    with torch.autocast("cuda", torch.bfloat16):
        x_teacher = vae.teacher_input(tokens_BL)
        for depth in depths:
            var(labels_B, x_teacher, var.schedule(depth))
    for dtype in (torch.float32, torch.bfloat16):
        for engine in _engines(var, vae, dtype=dtype, backend="triton"):
            for depth in depths:
                engine.forced_logits(labels_B, tokens_BL, depth=depth)
                engine.generate(labels_B, depth=depth, cfg=4.0, top_k=1, seed=0)
                engine.generate(labels_B, depth=depth, seed=3)
            engine.generate(labels_B, seed=3, top_k=40, top_p=0.9)


# --- doubles --------------------------------------------------------------------------------------


@contextmanager
def _double_of_torch() -> Iterator[None]:
    """What the engine and the bench files ask torch.cuda for, beyond what launches ask."""
    import torch
    from torch import nn

    from variant.engine import engine
    from variant.engine.cuda_graphs import Recording

    class Event:
        def __init__(self, **options: Any) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            pass

        synchronize = wait = record

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    class Recorder:
        """Of graphs: launches what would be recorded."""

        def serialized(self) -> AbstractContextManager[None]:
            return nullcontext()

        def record(self, function: Any) -> Any:
            outputs = function()
            return Recording(lambda: None, outputs, outputs)

        def clear(self) -> None:
            pass

        def idle_bytes(self) -> int:
            return 0

    class Generator(torch.Generator):
        """One of the GPU would look for its driver."""

        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls)

    def unchanged(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return tensor

    def moved(module: Any, *arguments: Any, **options: Any) -> Any:
        """``Module.to``, which exchanges tensors in a way that those without values refuse."""
        values = (*arguments, *options.values())
        dtype = next((value for value in values if isinstance(value, torch.dtype)), None)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    kind = dtype if buffer.is_floating_point() else None
                    part._buffers[name] = buffer.to("cuda", kind)
            for name, parameter in part._parameters.items():
                if parameter is not None and dtype not in (None, parameter.dtype):
                    cast = parameter.detach().to(dtype)
                    part._parameters[name] = nn.Parameter(cast, parameter.requires_grad)
        return module

    with ExitStack() as stack:
        for name, value in {
            "Event": Event,
            "current_stream": lambda device=None: None,
            "mem_get_info": lambda device=None: (140 * 2**30, 141 * 2**30),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(patch.object(engine, "new_recorder", lambda device: Recorder()))
        stack.enter_context(patch.object(nn.Module, "to", moved))
        # Else autocast is off where torch finds no GPU.
        amp = "amp_definitely_not_available"
        stack.enter_context(patch.object(torch.cuda.amp.common, amp, lambda: False))
        stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
        # torch's own engine would look for the driver.
        stack.enter_context(patch.object(torch.autograd, "grad", _grad))
        stack.enter_context(patch.object(torch.Tensor, "backward", _backward))
        # Initial values do not exist here, and drawing them is not possible.
        for name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
            stack.enter_context(patch.object(nn.init, name, unchanged))
        yield


def _grad(output: Any, inputs: Sequence[Any], grad: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad``, whose results have no values: every node of the graph runs once."""
    import torch

    _run_nodes(output, grad)
    return tuple(torch.empty_like(x) for x in inputs)


def _backward(output: Any) -> None:
    """``Tensor.backward``."""
    _run_nodes(output, output.new_ones(output.shape))


def _run_nodes(output: Any, grad: Any) -> None:
    grads: dict[Any, dict[int, Any]] = {output.grad_fn: {output.output_nr: grad}}
    while grads:
        # Created last, differentiated first.
        node = max(grads, key=lambda node: node._sequence_nr())
        given = grads.pop(node)
        if hasattr(node, "variable"):
            node.variable.grad = given[0]
            continue
        differentiate = getattr(node, "apply", node)
        results = differentiate(*(given.get(at) for at in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        edges = node.next_functions
        if hasattr(node, "needs_input_grad"):
            # A function in Python returns a gradient for every argument, tensor or not.
            pairs = zip(results, node.needs_input_grad, strict=True)
            results = [result for result, needed in pairs if needed]
            edges = [edge for edge in edges if edge[0] is not None]
        for (following, at), result in zip(edges, results, strict=False):
            if following is not None and result is not None:
                # As torch does: broadcast axes are summed, the dtype is that of the forward pass.
                like = getattr(following, "variable", None)
                if like is None:
                    like = following._input_metadata[at]
                result = result.sum_to_size(tuple(like.shape)).to(like.dtype)
                sums = grads.setdefault(following, {})
                sums[at] = sums[at] + result if at in sums else result


@contextmanager
def _tails() -> Iterator[dict[str, str]]:
    """Keys of entries without the part that identifies Triton's build, by the entry's folder."""
    from triton.compiler import compiler
    from triton.runtime.cache import _base32, get_cache_key, triton_key

    tails: dict[str, str] = {}

    def remember(src: Any, backend: Any, options: Any, env_vars: Any) -> str:
        key = get_cache_key(src, backend, options, env_vars=env_vars)
        tail = key.removeprefix(triton_key())
        tails[_base32(hashlib.sha256(key.encode()).hexdigest())] = tail
        return key

    with patch.object(compiler, "get_cache_key", remember):
        yield tails


@contextmanager
def _launchers() -> Iterator[None]:
    """Compile the C functions with which Triton launches kernels; they are cached entries too."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    from benchmarks import offline_triton

    if not hasattr(driver, "make_launcher"):  # later versions launch by one function
        yield
        return
    begin = offline_triton._Launcher.__init__

    def and_compile(self: Any, source: Any, metadata: Any) -> None:
        begin(self, source, metadata)
        constants = {
            (source.fn.arg_names.index(at),) if isinstance(at, str) else at: value
            for at, value in source.constants.items()
        }
        text = driver.make_launcher(
            constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None)
        )
        _cached_module(text, "__triton_launcher", build, driver)

    _cached_module((Path(driver.dirname) / "driver.c").read_text(), "cuda_utils", build, driver)
    with patch.object(offline_triton._Launcher, "__init__", and_compile):
        yield


def _cached_module(text: str, name: str, build: Any, driver: Any) -> None:
    """What ``build.compile_module_from_src`` leaves in the cache; it is not loaded here."""
    from triton.runtime.cache import get_cache_manager

    file = name + sysconfig.get_config_var("EXT_SUFFIX")
    # platform.architecture() names the format only where the program `file` is installed.
    platform = build.platform_key()
    bare = platform.removesuffix("ELF")
    caches = [
        get_cache_manager(hashlib.sha256((text + key).encode()).hexdigest())
        for key in (bare, bare + "ELF")
    ]
    if all(cache.get_file(file) for cache in caches):
        return
    with tempfile.TemporaryDirectory() as folder:
        # The driver's library is on the GPU machine; its name is enough for linking.
        stub = Path(folder) / "libcuda.so.1"
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run([*command, "-o", str(stub)], check=True)
        source = Path(folder) / f"{name}.c"
        source.write_text(text)
        library = build._build(
            name,
            str(source),
            folder,
            [driver.libdevice_dir, folder],
            driver.include_dirs,
            driver.libraries,
            [],
        )
        for cache in caches:
            cache.put(Path(library).read_bytes(), file, binary=True)


# --- the folder -----------------------------------------------------------------------------------


def _write(out: Path, cache: Path, tails: dict[str, str]) -> None:
    """The archive and its manifest.

    Raises:
        SystemExit: a library is missing, or the archive is too large.
    """
    import triton
    from triton.runtime.cache import triton_key

    from variant.bench.environment import commit_of_package

    folder = ROOT / "variant_kernels"
    missing = [name for name in LIBRARIES if not (folder / name).exists()]
    if missing:
        raise SystemExit(
            f"benchmarks.gpu.artefacts: not built: {', '.join(missing)}; run VARIANT_CUDA=1 "
            'VARIANT_CUDA_ARCHS="90a" python setup.py build_ext --inplace with this Python'
        )
    packages = {name: _files_of(name, needed) for name, needed in PACKAGES.items()}
    with tarfile.open(out / ARCHIVE, "w:xz") as archive:
        for name in LIBRARIES:
            archive.add(folder / name, f"libraries/{name}")
        for package, files in packages.items():
            for name, path in files:
                archive.add(path, f"packages/{package}/{name}")
        for path in sorted(cache.rglob("*")):
            if path.suffix in KEPT:
                archive.add(path, f"triton/{path.relative_to(cache)}")
    manifest = {
        "soabi": sysconfig.get_config_var("SOABI"),
        "sources": digest_of_sources(ROOT),
        "packages": list(PACKAGES),
        # A copy of the checkout without its repository cannot say it.
        **commit_of_package(),
        "triton": triton.__version__,
        "triton_key": triton_key(),
        "tails": tails,
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size = sum((out / name).stat().st_size for name in (ARCHIVE, MANIFEST))
    print(f"{len(tails)} Triton kernels, {size / 2**20:.1f} MiB: {out}")
    if size > MOST_BYTES:
        raise SystemExit(f"benchmarks.gpu.artefacts: more than {MOST_BYTES / 2**20:.0f} MiB")


def _files_of(package: str, distributions: Sequence[str]) -> list[tuple[str, Path]]:
    """(path below a folder of packages, file) of everything that these distributions installed.

    Raises:
        SystemExit: one is not installed.
    """
    found = []
    for name in distributions:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError as error:
            raise SystemExit(
                f"benchmarks.gpu.artefacts: {package} travels with {name}, which is not installed "
                f"here; {sys.executable} -m pip install {name}"
            ) from error
        # Not scripts, which are outside the folder, nor what Python compiled.
        found += [
            (str(file), Path(str(file.locate())))
            for file in files
            if ".." not in file.parts and file.suffix != ".pyc"
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
