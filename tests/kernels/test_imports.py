"""Importing variant_kernels imports torch and numpy, and no compiler."""

import subprocess
import sys

IMPORTS = """
import importlib, pkgutil, sys
import torch, numpy
before = set(sys.modules)
import variant_kernels
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert added == {"variant_kernels"}, added
for module in pkgutil.walk_packages(variant_kernels.__path__, "variant_kernels."):
    # The Triton kernels import Triton; __main__ is a command.
    if "triton_ops" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "variant_kernels.integrations.infinity" in sys.modules
assert "torch._dynamo" not in sys.modules
assert "triton" not in sys.modules
"""


def test_the_package_imports_torch_and_numpy_alone_and_not_dynamo():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
