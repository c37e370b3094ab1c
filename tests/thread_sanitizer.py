"""A pytest plugin that loads the extension built for ThreadSanitizer (`make test-tsan`).

VARIANT_TSAN_EXTENSION is its path. The tests then call it where they would call the installed one.
The plugin must be given with -p: it has to be imported before the tests' conftest.py.
"""

import importlib.util
import os
import sys

NAME = "variant_kernels._C"
if NAME in sys.modules:
    raise ImportError("thread_sanitizer: the installed extension is loaded already; use pytest -p")
spec = importlib.util.spec_from_file_location(NAME, os.environ["VARIANT_TSAN_EXTENSION"])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[NAME] = module


def pytest_collection_finish(session):
    from variant_kernels.cpu_ops.common import KERNELS

    assert KERNELS is module, f"the tests call {KERNELS.__file__}"
