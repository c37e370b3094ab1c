"""``variant eval --model``: one model at several depths, bridges and K/V dtypes, side by side."""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from variant.bench.environment import environment
from variant.cli.options import Eval, Sample
from variant.cli.output import (
    check_folder,
    check_own_folder,
    checked_path,
    console,
    table,
    write_json,
)
from variant.cli.progress import progress
from variant.cli.pyplot import pyplot, save_plot
from variant.cli.sample import PER_CLASS, settings_of
from variant.cli.schedule import schedule_of
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant.engine.planning import depths_of, plan_row, schedule_row
from variant.errors import UserError
from variant.evaluation.features import FeatureNetwork
from variant.evaluation.image_sets import Reference, open_images
from variant.evaluation.report import (
    LEAST,
    Evaluation,
    Metric,
    check_reference,
    check_sets,
    evaluate,
    extract,
)
from variant.evaluation.sampler import SampleFiles, check_run, sample
from variant.supernet import VARiant
from variant_kernels import DepthSchedule
from variant_kernels.arguments import integer
from variant_kernels.wording import counted

FORMAT = "variant-eval-depths-1"
TOP_K = 900
OWN_NAME = re.compile(r"(?:depth\d+-bridge\d+|schedule.+)-(?:exact|fp8)")  # of a setting's folder
# Timed generations of one batch; the median counts.
TIMED = 3


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    kv_bytes: planned K/V of one image with guidance.
    schedule, source: the layers of every scale, and the words that named them; depth and bridge
        are then those of its plan.
    """

    depth: int
    bridge: int
    kv_dtype: str
    kv_bytes: int
    schedule: DepthSchedule | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        """Of the folder of its images: other layers have another name."""
        if self.schedule is None:
            return f"depth{self.depth}-bridge{self.bridge}-{self.kv_dtype}"
        digest = hashlib.sha256(repr(self.schedule.layers).encode()).hexdigest()[:8]
        return f"schedule{self.schedule.name}-{digest}-{self.kv_dtype}"

    @property
    def cells(self) -> tuple[str, str]:
        """Depth and bridge for a table."""
        if self.schedule is None:
            return str(self.depth), str(self.bridge)
        return self.schedule.name, "-"

    @property
    def line(self) -> str:
        """The line of the plot to which it belongs."""
        where = "schedules" if self.schedule is not None else f"bridge {self.bridge}"
        return f"{where}, {self.kv_dtype} K/V"

    def call(self) -> dict[str, Any]:
        """Its arguments of :meth:`Engine.generate`."""
        kv_dtype = None if self.kv_dtype == "exact" else "fp8"
        if self.schedule is not None:
            return {"depth": self.schedule, "bridge": None, "kv_dtype": kv_dtype}
        return {"depth": self.depth, "bridge": self.bridge, "kv_dtype": kv_dtype}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        schedule = values.pop("schedule")
        return values if schedule is None else {**values, **schedule.to_dict()}


class Run(NamedTuple):
    """A setting, the files of its images, and all that these depend on."""

    setting: Setting
    files: SampleFiles
    generated: dict[str, Any]


def check_out(out: Path) -> None:
    """Fails before the work if the images cannot be written there, or must not.

    Raises:
        UserError: it is no folder, cannot be written, or is of something else.
    """
    with checked_path(out):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: --out must be a folder")
        check_folder(out)
        check_own_folder("eval", out, lambda name: OWN_NAME.fullmatch(name) is not None)


def evaluate_depths(
    command: Eval,
    reference: Reference,
    network_of: Callable[[tuple[int, int]], FeatureNetwork],
) -> None:
    """Generate the images of every setting, evaluate them, print the table and write the record.

    Args:
        network_of: the network for images of a height and width; it may be trained first.
    """
    assert command.model is not None, "the caller checks it"
    model = VARiant.from_pretrained(command.model, device=command.device)
    config, engine = model.var.config, Engine(model.var, model.vae)
    num = PER_CLASS * config.num_classes if command.num is None else command.num
    integer("eval", "--num", num, LEAST)
    side = model.vae.config.image_size
    check_sets(reference, command.model, num, (side, side))
    sampling = Sampling(1.5, min(TOP_K, config.vocab_size), 0.96, command.seed)
    runs = [_run(command, engine, sampling, setting, num) for setting in _settings(command, engine)]
    for run in runs:
        check_run(run.files, run.generated)
    network = network_of((side, side))
    labels = range(config.num_classes)
    check_reference(reference, network, command.model, num, (side, side), labels)
    real = None
    if reference.images is not None:
        with progress("eval", "reference", reference.images.count, command.json) as advance:
            real = extract(reference.images, network, command.batch, advance)
    rows: list[tuple[Setting, float, Evaluation]] = []
    records = []
    for run in runs:
        setting = run.setting
        result, record = _one(command, engine, sampling, run, reference, network, real)
        records.append(record)
        rows.append((setting, _seconds(engine, sampling, setting, min(num, command.batch)), result))
    machine = environment()
    # First: the standard output may be closed by now.
    write_json(
        command.json,
        {
            "format": FORMAT,
            "model": command.model,
            "reference": command.reference,
            "num": num,
            "seed": command.seed,
            "batch": command.batch,
            "device": command.device,
            "settings": [
                {**setting.to_dict(), "seconds_per_image": seconds, **asdict(result), **record}
                for (setting, seconds, result), record in zip(rows, records, strict=True)
            ],
            "environment": machine,
        },
    )
    if command.plot is not None:
        _plot(command.plot, rows)
    printed = console(command.json)
    printed.print(_table(command, rows))
    if command.plot is not None:
        printed.print(f"wrote {command.plot}")


def _settings(command: Eval, engine: Engine) -> list[Setting]:
    """All combinations; the full depth is the same at every bridge and comes once a K/V dtype."""
    config = engine.var.config
    schedules = [
        (source, schedule_of("eval", "--schedules", source, config))
        for source in dict.fromkeys(command.schedules)
    ]
    alone = bool(schedules) and not command.depths
    if not command.bridges and config.bridge is None and not alone:
        raise UserError(f"eval: {command.model} was trained at one depth; --bridges is needed")
    bridges = command.bridges or (config.bridge or 0,)
    rows = []
    for kv_dtype, depth, bridge in itertools.product(
        dict.fromkeys(command.kv_dtypes),
        () if alone else dict.fromkeys(command.depths or depths_of(config)),
        dict.fromkeys(bridges),
    ):
        if depth == config.depth and bridge != bridges[0]:
            continue
        engine.var.schedule(depth, bridge, op="eval")  # refuses what does not exist
        cached = None if kv_dtype == "exact" else kv_dtype
        plan = plan_row(config, depth, bridge, 1, engine.dtype, kv_dtype=cached)
        rows.append(Setting(depth, bridge, kv_dtype, plan.ours))
    for kv_dtype, (source, schedule) in itertools.product(
        dict.fromkeys(command.kv_dtypes), schedules
    ):
        cached = None if kv_dtype == "exact" else kv_dtype
        plan = schedule_row(config, schedule, 1, engine.dtype, kv_dtype=cached)
        rows.append(Setting(plan.depth, plan.bridge, kv_dtype, plan.ours, schedule, source))
    return rows


def _run(command: Eval, engine: Engine, sampling: Sampling, setting: Setting, num: int) -> Run:
    classes = range(engine.var.config.num_classes)
    files = SampleFiles(Path(command.out) / setting.name, "png", num, classes, command.batch)
    recorded = Sample(
        model=str(command.model),
        depth=None if setting.schedule is not None else setting.depth,
        bridge=None if setting.schedule is not None else setting.bridge,
        schedule=setting.source,
        seed=command.seed,
        device=command.device,
        kv_dtype=setting.call()["kv_dtype"],
        batch=command.batch,
    )
    return Run(setting, files, settings_of(recorded, engine, files, sampling))


def _one(
    command: Eval,
    engine: Engine,
    sampling: Sampling,
    run: Run,
    reference: Reference,
    network: FeatureNetwork,
    real: Any,
) -> tuple[Evaluation, dict[str, Any]]:
    """The metrics of a setting; what its images were generated from, and warnings, for JSON."""
    name, files = run.setting.name, run.files
    with progress("eval", name, files.num, command.json) as advance:
        sample(
            engine,
            sampling,
            files,
            run.generated,
            **run.setting.call(),
            report=lambda images, total: advance(images, name),
        )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", RuntimeWarning)
        images = open_images(files.out)
        result = evaluate(images, reference, network, batch=command.batch, real=real)
    out = console(command.json, stderr=True)
    notes = list(dict.fromkeys(str(warning.message) for warning in heard))
    for note in notes:
        out.print(f"warning: {name}: {note}")
    return result, {"generated": run.generated, "warnings": notes}


def _seconds(engine: Engine, sampling: Sampling, setting: Setting, batch: int) -> float:
    """Seconds per image of a batch, decoder included: the median of a few."""
    labels = [index % engine.var.config.num_classes for index in range(batch)]
    times = []
    for _ in range(TIMED):
        parts = engine.generate_batches_with(labels, sampling, **setting.call())
        times.append(sum(part.stats.seconds for part in parts) / batch)
    return sorted(times)[TIMED // 2]


def _table(command: Eval, rows: list[tuple[Setting, float, Evaluation]]) -> Any:
    metrics = [metric.name for metric in rows[0][2].metrics]
    first = rows[0][2].metrics[0]
    floor = "" if first.floor is None else f"; two real halves of {first.floor_count:,}: "
    floor += "" if first.floor is None else f"{first.name} {first.floor:.4g}"
    result = table(
        f"{command.model}: {counted(rows[0][2].num_images, 'image')} of each setting against "
        f"{rows[0][2].reference}{floor}",
        "depth",
        "bridge",
        "K/V",
        *metrics,
        "ms per image",
        "K/V bytes",
    )
    for setting, seconds, evaluation in rows:
        cells = []
        for metric in evaluation.metrics:
            cells.append(_with_interval(metric))
        result.add_row(
            *setting.cells,
            setting.kv_dtype,
            *cells,
            f"{1000 * seconds:.2f}",
            f"{setting.kv_bytes:,}",
        )
    return result


def _with_interval(metric: Metric) -> str:
    """The value and the longer side of its interval: that of a share near 1 reaches down alone."""
    value = f"{metric.value:.4g}"
    if metric.low is None or metric.high is None:
        return value
    return f"{value} ± {max(metric.value - metric.low, metric.high - metric.value):.2g}"


def _plot(path: Path, rows: list[tuple[Setting, float, Evaluation]]) -> None:
    """The Fréchet distance against K/V memory and against time, one line for each bridge."""
    plt = pyplot("eval")
    name = rows[0][2].metrics[0].name
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for label in sorted({row[0].line for row in rows}):
        own = [row for row in rows if row[0].line == label]
        values = [row[2].metrics[0].value for row in own]
        axes[0].plot([row[0].kv_bytes / 2**10 for row in own], values, "o-", label=label)
        axes[1].plot([1000 * row[1] for row in own], values, "o-", label=label)
        for row, value in zip(own, values, strict=True):
            axes[0].annotate(row[0].cells[0], (row[0].kv_bytes / 2**10, value))
            axes[1].annotate(row[0].cells[0], (1000 * row[1], value))
    axes[0].set(xlabel="K/V of one image, KiB", ylabel=name)
    axes[1].set(xlabel="ms per image")
    axes[0].legend(fontsize="small")
    save_plot(plt, figure, path)
