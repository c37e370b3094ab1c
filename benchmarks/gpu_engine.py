"""``variant bench`` on a GPU, with VAR-d30 by default, without the command line's library.

    python -m benchmarks.gpu_engine --batch 64 --json FILE [--var-repo PATH] [--memory]

The command line needs tyro, which may be missing on a GPU machine; this module does not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from variant.cli.bench import bench
from variant.errors import UserError


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_engine")
    parser.add_argument("--model", default="var-d30")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 16, 8, 4, 2])
    parser.add_argument("--bridge", type=int, default=6)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--var-repo", type=Path)
    parser.add_argument("--kv-dtype", choices=["fp8"])
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options: dict[str, Any] = vars(parser.parse_args())
    command = SimpleNamespace(cfg=1.5, top_k=900, top_p=0.96, threads=None, **options)
    try:
        bench(cast(Any, command))
    except UserError as error:
        print(f"benchmarks.gpu_engine: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
