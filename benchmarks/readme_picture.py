"""The README's picture: the same digits at every depth, with measured time and K/V memory.

    python -m benchmarks.readme_picture

Measures the shipped model, ``digits``, and writes ``docs/digits.json`` and ``docs/digits.png``.
``--draw`` draws the picture again from the file, without measuring.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from variant import VARiant
from variant.bench.environment import environment
from variant.evaluation.digits import evaluate_digits_model, held_out_accuracy
from variant.files import atomic_write

FORMAT = "variant-digits-1"
DOCS = Path(__file__).parents[1] / "docs"
LABELS = tuple(range(10))
SEED, CFG, TOP_P = 0, 1.5, 0.96

# Pixels of the picture.
TILE, GAP, MARGIN = 64, 6, 12
CAPTION, BAR, FIGURE = 92, 150, 70
TIME_COLOUR, KV_COLOUR = "#3b6fb6", "#c8762b"


@dataclass
class Options:
    """Measure the shipped digits model at every depth and draw the README's picture.

    Example: python -m benchmarks.readme_picture
    """

    out: Path = DOCS
    """Folder for digits.json and digits.png."""
    rounds: int = 15
    """Rounds in which every depth runs once."""
    count: int = 1000
    """Images per depth that are classified."""
    draw: bool = False
    """Draw from the digits.json of that folder; measure nothing."""


def measure(rounds: int, count: int) -> dict[str, Any]:
    """Time, K/V memory and quality of the shipped model at every depth.

    Times are CPU time (user and system) of one thread, batch 10, float32: other processes on the
    machine hardly change it. The depths run interleaved; the first round is not counted.

    Args:
        rounds: at least 1.  count: images per depth for the classifier.
    Returns:
        Plain values for JSON: milliseconds and bytes are per image.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = VARiant.from_pretrained("digits")
        config = model.var.config
        depths = [config.depth, *sorted(config.subnets, reverse=True)]
        samples: dict[tuple[int, bool], list[float]] = {}
        stats = {}
        for counted in [False] + [True] * rounds:
            for depth in depths:
                for decode in (False, True):
                    seconds, result = _cpu_seconds(lambda: _generate(model, depth, decode))  # noqa: B023
                    stats[depth] = result.stats
                    if counted:
                        samples.setdefault((depth, decode), []).append(seconds)
        described = environment()
    finally:
        torch.set_num_threads(threads)
    training = model.extra["training"]
    rows = []
    for depth in depths:
        report = evaluate_digits_model(model, depth, count=count, seed=SEED, cfg=CFG, top_p=TOP_P)
        name = "full" if depth == config.depth else str(depth)
        rows.append({
            "depth": depth,
            "tokens_ms": _milliseconds(samples[depth, False]),
            "image_ms": _milliseconds(samples[depth, True]),
            "kv_allocated_bytes": stats[depth].kv_allocated_bytes // len(LABELS),
            "kv_paper_bytes": stats[depth].kv_paper_bytes // len(LABELS),
            "classified": round(report.recognised, 4),
            "spread": round(report.std_ratio, 4),
            "repeats": round(report.repeats, 4),
            "copies": round(report.copies, 4),
            "train_loss": round(training["train_loss"][name], 4),
            "held_out_loss": round(training["held_out_loss"][name], 4),
        })  # fmt: skip
    return {
        "format": FORMAT,
        "model": "digits",
        "environment": described,
        "timing": {"clock": "CPU time", "batch": len(LABELS), "dtype": "float32", "rounds": rounds},
        "sampling": {"cfg": CFG, "top_p": TOP_P, "seed": SEED},
        "classified_images": count,
        "classifier_held_out_accuracy": round(held_out_accuracy(), 4),
        "rows": rows,
    }


def _generate(model: VARiant, depth: int, decode: bool) -> Any:
    engine = model.engine()
    return engine.generate(LABELS, depth=depth, cfg=CFG, top_p=TOP_P, seed=SEED, decode=decode)


def _cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def _milliseconds(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles per image of times per batch."""
    values = [1000 * value / len(LABELS) for value in seconds]
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values
    return {
        "median": round(statistics.median(values), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[-1], 3)],
    }


def _text(data: dict[str, Any]) -> str:
    """JSON with one line for each row of the table."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    fields = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in data.items() if k != "rows"]
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def draw(data: dict[str, Any]) -> Image.Image:
    """The picture: a row of digits for each depth, beside its time and its K/V memory."""
    model = VARiant.from_pretrained(data["model"])
    rows = data["rows"]
    left = MARGIN + CAPTION
    bars = left + len(LABELS) * (TILE + GAP) + MARGIN
    width = bars + 2 * (BAR + FIGURE) + MARGIN
    top = 44
    sheet = Image.new("RGB", (width, top + len(rows) * (TILE + GAP) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(17), ImageFont.load_default(15)
    times = [row["tokens_ms"]["median"] for row in rows]
    caches = [row["kv_allocated_bytes"] / 1024 for row in rows]
    columns = (
        (bars, TIME_COLOUR, "transformer, per image", "ms", times),
        (bars + BAR + FIGURE, KV_COLOUR, "K/V cache, per image", "KiB", caches),
    )
    for x, colour, title, _, _ in columns:
        pen.text((x, MARGIN + 10), title, colour, font=bold, anchor="lm")
    for index, row in enumerate(rows):
        y = top + index * (TILE + GAP)
        pen.text((MARGIN, y + TILE // 2), f"depth {row['depth']}", "black", font=bold, anchor="lm")
        images = _generate(model, row["depth"], True).images
        for position, image_IYX in enumerate(images):
            sheet.paste(_tile(image_IYX), (left + position * (TILE + GAP), y))
        for x, colour, _, unit, values in columns:
            length = round(BAR * values[index] / max(values))
            pen.rectangle((x, y + 20, x + length, y + TILE - 20), fill=colour)
            text = f"{values[index]:.3g} {unit}"
            pen.text((x + length + 6, y + TILE // 2), text, "black", font=plain, anchor="lm")
    return sheet


def _tile(image_IYX: Tensor) -> Image.Image:
    pixels_YXI = (image_IYX.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(pixels_YXI.contiguous().numpy())
    return image.resize((TILE, TILE), Image.Resampling.LANCZOS)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, draw; 0."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.readme_picture")
    file = options.out / "digits.json"
    if not options.draw:
        data = measure(options.rounds, options.count)
        with atomic_write(file) as temporary:
            temporary.write_text(_text(data))
    with atomic_write(options.out / "digits.png") as temporary:
        picture = draw(json.loads(file.read_text())).quantize(64)  # a third of the bytes
        picture.save(temporary, format="PNG", optimize=True)
    print(f"wrote {options.out / 'digits.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
