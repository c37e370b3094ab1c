"""The kernel benchmarks, and programs that report and compare result files; not installed."""
