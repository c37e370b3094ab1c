"""The error of 8-bit K/V on the golden models and on the digits model.

    python -m benchmarks.kv8 --json benchmarks/results/kv8-error-MACHINE.json [--package]

``--package`` also writes the figures that ``variant plan --kv-dtype fp8`` prints. Nothing is timed:
the machine need not be idle.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.golden_weights import NAMES, golden_model
from benchmarks.results import KV8
from variant.bench.environment import environment
from variant.bench.models import build
from variant.bench.result_file import write_result
from variant.cli.kv_error_table import FIGURES, kv_error_table
from variant.cli.output import console
from variant.engine.engine import Engine
from variant.evaluation.kv_error import KVError, measure_kv_error
from variant.models.var import VAR
from variant.models.vqvae import VQVAE

DTYPES = (torch.float32, torch.bfloat16)
IMAGES = 8


def models() -> dict[str, tuple[VAR, VQVAE]]:
    """Every model to measure, by its name in the results."""
    return {"digits": build("digits"), **{f"golden {n}": golden_model(n) for n in NAMES}}


def measure(var: VAR, vae: VQVAE) -> dict[torch.dtype, list[KVError]]:
    """The errors of one model by dtype."""
    return {
        dtype: measure_kv_error(Engine(var, vae, dtype=dtype), images=IMAGES) for dtype in DTYPES
    }


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result file that is shipped with the package."""
    source = {key: result["environment"][key] for key in ("command", "commit", "cpu", "torch")}
    return {"source": source, "rows": result["rows"]}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv8")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--package", action="store_true")
    options = parser.parse_args()
    words = ["python", "-m", "benchmarks.kv8", *sys.argv[1:]]
    result: dict[str, Any] = {"format": KV8, "environment": environment(words), "rows": []}
    for name, (var, vae) in models().items():
        for errors in measure(var, vae).values():
            console().print(kv_error_table(name, errors))
            result["rows"] += [{"model": name, **asdict(row)} for row in errors]
    write_result(options.json, result)
    if options.package:
        write_result(FIGURES, figures(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
