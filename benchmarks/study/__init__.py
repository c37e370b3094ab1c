"""The study in miniature: the claims of the VARiant paper on Fashion-MNIST, with seeds.

    python -m benchmarks.study run --out FOLDER [--jobs 2] [--only NAME ...] [--smoke]
    python -m benchmarks.study collect --out FOLDER
    python -m benchmarks.study export --out FOLDER --run NAME --seed 0 --to MODEL_FOLDER

``settings.py`` reads the runs, ``work.py`` gives every run the same work, ``stages/`` trains and
measures one run, ``tasks.py`` puts everything in order, ``scheduler.py`` runs it, ``collect.py``
makes the result files, ``join.py`` adds seeds of another machine to them, ``export.py`` makes a
model folder. What a run is follows from its settings and the weights that it starts from: finished
stages are kept, whatever commit made them.
"""
