"""The kernel benchmarks, and what turns result files into a page or a verdict; not installed."""
