"""The training of a run: its recipe, its length and its weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.settings import BASE, Run, Study, identity
from benchmarks.study.stages.files import (
    begin,
    is_done,
    provenance,
    run_folder,
    vae_file,
    write_json,
)
from benchmarks.study.stages.shared import tokens_identity
from benchmarks.study.work import Work, choose_epochs
from variant.data.config import DataSection
from variant.data.token_source import TokenSource
from variant.files import atomic_write, write_safetensors
from variant.paths import file_sha256
from variant.training.checkpointer import Checkpointer
from variant.training.recipe import Recipe
from variant.training.var_task import train_var

# Larger than any number of epochs or steps.
NEVER = 10**9
# Of the curve of a training. Identities leave these values out, as IMAGES of shared.py.
CURVE = {"curve": 500, "points": 8}
# Keys of the recipe that change no number of a training from tokens.
UNUSED = ("name", "description", "vae_training", "data", "eval", "seed")


def token_source(study: Study, out: Path, name: str, seed: int) -> TokenSource:
    """The samples of a name."""
    return TokenSource(DataSection("tokens", tokens=str(out / "tokens" / name)), seed)


def training_identity(study: Study, out: Path, run: Run) -> str:
    """What the weights of a run and its curve depend on."""
    shared = {key: value for key, value in study.recipe.items() if key not in UNUSED}
    curve = {key: study.values[key] for key in CURVE}
    inputs: list[Any] = [
        shared,
        run.recipe,
        [run.seed, list(run.phases), run.work, run.epoch],
        tokens_identity(study, out, run.tokens),
    ]
    if run.name == BASE:  # every step is worth one, so that its work is its number of steps
        inputs.append(None)
    else:
        inputs.append(file_sha256(weights_file(study, out, BASE, run.seed)))
        inputs.append(training_length(study, run))
    return identity(*inputs, *([curve] if curve != CURVE else []))


def training_length(study: Study, run: Run) -> dict[str, int]:
    """Epochs of the phases: they follow from how the work of a step is counted."""
    wanted = (study.recipe, run.recipe, run.phases, run.epoch, run.work)
    return dict(_training_length(json.dumps((*wanted, run.seed), sort_keys=True)))


@cache
def _training_length(text: str) -> dict[str, int]:
    recipe, changes, phases, epoch, work, seed = json.loads(text)
    study = Study({}, recipe, ())
    # Teachers and zone weights ask for weights; how long a run is does not depend on them.
    values = {**changes, "seed": seed, "model": {"weights": f"of the {BASE} run"}}
    found, _ = choose_epochs(values, study.recipe_of, phases, epoch, work)
    return dataclasses.asdict(found.schedule.phase_lengths)


def weights_file(study: Study, out: Path, name: str, seed: int) -> Path:
    """The weights of a run that trains."""
    return run_folder(out, study.find(name, seed)) / "weights.safetensors"


def training_recipe(study: Study, out: Path, run: Run) -> tuple[Recipe, float]:
    """The recipe of a run, as long as its work asks for, and its work."""
    values: dict[str, Any] = {
        **run.recipe,
        "seed": run.seed,
        "data": {"kind": "tokens", "dataset": None, "tokens": str(out / "tokens" / run.tokens)},
        "vae_training": {"weights": str(vae_file(out))},
        "output": {
            "checkpoint_every": NEVER,
            "checkpoint_minutes": study.values["checkpoint_minutes"],
        },
        "logging": {"every": NEVER},
    }
    values["optim"] = {**values.get("optim", {}), "steps_per_epoch": run.epoch}
    if run.name != BASE:
        values["model"] = {"weights": str(weights_file(study, out, BASE, run.seed))}
    recipe, work = choose_epochs(values, study.recipe_of, run.phases, run.epoch, run.work)
    epochs = recipe.schedule.phase_lengths.total
    every = max(1, epochs // study.values["points"])
    held_out = {"every": every, "limit": study.values["curve"], "batch_size": study.values["batch"]}
    section = dataclasses.replace(recipe.eval, **held_out)
    return dataclasses.replace(recipe, eval=section), work


def train(study: Study, out: Path, run: Run) -> None:
    """Train a run; its weights are those of the last step."""
    wanted, folder = training_identity(study, out, run), run_folder(out, run)
    if is_done(folder / "train.json", wanted):
        return
    training = folder / "train"
    begin(training, wanted)
    recipe, work = training_recipe(study, out, run)
    checkpointer = Checkpointer(training, "var")
    train_var(recipe, training, resume=checkpointer.exists, device=torch.device("cpu"))
    saved = checkpointer.read()
    with atomic_write(folder / "weights.safetensors", durable=True) as temporary:
        module = {name: value.contiguous() for name, value in saved["module"].items()}
        write_safetensors(temporary, module)
    write_json(
        folder / "train.json",
        {
            "identity": wanted,
            "steps": saved["step"],
            "work": work,
            "seconds": saved["seconds"],
            "phases": dataclasses.asdict(recipe.schedule.phase_lengths),
            "sha256": file_sha256(folder / "weights.safetensors"),
            "curve": _curve(saved["history"]),
            "gradient_norms": _gradient_norms(training / "var-steps.jsonl", recipe, run.epoch),
            **provenance(),
        },
    )
    shutil.rmtree(training)


def schedule_name(name: str) -> str:
    """The name of a configuration of the trainer as a schedule of the study."""
    return f"d{name}" if name.isdecimal() else name


def _curve(history: list[dict[str, Any]]) -> list[Any]:
    return [
        [entry["step"], {schedule_name(name): loss for name, loss in entry["held_out"].items()}]
        for entry in history
        if "held_out" in entry
    ]


def _gradient_norms(path: Path, recipe: Recipe, steps: int) -> dict[str, float] | None:
    """Means over the steps of subnets of the norm of the gradient of one layer of each group."""
    if not recipe.schedule.has_subnets:
        return None
    work = Work(recipe, steps)
    sums = {"shared": 0.0, "full_only": 0.0}
    count = 0
    for line in map(json.loads, path.read_text().splitlines()):
        last = line["step"]
        names = [work.configurations.of_step(step).name for step in range(last - steps, last)]
        for name in set(names) - {"full"}:
            count += names.count(name)
            for group in sums:
                norm = line.get(f"gradient_norm/{name}/{group}", 0.0)
                sums[group] += float(norm) * names.count(name)
    return {group: total / count for group, total in sums.items()} if count else None
