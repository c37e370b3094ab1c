"""``variant eval --model``: one model at several depths, bridges and K/V dtypes, side by side."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from variant.bench.environment import environment
from variant.cli.options import Eval, Sample
from variant.cli.output import check_file, console, table, write_json
from variant.cli.progress import progress
from variant.cli.sample import PER_CLASS, settings_of
from variant.engine.engine import Engine
from variant.engine.generation import Sampling
from variant.engine.planning import depths_of, plan_row
from variant.errors import UserError
from variant.evaluation.features import FeatureNetwork
from variant.evaluation.image_sets import Reference, open_images
from variant.evaluation.report import Evaluation, evaluate, extract
from variant.evaluation.sampler import SampleFiles, sample
from variant.supernet import VARiant
from variant_kernels.arguments import integer

FORMAT = "variant-eval-depths-1"
TOP_K = 900
# Timed generations of one batch; the median counts.
TIMED = 3


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    kv_bytes: planned K/V of one image with guidance.
    """

    depth: int
    bridge: int
    kv_dtype: str
    kv_bytes: int


def evaluate_depths(command: Eval, reference: Reference, network: FeatureNetwork) -> None:
    """Generate the images of every setting, evaluate them, print the table and write the record."""
    assert command.model is not None, "the caller checks it"
    if command.plot is not None:
        check_file(command.plot)
        _pyplot()
    model = VARiant.from_pretrained(command.model, device=command.device)
    config, engine = model.var.config, Engine(model.var, model.vae)
    num = PER_CLASS * config.num_classes if command.num is None else command.num
    integer("eval", "--num", num, 1)
    sampling = Sampling(1.5, min(TOP_K, config.vocab_size), 0.96, command.seed)
    settings = _settings(command, engine)
    real = None
    if reference.images is not None:
        with progress("eval", "reference", reference.images.count, command.json) as advance:
            real = extract(reference.images, network, command.batch, advance)
    rows: list[tuple[Setting, float, Evaluation]] = []
    for setting in settings:
        result = _one(command, engine, sampling, setting, num, reference, network, real)
        rows.append((setting, _seconds(engine, sampling, setting, min(num, command.batch)), result))
    out = console(command.json)
    out.print(_table(command, rows))
    if command.plot is not None:
        _plot(command.plot, rows)
        out.print(f"wrote {command.plot}")
    machine = environment()
    write_json(
        command.json,
        {
            "format": FORMAT,
            "model": command.model,
            "reference": command.reference,
            "num": num,
            "seed": command.seed,
            "settings": [
                {**asdict(setting), "seconds_per_image": seconds, **asdict(result)}
                for setting, seconds, result in rows
            ],
            "environment": machine,
        },
    )


def _settings(command: Eval, engine: Engine) -> list[Setting]:
    """All combinations; the full depth is the same at every bridge and comes once a K/V dtype."""
    config = engine.var.config
    if not command.bridges and config.bridge is None:
        raise UserError(f"eval: {command.model} was trained at one depth; --bridges is needed")
    bridges = command.bridges or (config.bridge or 0,)
    rows = []
    for kv_dtype, depth, bridge in itertools.product(
        dict.fromkeys(command.kv_dtypes),
        dict.fromkeys(command.depths or depths_of(config)),
        dict.fromkeys(bridges),
    ):
        if depth == config.depth and bridge != bridges[0]:
            continue
        engine.var.schedule(depth, bridge, op="eval")  # refuses what does not exist
        cached = None if kv_dtype == "exact" else kv_dtype
        plan = plan_row(config, depth, bridge, 1, engine.dtype, kv_dtype=cached)
        rows.append(Setting(depth, bridge, kv_dtype, plan.ours))
    return rows


def _one(
    command: Eval,
    engine: Engine,
    sampling: Sampling,
    setting: Setting,
    num: int,
    reference: Reference,
    network: FeatureNetwork,
    real: Any,
) -> Evaluation:
    name = f"depth{setting.depth}-bridge{setting.bridge}-{setting.kv_dtype}"
    kv_dtype = None if setting.kv_dtype == "exact" else "fp8"
    files = SampleFiles(
        Path(command.out) / name, "png", num, range(engine.var.config.num_classes), command.batch
    )
    recorded = Sample(
        model=str(command.model),
        depth=setting.depth,
        bridge=setting.bridge,
        seed=command.seed,
        device=command.device,
        kv_dtype=kv_dtype,
        batch=command.batch,
    )
    with progress("eval", name, num, command.json) as advance:
        sample(
            engine,
            sampling,
            files,
            settings_of(recorded, engine, files, sampling),
            depth=setting.depth,
            bridge=setting.bridge,
            kv_dtype=kv_dtype,
            report=lambda images, total: advance(images, name),
        )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", RuntimeWarning)
        images = open_images(files.out)
        result = evaluate(images, reference, network, batch=command.batch, real=real)
    out = console(command.json, stderr=True)
    for warning in heard:
        out.print(f"warning: {name}: {warning.message}")
    return result


def _seconds(engine: Engine, sampling: Sampling, setting: Setting, batch: int) -> float:
    """Seconds per image of a batch, decoder included: the median of a few."""
    labels = [index % engine.var.config.num_classes for index in range(batch)]
    kv_dtype = None if setting.kv_dtype == "exact" else "fp8"
    times = []
    for _ in range(TIMED):
        parts = engine.generate_batches_with(
            labels, sampling, depth=setting.depth, bridge=setting.bridge, kv_dtype=kv_dtype
        )
        times.append(sum(part.stats.seconds for part in parts) / batch)
    return sorted(times)[TIMED // 2]


def _table(command: Eval, rows: list[tuple[Setting, float, Evaluation]]) -> Any:
    metrics = [metric.name for metric in rows[0][2].metrics]
    first = rows[0][2].metrics[0]
    floor = "" if first.floor is None else f"; two real halves of {first.floor_count:,}: "
    floor += "" if first.floor is None else f"{first.name} {first.floor:.4g}"
    result = table(
        f"{command.model}: {rows[0][2].num_images:,} images of each setting against "
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
            half = None if metric.low is None or metric.high is None else metric.high - metric.value
            cells.append(f"{metric.value:.4g}" + ("" if half is None else f" ± {half:.2g}"))
        result.add_row(
            str(setting.depth),
            str(setting.bridge),
            setting.kv_dtype,
            *cells,
            f"{1000 * seconds:.2f}",
            f"{setting.kv_bytes:,}",
        )
    return result


def _pyplot() -> Any:
    """matplotlib without a display.  Raises: UserError, if it is not installed."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("eval: --plot needs matplotlib; pip install matplotlib") from None
    return plt


def _plot(path: Path, rows: list[tuple[Setting, float, Evaluation]]) -> None:
    """The Fréchet distance against K/V memory and against time, one line for each bridge."""
    plt = _pyplot()
    name = rows[0][2].metrics[0].name
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    groups = sorted({(row[0].bridge, row[0].kv_dtype) for row in rows})
    for bridge, kv_dtype in groups:
        own = [row for row in rows if (row[0].bridge, row[0].kv_dtype) == (bridge, kv_dtype)]
        values = [row[2].metrics[0].value for row in own]
        label = f"bridge {bridge}, {kv_dtype} K/V"
        axes[0].plot([row[0].kv_bytes / 2**10 for row in own], values, "o-", label=label)
        axes[1].plot([1000 * row[1] for row in own], values, "o-", label=label)
        for row, value in zip(own, values, strict=True):
            axes[0].annotate(str(row[0].depth), (row[0].kv_bytes / 2**10, value))
            axes[1].annotate(str(row[0].depth), (1000 * row[1], value))
    axes[0].set(xlabel="K/V of one image, KiB", ylabel=name)
    axes[1].set(xlabel="ms per image")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
