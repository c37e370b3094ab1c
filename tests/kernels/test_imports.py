"""Importing variant_kernels imports torch and numpy, and no compiler."""

import subprocess
import sys

IMPORTS = """
import importlib, sys
from pathlib import Path
import torch, numpy
before = set(sys.modules)
import variant_kernels
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert added == {"variant_kernels"}, added
root = Path(variant_kernels.__file__).parent
for path in root.rglob("*.py"):
    # The Triton kernels import Triton; __main__ is a command.
    if path.is_relative_to(root / "triton_ops") or path.stem in ("__init__", "__main__"):
        continue
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
    importlib.import_module(name)
assert "variant_kernels.integrations.infinity" in sys.modules
assert "torch._dynamo" not in sys.modules
assert "triton" not in sys.modules
"""


def test_the_package_imports_torch_and_numpy_alone_and_not_dynamo():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
