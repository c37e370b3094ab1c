"""The steps of a run, the one that tells most in a second first.

A step is prepared once in its process, then measures its items in turn and records each result as
soon as it is known. What it prints goes to the log.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Run
from benchmarks.gpu.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FILTERS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
# Kernels that a profile lists; a generation has about 30 different ones.
PROFILED_KERNELS = 80


@dataclass
class Session:
    """What a step works with: where results go, what is measured, and the step's own name."""

    run: Run
    settings: Settings
    step: str

    def add(self, kind: str, name: str, data: Any, began: float) -> None:
        """Record one result; ``began``: when its measurement started, epoch seconds."""
        self.run.add(kind, self.step, name, data, began)


class Measurement:
    """A step's work: prepared by its constructor; ``measure`` is called with each item."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.settings = session.settings

    def measure(self, item: str) -> None:
        """Measure one item and record its results."""
        raise NotImplementedError


class Ceilings(Measurement):
    """The machine, and its rates: what every other result is compared with."""

    def measure(self, item: str) -> None:
        import torch

        from variant.bench.environment import environment
        from variant.bench.roofline import measure_peaks

        run, device = self.session.run, self.settings.device
        if item == "environment":
            command = ["python", "-m", "benchmarks.gpu", *sys.argv[1:]]
            run.set(environment=environment(command))
            return
        began, dtype = time.time(), getattr(torch, self.settings.dtype)
        quick = self.settings.quick or item == "first rates"
        peaks = measure_peaks(device, [dtype, torch.float32], quick=quick)
        data = run.read()
        place = "end" if item == "rates at the end" else "start"
        run.set(limits={**data.get("limits", {}), place: peaks.to_dict()})
        self.session.add("peaks", item, peaks.to_dict(), began)


class Tests(Measurement):
    """Calls of pytest, by name; counts and failures are recorded while they run."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        # Tuning would compile every block size for each of hundreds of small shapes.
        os.environ["VARIANT_AUTOTUNE"] = "0"
        if self.settings.device == "cuda":
            os.environ["VARIANT_TEST_DEVICE"] = "cuda"

    def measure(self, item: str) -> None:
        import pytest

        from benchmarks.gpu.test_counts import Counts

        arguments = {**self.settings.smoke, **self.settings.tests}[item]
        if "-n" in arguments and importlib.util.find_spec("xdist") is None:
            arguments = (
                *arguments[: arguments.index("-n")],
                *arguments[arguments.index("-n") + 2 :],
            )
        os.chdir(ROOT)
        began = time.time()
        counts = Counts(lambda data: self.session.add("tests", item, data, began))
        status = pytest.main([*arguments, "-o", "pythonpath=. tests tests/kernels"], [counts])
        failures = counts.finish(int(status))
        # 5: no test was chosen, as where all are skipped.
        if status not in (0, 5):
            raise RuntimeError(f"pytest ended with {int(status)}; {failures} failures")


class Sanitizer(Measurement):
    """The small cases under compute-sanitizer, where the smoke tests failed."""

    def measure(self, item: str) -> None:
        if shutil.which("compute-sanitizer") is None:
            raise RuntimeError("compute-sanitizer is not installed")
        began = time.time()
        done = subprocess.run(
            [
                # Libraries probe for features with calls that fail; those are no errors.
                *("compute-sanitizer", "--error-exitcode=1", "--report-api-errors", "no"),
                *(sys.executable, "-m", "pytest", *self.settings.smoke[item]),
            ],
            cwd=ROOT,
            env={**os.environ, "VARIANT_AUTOTUNE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        tail = done.stdout.splitlines()[-5:]
        self.session.add("sanitizer", item, {"status": done.returncode, "tail": tail}, began)


class EngineSpeed(Measurement):
    """Generations of one batch size, without and with the decoder, beside their peers."""

    batch: int

    def __init__(self, session: Session) -> None:
        import torch

        from variant.bench.engine_bench import BenchConfig, EngineComparison
        from variant.bench.models import build

        super().__init__(session)
        settings = self.settings
        self.batch = int(session.step.rsplit("-", 1)[1])
        self.config = BenchConfig(
            batch=self.batch,
            dtype=getattr(torch, settings.dtype),
            depths=settings.depths,
            bridge=settings.bridge,
            runs=settings.rounds[self.batch],
            **FILTERS,
            var_repo=settings.var_repo,
            decoder=True,
            plain_depths=False,
        )
        var, vae = build(settings.model, settings.device)
        self.comparison = EngineComparison(var, vae, self.config)

    def measure(self, item: str) -> None:
        import torch

        with torch.inference_mode():
            self._measure(item)

    def _measure(self, item: str) -> None:
        from variant.bench.engine_bench import images

        comparison, config, began = self.comparison, self.config, time.time()
        first = replace(config, depths=config.depths[:2])
        # A few rounds at once tell most; all rounds replace them.
        comparison.setting = {
            "two depths, one round": replace(first, runs=1),
            "two depths": first,
            "with the decoder, two depths": first,
            "switch of depth": first,
        }.get(item, config)
        names = ["rows"] if item.startswith(("two", "all")) else []
        measured: dict[str, Any] = {}
        if names:
            measured["rows"] = _plain(comparison.run(_ignore))
        elif item.startswith("with the decoder"):
            measured["images"] = images(comparison, _ignore)
        elif item == "decoder alone":
            measured["decoder"] = [comparison.decoder(_ignore)]
        elif item == "switch of depth":
            measured["switch"] = _plain(comparison.switch())
        elif item == "logits":
            measured["logits"] = [
                {**row, "batch": 1, "dtype": self.settings.dtype}
                for row in _plain(comparison.logits())
            ]
        self.session.add("engine", item, measured, began)


class Kernels(Measurement):
    """Cases of the bench files, one item each; with "compiled" the slow peers take part."""

    # Peers that take many seconds to compile, and those that are not on the path of a measurement.
    SLOW = ("flex", "flex-compiled", "flex-flash", "hmar")

    def __init__(self, session: Session) -> None:
        from benchmarks.harness import REPOSITORIES
        from variant.bench.roofline import Peaks, measure_peaks

        super().__init__(session)
        import torch

        if self.settings.hmar_repo is not None:
            REPOSITORIES["hmar"] = self.settings.hmar_repo
        start = session.run.read().get("limits", {}).get("start")
        dtypes = [getattr(torch, self.settings.dtype), torch.float32]
        peaks = (
            Peaks(**start)
            if start is not None
            else measure_peaks(self.settings.device, dtypes, quick=True)
        )
        # One rate serves both dtypes of 16 bits.
        half = peaks.gemm[self.settings.dtype]
        self.limits = Peaks({"bfloat16": half, "float16": half, **peaks.gemm}, peaks.copy)

    def measure(self, item: str) -> None:
        import torch

        from benchmarks import harness

        op, _, rest = item.partition(" ")
        name = rest.removesuffix(" compiled")
        began, device = time.time(), self.settings.device
        module = importlib.import_module(f"benchmarks.bench_{op}")
        (case,) = (case for case in module.CASES if case.name == name)
        torch.compiler.reset()
        torch.manual_seed(0)
        comparison = module.build(case, device, self.settings.quick)
        slow = rest.endswith(" compiled")
        for peer in () if slow else self.SLOW:
            if comparison.calls.pop(peer, None) is not None:
                comparison.missing[peer] = "timed later, with the peers that are compiled"
        _drop_failing(comparison)
        samples, wrong = harness.run(comparison, device=device, quick=self.settings.quick)
        record = harness.record(op, case, device, comparison, samples, self.limits)
        record["missing"] = comparison.missing
        record["wrong"] = {peer: str(error)[:300] for peer, error in wrong.items()}
        self.session.add("kernel", f"{op} {name}", record, began)
        comparison.calls = {}
        del comparison
        _release(device)


class Training(Measurement):
    """One optimiser step at each depth, beside the original's."""

    def __init__(self, session: Session) -> None:
        from benchmarks.training_step import TrainingSteps

        super().__init__(session)
        settings = self.settings
        self.steps = TrainingSteps(
            Namespace(
                model=settings.model,
                batch=settings.training_batch,
                depths=list(settings.training_depths),
                bridge=settings.bridge,
                dtype=settings.dtype,
                device=settings.device,
                var_repo=settings.var_repo,
            )
        )

    def measure(self, item: str) -> None:
        began = time.time()
        result = self.steps.result(int(item.split()[0]))
        del result["environment"]
        self.session.add("training", "steps", result, began)


class LargestBatch(Measurement):
    """The largest batch in the memory of the paper's GPU, at each depth and of the peer."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        settings = self.settings
        self.options = Namespace(
            model=settings.model,
            depths=list(settings.memory_depths),
            bridge=settings.bridge,
            dtype=settings.dtype,
            device=settings.device,
            gib=settings.memory_gib,
            small=list(settings.memory_small),
            var_repo=settings.var_repo,
        )
        self.models: Any = None

    def measure(self, item: str) -> None:
        import torch

        from benchmarks.largest_batch import GPU, find, ours, peer
        from variant.bench.models import build, configs

        began, options = time.time(), self.options
        if item == "peer":
            self.models = None
            _release(options.device)
            name, generate = peer(options)
            depth = configs(options.model)[0].depth
        else:
            if self.models is None:
                var, vae = build(options.model, options.device)
                self.models = var.to(getattr(torch, options.dtype)), vae
            depth = int(item.removeprefix("depth "))
            name, generate = f"ours {options.dtype}", ours(options, depth, self.models)
        limit = int(options.gib * 2**30)
        row = find(name, depth, generate, limit, options.small, GPU())
        self.session.add("largest", item, {"limit_bytes": limit, "row": _plain([row])[0]}, began)


class Profile(Measurement):
    """The kernels of one replayed generation, by name."""

    def __init__(self, session: Session) -> None:
        import torch

        from variant.bench.models import build
        from variant.engine.engine import Engine

        super().__init__(session)
        var, vae = build(self.settings.model, self.settings.device)
        self.var = var
        self.engine = Engine(var, vae, dtype=getattr(torch, self.settings.dtype))

    def measure(self, item: str) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        began, batch = time.time(), int(item.removeprefix("batch "))
        on_gpu = self.settings.device == "cuda"
        labels_B = torch.arange(batch) % self.var.config.num_classes

        def generate() -> Any:
            return self.engine.generate(
                labels_B, seed=0, decode=False, max_batch=batch, **FILTERS
            )  # fmt: skip

        for _ in range(3):  # recorded, replayed, and replayed warm
            generate()
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiled:
            stats = generate().stats
        events = profiled.key_averages()
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = [
            {"name": event.key, "count": event.count, "us": float(getattr(event, spent))}
            for event in events
        ]
        rows = sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])
        data = {
            "batch": batch,
            "seconds": stats.seconds,
            "captured": stats.captured,
            "kernels": sum(row["count"] for row in rows),
            "kernel_us": sum(row["us"] for row in rows),
            "by_name": rows[:PROFILED_KERNELS],
        }
        self.session.add("profile", item, data, began)


# --- helpers --------------------------------------------------------------------------------------


def _ignore(name: str) -> None:
    """Samples of a comparison, which no progress bar counts here."""


def _plain(rows: Iterable[Any]) -> list[Any]:
    from dataclasses import asdict

    return [asdict(row) for row in rows]


def _drop_failing(comparison: Any) -> None:
    """Leave out a peer that cannot run here, with its reason, so that the others are timed."""
    import torch

    for name, call in list(comparison.calls.items()):
        if name == comparison.peer or name in comparison.ours:
            continue
        try:
            with torch.enable_grad() if comparison.gradient else torch.inference_mode():
                call()
        except Exception as error:  # any peer, any compiler
            comparison.missing[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
            del comparison.calls[name]


def _release(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# --- the table of steps ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step.

    items: measured in turn.  seconds: for the step.  item_seconds: for one item; one that takes
    longer is killed, and the step goes on with the next in a new process.  only_after_failure:
    name of a step; this one runs only if tests failed there.
    """

    name: str
    work: Callable[[Session], Measurement]
    items: tuple[str, ...]
    seconds: float
    item_seconds: float
    only_after_failure: str | None = None


def steps(settings: Settings) -> list[Step]:
    """All steps, the one that tells most in a second first."""
    engine_items = (
        "two depths, one round",
        "two depths",
        "with the decoder, two depths",
        "all depths",
        "with the decoder, all depths",
        "decoder alone",
        "switch of depth",
        *(("logits",) if settings.var_repo is not None else ()),
    )
    engine_seconds = {64: 110.0, 1: 60.0}
    return [
        Step("ceilings", Ceilings, ("environment", "first rates", "rates"), 25, 15),
        Step("smoke", Tests, tuple(settings.smoke), 45, 30),
        Step("sanitizer", Sanitizer, ("small cases",), 90, 90, only_after_failure="smoke"),
        *(
            Step(f"engine-{batch}", EngineSpeed, engine_items, engine_seconds.get(batch, 60), 45)
            for batch in settings.batches
        ),
        Step("kernels", Kernels, tuple(f"{op} {name}" for op, name in settings.kernels), 80, 25),
        Step(
            "peers",
            Kernels,
            tuple(f"{op} {name} compiled" for op, name in settings.compiled),
            90,
            50,
        ),
        Step(
            "training-step",
            Training,
            tuple(f"{rounds} rounds" for rounds in settings.training_rounds),
            60,
            45,
        ),
        Step(
            "largest-batch",
            LargestBatch,
            (*(f"depth {depth}" for depth in settings.memory_depths), "peer"),
            75,
            40,
        ),
        Step("profile", Profile, tuple(f"batch {batch}" for batch in settings.batches), 40, 25),
        Step("end", Ceilings, ("rates at the end",), 12, 12),
        # Until the clock stops.
        Step("tests", Tests, tuple(settings.tests), 3600, 3600),
    ]
