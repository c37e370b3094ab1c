"""How much of its codebook a VQ-VAE uses after short trainings that differ in a few keys.

    python -m benchmarks.code_use --out out/codes

Trains the recipe `digits` for a few epochs with each choice of keys, and reads what its last
evaluation counted over the held-out images. Nothing is timed: the machine need not be idle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import table
from variant.bench.environment import environment
from variant.bench.result_file import write_result
from variant.cli.main import main as variant
from variant.errors import UserError

FORMAT = "variant-code-use-1"
RECIPE = "digits"
# The keys of [vae_training] that differ from the recipe's, one row each.
CHOICES: tuple[dict[str, str], ...] = (
    {"revive-every": "0", "scale-dropout": "0"},
    {"scale-dropout": "0"},
    {"scale-dropout": "0", "revive-every": "0", "kmeans": "10"},
    {"scale-dropout": "0", "entropy": "0.1"},
    {},
    {"entropy": "0.1", "kmeans": "10"},
)


@dataclass
class Options:
    """How much of its codebook a VQ-VAE uses after short trainings that differ in a few keys.

    Example: python -m benchmarks.code_use --out out/codes --json codes.json
    """

    out: Path
    """Folder of the trainings; it must not hold earlier ones."""
    json: Path | None = None
    """File for the results."""
    epochs: int = 10
    """Of each training."""


def measure(
    out: Path, epochs: int, choices: Sequence[dict[str, str]] = CHOICES
) -> list[dict[str, Any]]:
    """Train with each choice of keys, and read the last evaluation of each.

    Returns:
        for each: "options", "steps", "error" (squared error of the held-out images), and by scale
        "codes_used" (share of the codes) and "codes_perplexity".
    Raises:
        UserError: a training ended with an error, which it printed.
    """
    rows = []
    for number, keys in enumerate(choices):
        folder = out / str(number)
        words = ["train-vae", "--recipe", RECIPE, "--out", str(folder)]
        words += ["--vae-training.epochs", str(epochs)]
        for key, value in keys.items():
            words += [f"--vae-training.{key}", value]
        if variant(words):
            raise UserError(f"code_use: the training of {keys} has failed")
        last = json.loads((folder / "vae-metrics.jsonl").read_text().splitlines()[-1])
        by_scale = last["held_out_by_scale"]
        rows.append({
            "options": keys,
            "steps": last["step"],
            "error": last["held_out"]["reconstruction"],
            "codes_used": by_scale["codes_used"],
            "codes_perplexity": by_scale["codes_perplexity"],
        })  # fmt: skip
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a table."""
    cells = [
        [
            ", ".join(f"`{key} {value}`" for key, value in row["options"].items())
            or "none: the recipe's own",
            " ".join(f"{100 * share:.0f}" for share in row["codes_used"]),
            " ".join(f"{number:.1f}" for number in row["codes_perplexity"]),
            f"{row['error']:.4f}",
        ]
        for row in rows
    ]
    return table(["keys", "% of the codes by scale", "perplexity by scale", "squared error"], cells)


def main(words: list[str] | None = None) -> int:
    """The command; 0, or 1 with an error of one line."""
    options = tyro.cli(Options, args=words, prog="python -m benchmarks.code_use")
    try:
        rows = measure(options.out, options.epochs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines(rows)))
    if options.json is not None:
        result = {"format": FORMAT, "recipe": RECIPE, "epochs": options.epochs}
        write_result(options.json, {**result, "environment": environment(), "rows": rows})
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
