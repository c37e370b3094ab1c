"""What is complete under the present settings: a stage of other settings is not.

A stage counts only if everything that it was made from counts too: a number of old settings must
never stand in a row of new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.settings import BASE, Run, Study
from benchmarks.study.stages import files, measuring, searching, shared, training

Values = dict[str, Any]


class Finished:
    """The files of stages that are complete, as dictionaries; None of one that is not."""

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self._known: dict[tuple[Any, ...], Values | None] = {}

    def vae(self) -> Values | None:
        """The VQ-VAE."""
        return self._once(
            ("vae",),
            self.out / files.VAE / "vae.json",
            lambda: shared.vae_identity(self.study),
            lambda: True,
        )

    def tokens(self, name: str) -> Values | None:
        """Tokens of a name."""
        return self._once(
            ("tokens", name),
            self.out / "tokens" / name / "done.json",
            lambda: shared.tokens_identity(self.study, self.out, name),
            self.vae,
        )

    def classifier(self, name: str) -> Values | None:
        """A classifier."""
        return self._once(
            ("classifier", name),
            self.out / "classifiers" / f"{name}.json",
            lambda: shared.classifier_identity(self.study, name),
            lambda: True,
        )

    def real(self) -> Values | None:
        """The figures of real images."""
        return self._once(
            ("real",),
            self.out / "real.json",
            lambda: shared.real_identity(self.study, self.out),
            lambda: self.vae() and all(map(self.classifier, shared.CLASSIFIERS)),
        )

    def trained(self, run: Run) -> Values | None:
        """The training of a run, or of the run whose model it measures."""
        source = measuring.trained_run(self.study, self.own(run))
        base = self.study.find(BASE, source.seed)
        return self._once(
            ("trained", source.name, source.seed),
            files.run_folder(self.out, source) / "train.json",
            lambda: training.training_identity(self.study, self.out, source),
            lambda: self.tokens(source.tokens) and (source.name == BASE or self.trained(base)),
        )

    def losses(self, run: Run) -> Values | None:
        """The held-out losses of a run."""
        own = self.own(run)
        return self._once(
            ("losses", own.name, own.seed),
            files.run_folder(self.out, own) / "losses.json",
            lambda: measuring.losses_identity(self.study, self.out, own),
            lambda: self.trained(own) and self.tokens("plain"),
        )

    def generated(self, run: Run, schedule: str) -> Values | None:
        """The figures of the images of a run."""
        own = self.own(run)
        return self._once(
            ("generated", own.name, own.seed, schedule),
            measuring.generated_file(self.out, own, schedule),
            lambda: measuring.generated_identity(self.study, self.out, own, schedule),
            lambda: self.trained(own) and self.real(),
        )

    def search(self, run: Run) -> Values | None:
        """What a search on the model of a run has found."""
        return self._once(
            ("search", run.name, run.seed),
            searching.search_file(self.out, run),
            lambda: searching.search_identity(self.study, self.out, run),
            lambda: self.trained(run) and self.vae(),
        )

    def own(self, run: Run) -> Run:
        """The run that has the results of a row."""
        return run if run.same_as is None else self.study.find(run.same_as, run.seed)

    def _once(
        self,
        key: tuple[Any, ...],
        path: Path,
        wanted: Callable[[], str],
        inputs_count: Callable[[], Any],
    ) -> Values | None:
        """Read a file whose inputs are complete; ``wanted`` may read them."""
        if key not in self._known:
            found = files.done_values(path, wanted) if inputs_count() else None
            self._known[key] = found
        return self._known[key]
