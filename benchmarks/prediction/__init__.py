"""A model of times on an H200 of what has a target; nothing here is a measurement.

``attention``: from the committed machine code of our kernels. ``generation``: products with weights
and memory-bound kernels by rooflines. ``sampling``, ``training``: the same for these. ``peers``:
FlexAttention and the original's calls, from published figures and counts of what they read and
write. ``python -m benchmarks.predict`` prints the table.
"""
