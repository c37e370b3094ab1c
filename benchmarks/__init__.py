"""The kernel benchmarks, and programs that report and compare result files; not installed."""

import os

# What is compared is tuned; VARIANT_AUTOTUNE=0 still forbids it.
os.environ.setdefault("VARIANT_TUNE", "1")
