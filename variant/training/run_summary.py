"""What a run of a recipe will be: sizes, images, steps and epochs. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator

from variant.data.config import DataSection
from variant.data.idx import paths_of
from variant.data.samples import Source
from variant.data.sources import classes_problem, open_source
from variant.data.token_source import TokenSource
from variant.errors import UserError
from variant.models.parameter_count import var_parameters, vqvae_parameters
from variant.paths import path_kind
from variant.training.optim import OptimSection
from variant.training.recipe import Recipe
from variant_kernels.wording import counted


class RunSummary:
    """The sizes of a recipe's models and the steps of its runs.

    data: the opened images or tokens; None if they are not there or cannot be opened.
    missing: why not; empty if they are.
    problems: what would stop a run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.data: Source | None = None
        self.missing = ""
        vae = recipe.vae
        self.problems: list[str] = []
        try:
            self.data = open_source(recipe.data, vae.image_size, vae.in_channels, recipe.seed)
        except UserError as error:
            self.missing = str(error)
            if _is_there(recipe.data):  # else they may be on another machine
                self.problems.append(self.missing)
        self.problems += self._problems()

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every line of the summary."""
        recipe, config = self.recipe, self.recipe.var_config
        size, section, training = recipe.vae.image_size, recipe.schedule, recipe.vae_training
        origin = f"from {training.weights}" if training.weights else "trained"
        origin += f" further from {training.start_weights}" if training.start_weights else ""
        yield "recipe", f"{recipe.name}: {recipe.description}"
        yield "images", self._images()
        yield (
            "VQ-VAE",
            f"{counted(vqvae_parameters(recipe.vae), 'parameter')}, {size}x{size} pixels to "
            f"{counted(config.layout.total, 'token')} of "
            f"{counted(recipe.vae.vocab_size, 'code')}, {origin}",
        )
        start = f", from {recipe.model.weights}" if recipe.model.weights else ""
        yield (
            "transformer",
            f"{counted(var_parameters(config), 'parameter')}, {counted(config.depth, 'layer')} of "
            f"width {config.embed_dim}{start}",
        )
        for depth, layers in config.subnets.items():
            yield f"subnet {depth}", f"layers {', '.join(map(str, layers))}"
        if recipe.vae_training.optim is not None:
            yield (
                "train-vae",
                self._steps(recipe.vae_training.epochs, recipe.vae_training.optim),
            )
        phases = section.phase_lengths
        yield "train", self._steps(phases.total, recipe.optim)
        if section.has_subnets:
            epochs = phases.total
            share = sum(section.probability((i + 0.5) / 100) for i in range(100 * epochs))
            yield (
                "schedule",
                f"epochs {phases.joint} joint + {phases.transition} transition + "
                f"{phases.refinement} refinement; {share / epochs:.0f} % of the steps train a "
                "subnet",
            )

    def _images(self) -> str:
        if self.data is None:
            return "cannot be read" if self.problems else f"not there: {self.missing}"
        data = self.data
        return (
            f"{data.num_train:,} for training, {data.num_held_out:,} held out, "
            f"{counted(data.num_classes, 'class')}"
        )

    def _steps(self, epochs: int, optim: OptimSection) -> str:
        text = f"{counted(epochs, 'epoch')}, batches of {optim.batch_size}"
        if optim.accumulate > 1:
            text += f" in {counted(optim.accumulate, 'part')}"
        if self.data is None:
            return f"{text}; the number of steps depends on the images"
        per_epoch = self._per_epoch(optim, self.data)
        steps = counted(epochs * per_epoch, "step")
        return f"{text}, {steps} of {optim.precision}, {per_epoch:,} an epoch"

    def _per_epoch(self, optim: OptimSection, data: Source) -> int:
        return optim.steps_per_epoch or data.num_train // optim.batch_size

    def _problems(self) -> Iterator[str]:
        if self.data is None:
            return
        if isinstance(self.data, TokenSource):
            try:
                self.data.check(self.recipe.name, self.recipe.vae)
            except UserError as error:
                yield str(error)
        problem = classes_problem(self.recipe.model.num_classes, self.data)
        if problem is not None:
            yield problem
        sections = {
            "optim": self.recipe.optim,
            "vae_training.optim": self.recipe.vae_training.optim,
        }
        for name, optim in sections.items():
            if optim is not None:
                yield from (f"{name}.{text}" for text in optim.problems(self.data.num_train))
        training = self.recipe.vae_training
        if training.optim is not None:
            steps = training.epochs * self._per_epoch(training.optim, self.data)
            problems = training.adversary.problems(steps)
            yield from (f"vae_training.adversary.{text}" for text in problems)


def _is_there(section: DataSection) -> bool:
    """Whether there is something at every path of the data; of the digits there is none."""
    if section.kind == "digits":
        return False
    try:
        if section.kind == "idx":
            paths = list(paths_of(section).values())
        else:
            given = (section.train, section.held_out, section.tokens)
            own = given[2:] if section.kind == "tokens" else given[:2]
            paths = list(filter(None, own))
        return all(path_kind(path) is not None for path in paths)
    except UserError:
        return False
