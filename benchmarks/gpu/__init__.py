"""One run on a machine with a GPU: every measurement in at most nine minutes.

``python -m benchmarks.gpu`` runs the steps of ``steps.STEPS`` (``__main__``, ``runner``), each in a
process of its own; ``record`` keeps what they measured. ``artefacts`` compiles beforehand, on any
machine. ``double`` rehearses the whole without a GPU. No module here imports torch at its top
except those that a step runs.
"""
