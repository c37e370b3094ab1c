"""The set-up of a training run: its data, folder and checkpoint, checked before any work starts."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from variant.checkpoints.config_file import CONFIG_NAME
from variant.checkpoints.sharded import WEIGHTS_NAME
from variant.data.file_stamps import FileStamps, compare_stamps
from variant.data.sources import classes_problem, data_inputs, differing_classes, open_source
from variant.data.token_source import TokenSource
from variant.engine.memory import check_fits
from variant.errors import UserError
from variant.folder_lock import clear_leftovers, locked_folder
from variant.models.parameter_count import var_parameters, vqvae_parameters
from variant.paths import path_kind
from variant.training.checkpoint_contents import check_epochs
from variant.training.checkpoint_files import CheckpointFiles
from variant.training.checkpointer import Checkpointer
from variant.training.classifier import RUN_NAME
from variant.training.distributed import Ranks, device_of_rank
from variant.training.metrics import MetricsFile
from variant.training.optim import OptimSection
from variant.training.parallel import chosen_mode
from variant.training.recipe import Recipe, load_recipe, recipe_names
from variant.training.resume_rules import compare_recipes, compare_schedules, read_recipe
from variant.training.sample_grid import sample_name
from variant.training.steps_file import StepsFile
from variant.training.tensorboard import require_tensorboard

# The command that trains each kind of task.
COMMANDS = {"var": "variant train", "vae": "variant train-vae"}
# Values that identify the training data besides the recipe; a resumed run must have the same ones.
INPUTS = {
    "num_train": "another number of training images",
    "num_held_out": "another number of held-out images",
    "data_sha256": "other image files or labels, or tokens of them",
    "vae_sha256": "another VQ-VAE",
    "start_sha256": "other weights to start from",
    "perceptual_sha256": "another network of the perceptual loss",
}
# Entries of the inputs that may differ between the machines of a run.
FILE_CONTENTS, FILE_TIMES = "file_contents", "file_times"
# Files of the finished model, which a run writes too.
MODEL_FILES = ("config.json", "model.safetensors", "README.md")


def resume_hint(command: str, recipe: Recipe, folder: Path) -> str:
    """The command that resumes a run of a packaged recipe; for others, the option to add."""
    packaged = load_recipe(recipe.name) if recipe.name in recipe_names() else None
    if packaged is None or load_recipe(recipe.name, seed=recipe.seed) != recipe:
        return "the same command and --resume"
    seed = "" if packaged.seed == recipe.seed else f" --seed {recipe.seed}"
    out = shlex.quote(str(folder))
    return f"{command} --recipe {recipe.name} --out {out}{seed} --resume"


def start_weights(recipe: Recipe, kind: str) -> str | None:
    """The weights that a recipe's task starts from; None are random ones."""
    return recipe.model.weights if kind == "var" else recipe.vae_training.start_weights


@contextmanager
def open_run(
    kind: str,
    recipe: Recipe,
    optim: OptimSection,
    folder: Path,
    *,
    ranks: Ranks | None = None,
    **options: Any,
) -> Iterator[RunSetup]:
    """The set-up of a run, whose folder rank 0 locks within the block; arguments of RunSetup.

    Raises:
        UserError: another training is writing into the folder; see also :class:`RunSetup`.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        with ranks.one_after_another():
            is_locked = ranks.is_first and stack.enter_context(locked_folder(Path(folder)))
            setup = RunSetup(kind, recipe, optim, folder, ranks=ranks, **options)
            if is_locked:
                clear_leftovers(setup.folder, run_files(setup.folder))
                if setup.saved is not None:
                    setup.checkpointer.files.remove_lone_best()
        yield setup


def run_files(folder: Path) -> tuple[str, ...]:
    """Patterns of the names of all files that runs write into their folder."""
    names: list[str] = []
    for kind in COMMANDS:
        names += CheckpointFiles(folder, kind).patterns
        names += [MetricsFile(folder, kind).path.name, StepsFile(folder, kind).path.name]
        names.append(sample_name(kind, None))
    classifier = RUN_NAME, Path(RUN_NAME).with_suffix(".json").name
    return (*names, *classifier, *MODEL_FILES)


class RunSetup:
    """A run's recipe, folder, data and, when it is resumed, its checkpoint.

    The constructor checks everything that can be checked before weights are read and images are
    encoded.

    Args:
        kind: of the task, "var" or "vae".
        optim: the optimiser section of that task.
        folder: for the run's files; created where it is missing.
        device: None is the GPU where there is one, else the CPU.
        resume: continue the run that the folder holds.
        resume_command: printed when the run is stopped; None derives it from the recipe.
        ranks: the processes of the run; None is this one alone.
    Attributes:
        data: the opened data set.  inputs: values that identify the training data.
        checkpointer: of this run.  saved: the checkpoint's contents, None for a new run.
        changes: allowed differences to the recipe of the run that is resumed.
        keeps_start: whether a resumed run names the same weights to start from as before.
    Raises:
        UserError: the folder holds a run or another model although resume is False, or no run
            although it is True; the checkpoint is damaged, or of another recipe or other data; the
            folder cannot be written; data, precision and batch size do not fit together; the
            models do not fit into memory.
    """

    def __init__(
        self,
        kind: str,
        recipe: Recipe,
        optim: OptimSection,
        folder: Path,
        *,
        device: torch.device | None = None,
        resume: bool = False,
        resume_command: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.optim, self.folder = recipe, optim, Path(folder)
        self.ranks = ranks or Ranks()
        self.device = device or device_of_rank()
        self.checkpointer = Checkpointer(
            self.folder,
            kind,
            recipe.output.keep,
            writes=self.ranks.is_first,
            shared=self.ranks.size > 1,
        )
        self.resume_command = resume_command or resume_hint(COMMANDS[kind], recipe, self.folder)
        self._check_folder(resume)
        self._check_memory(kind)
        if recipe.logging.tensorboard:
            require_tensorboard(recipe.name)
        section = "optim" if kind == "var" else "vae_training.optim"
        if optim.precision == "fp16" and self.device.type == "cpu":
            raise UserError(
                f'{recipe.name}: {section}.precision "fp16" needs a GPU; use "bf16" or "fp32" on '
                "a CPU"
            )
        parts = self.ranks.size * optim.accumulate
        if optim.batch_size < parts:
            raise UserError(
                f"{recipe.name}: {section}.batch_size must be at least the number of processes "
                f"times accumulate ({parts}); got {optim.batch_size}"
            )
        self.saved = self.checkpointer.read() if resume else None
        self.changes: list[str] = []
        old, where = None, str(self.checkpointer.path)
        if self.saved is not None:
            old = read_recipe(self.saved["recipe"], where)
            self.changes = compare_recipes(old, recipe, kind, where)
        vae = recipe.vae
        size, channels = vae.image_size, vae.in_channels
        self.data = open_source(recipe.data, size, channels, recipe.seed, mixed=kind == "var")
        if isinstance(self.data, TokenSource):
            self.data.check(recipe.name, vae)
        # Of a VQ-VAE too: the recipe goes on to train a transformer on its tokens.
        problem = classes_problem(recipe.model.num_classes, self.data)
        if problem is not None:
            raise UserError(f"{recipe.name}: {problem}")
        for problem in optim.problems(self.data.num_train):
            raise UserError(f"{recipe.name}: {section}.{problem}")
        self.inputs: dict[str, Any] = {}
        self._record_data()
        # The weights that a run started from are not read again, and may be gone when it resumes.
        self.keeps_start = False
        if self.saved is not None and old is not None:
            try:
                check_epochs(self.saved, self.steps_per_epoch)
            except ValueError as error:
                raise UserError(f"{where}: is damaged: {error}") from None
            self.keeps_start = start_weights(old, kind) == start_weights(recipe, kind)
            if self.keeps_start and "start_sha256" in self.saved["inputs"]:
                self.inputs["start_sha256"] = self.saved["inputs"]["start_sha256"]
            compare_schedules(old, recipe, kind, self.saved["step"], self.steps_per_epoch, where)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written: {error.strerror or error}"
            ) from None

    @property
    def common_inputs(self) -> dict[str, Any]:
        """The inputs that all processes of a run must have: not those of the machine's files."""
        own = (FILE_CONTENTS, FILE_TIMES)
        return {name: value for name, value in self.inputs.items() if name not in own}

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch; the images of an incomplete last batch are left out."""
        return self.optim.steps_per_epoch or self.data.num_train // self.optim.batch_size

    def record_inputs(self, values: Mapping[str, Any], detail: str = "") -> None:
        """Record some of :data:`INPUTS`.

        Args:
            detail: follows the message.
        Raises:
            UserError: the checkpoint of a resumed run records other values.
        """
        self.inputs |= values
        before = values if self.saved is None else self.saved["inputs"]
        changed = [name for name, value in values.items() if before.get(name) != value]
        if changed:
            texts = [
                f"{INPUTS[name]} (it was {before.get(name)!s:.100}, now it is {values[name]})"
                for name in changed
            ]
            raise UserError(
                f"{self.checkpointer.path}: was trained with {'; '.join(texts)}; resume with the "
                f"same{detail}"
            )

    def _record_data(self) -> None:
        digests = self.data.class_digests()
        detail = ""
        if self.saved is not None:
            changed = differing_classes(self.saved["inputs"].get("classes"), digests)
            detail = f". Changed: {', '.join(changed[:5])}" if changed else ""
        self.record_inputs(data_inputs(self.data), detail)
        self._record_files()
        self.inputs["classes"] = digests
        names = enumerate(self.data.classes)
        self.inputs["class_names"] = {str(label): name for label, name in names}

    def _record_files(self) -> None:
        """Record what the digest of the data does not cover, and compare it.

        Earlier versions recorded nothing of it.

        Raises:
            UserError: naming files whose contents were replaced.
        """
        stamps = self.data.file_stamps()
        if stamps.times is None:
            return
        self.inputs |= {FILE_CONTENTS: stamps.contents, FILE_TIMES: stamps.times}
        before = {} if self.saved is None else self.saved["inputs"]
        contents = before.get(FILE_CONTENTS)
        compare_stamps(
            str(self.checkpointer.path),
            "was trained with",
            FileStamps(contents if isinstance(contents, dict) else {}, before.get(FILE_TIMES)),
            stamps,
            "train into another folder",
            warns=self.ranks.is_first,
        )

    def _check_memory(self, kind: str) -> None:
        """Sizes in a recipe are limited, but may still be larger than this machine."""
        name, cpu = self.recipe.name, torch.device("cpu")
        vae = vqvae_parameters(self.recipe.vae)
        var = var_parameters(self.recipe.var_config) if kind == "var" else 0
        check_fits(name, "the weights", 4 * (var + vae), cpu)
        what = "weights, gradients and AdamW's two moments"
        check_fits(name, what, 16 * (var or vae) // self._shards(var or vae), self.device)

    def _shards(self, parameters: int) -> int:
        """The number of processes that the weights are divided among."""
        mode = chosen_mode(self.recipe.parallel, parameters, self.device)
        return self.ranks.size if mode == "fsdp2" else 1

    def _check_folder(self, resume: bool) -> None:
        folder, last = self.folder, self.checkpointer.last.name
        if not resume and self.checkpointer.exists:
            raise UserError(
                f"{folder}: already holds a run; continue it with --resume, or choose another "
                "folder"
            )
        best = self.checkpointer.best
        if not resume and path_kind(best) is not None:
            raise UserError(
                f"{folder}: holds the weights of a run without its checkpoint ({best.name}); "
                "choose another folder, or move them"
            )
        trained_here = Checkpointer(folder, "var").exists
        models = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (folder / name).exists()]
        if not resume and models and not trained_here:
            raise UserError(
                f"{folder}: holds a model ({models[0]}) but no training run; choose another folder"
            )
        if resume and not self.checkpointer.exists:
            raise UserError(f"{folder}: holds no run to resume ({last} is missing)")
