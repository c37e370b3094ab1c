"""The stages of the study: the VQ-VAE, tokens, classifiers, and each run's training and measures.

A stage that is complete has written a JSON file with its identity; it is not run again as long as
its settings and inputs are the same. Training resumes from its checkpoints. Everything else is
short and starts anew.

Axes: N images, K scales, L tokens, D features.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study.metrics import distances, halves, loss_row
from benchmarks.study.schedules import (
    Layers,
    depth_and_bridge,
    falling_schedule,
    layer_tokens,
    layers_of,
    masked_tokens,
    token_losses,
)
from benchmarks.study.settings import BASE, Run, Study, identity
from benchmarks.study.work import Work, choose_epochs
from variant.bench.environment import environment
from variant.data.config import DataSection
from variant.data.encode import encode_images
from variant.data.images import ImageData
from variant.data.sources import open_data
from variant.data.token_source import TokenSource
from variant.engine.engine import Engine
from variant.files import atomic_write, file_sha256
from variant.models.config import VARConfig
from variant.models.pixels import to_uint8
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.checkpointer import Checkpointer
from variant.training.classifier import Classifier, held_out_accuracy, train_classifier
from variant.training.initial_weights import find_vae, load_vae
from variant.training.recipe import Recipe
from variant.training.tokenize import tokenize
from variant.training.vae_task import train_vae
from variant.training.var_task import train_var

VAE, CLASSIFIERS = "vae", ("features", "independent")
# Larger than any number of epochs or steps.
NEVER = 10**9
PHASES = {"joint": 1, "transition": 0, "refinement": 0}
# Of the VQ-VAE: data and seed; of the curve of a training. Identities leave these values out, so
# that those of a study with them are what they were before identities covered them.
IMAGES = {"data": {"kind": "idx", "dataset": "fashion-mnist"}, "seed": 0}
CURVE = {"curve": 500, "points": 8}
# Keys of the recipe that change no number of a training from tokens.
UNUSED = ("name", "description", "vae_training", "data", "eval", "seed")


def vae_recipe(study: Study) -> Recipe:
    """The recipe of the VQ-VAE."""
    output = {"checkpoint_minutes": study.values["checkpoint_minutes"]}
    return study.recipe_of({"schedule": PHASES, "output": output})


def vae_file(out: Path) -> Path:
    """The weights of the VQ-VAE."""
    return out / VAE / "vae-best.safetensors"


def run_folder(out: Path, run: Run) -> Path:
    """The folder of a run's files."""
    return out / "runs" / run.name / f"seed{run.seed}"


def is_done(path: Path, wanted: str) -> bool:
    """Whether a stage has written its file, with this identity."""
    return done_values(path, lambda: wanted) is not None


def done_values(path: Path, wanted: Callable[[], str]) -> dict[str, Any] | None:
    """The file of a stage; None if there is none, or one of another identity."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if values.get("identity") == wanted() else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of a stage, whole or not at all."""
    with atomic_write(path, durable=True) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def begin(folder: Path, wanted: str) -> None:
    """Keep what a stage that was killed has left in its folder; remove that of other settings."""
    begun = folder / "identity.json"
    if folder.exists() and not is_done(begun, wanted):
        shutil.rmtree(folder)
    write_json(begun, {"identity": wanted})


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz; equal arrays make equal files."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def provenance() -> dict[str, Any]:
    """The commit and machine of a stage."""
    found = environment()
    return {key: found.get(key) for key in ("date", "commit", "cpu", "isa", "python", "torch")}


# --- what all runs share -------------------------------------------------------------------------


def vae_identity(study: Study) -> str:
    """What the VQ-VAE depends on."""
    recipe = study.recipe
    images = {key: recipe[key] for key in IMAGES}
    others = [images] if images != IMAGES else []
    return identity(recipe["vae"], recipe["vae_training"], *others)


def make_vae(study: Study, out: Path) -> None:
    """Train the VQ-VAE."""
    wanted, recipe, folder = vae_identity(study), vae_recipe(study), out / VAE
    if is_done(folder / "vae.json", wanted):
        return
    begin(folder, wanted)
    started = time.process_time()
    summary = train_vae(recipe, folder, resume=Checkpointer(folder, "vae").exists)
    write_json(
        folder / "vae.json",
        {
            "identity": wanted,
            "sha256": file_sha256(vae_file(out)),
            "steps": summary.steps,
            "seconds": summary.seconds,
            "last_seconds": time.process_time() - started,
            "reconstruction": summary.held_out_loss["reconstruction"],
            **provenance(),
        },
    )


def make_tokens(study: Study, out: Path, name: str) -> None:
    """Encode the images of one kind of augmentation, one pass."""
    wanted, folder = tokens_identity(study, out, name), out / "tokens" / name
    if is_done(folder / "done.json", wanted):
        return
    begin(folder, wanted)
    data = study.values["tokens"][name]
    training = {"weights": str(vae_file(out))}
    recipe = study.recipe_of({"schedule": PHASES, "vae_training": training, "data": data})
    tokenize(recipe, folder, 1, vae_folder=out / VAE, device=torch.device("cpu"))
    write_json(folder / "done.json", {"identity": wanted})


def tokens_identity(study: Study, out: Path, name: str) -> str:
    """What the tokens of a name depend on."""
    data = {**study.recipe["data"], **study.values["tokens"][name]}
    return identity(data, study.recipe["seed"], file_sha256(vae_file(out)))


def saved_vae(study: Study, out: Path) -> VQVAE:
    """The trained VQ-VAE."""
    training = {"weights": str(vae_file(out))}
    recipe = study.recipe_of({"schedule": PHASES, "vae_training": training})
    return load_vae(recipe, find_vae(recipe, out / VAE)).eval().requires_grad_(False)


def images_of(study: Study) -> ImageData:
    """The images, without augmentation."""
    recipe = study.recipe_of({"schedule": PHASES})
    vae = recipe.vae
    return open_data(recipe.data, vae.image_size, vae.in_channels, recipe.seed)


def classifier_identity(study: Study, name: str) -> str:
    """What a classifier depends on."""
    values = study.values
    widths = values["independent_widths"] if name == "independent" else None
    return identity(name, values["classifier_steps"], widths, study.recipe["data"])


def make_classifier(study: Study, out: Path, name: str) -> None:
    """Train the classifier whose features are compared, or the independent one."""
    data, steps = images_of(study), study.values["classifier_steps"]
    options: dict[str, Any] = {"seed": 0, "steps": steps}
    if name == "independent":
        options |= {"seed": 1, "widths": tuple(study.values["independent_widths"])}
    classifier, _ = train_classifier(data, **options)
    path = out / "classifiers" / f"{name}.safetensors"
    with atomic_write(path) as temporary:
        save_file(classifier.state_dict(), temporary)
    accuracy = held_out_accuracy(classifier, data)
    found = {"identity": classifier_identity(study, name), "accuracy": accuracy, **provenance()}
    write_json(path.with_suffix(".json"), {**found, "sha256": file_sha256(path)})


def load_network(study: Study, out: Path, name: str) -> Classifier:
    """A classifier of :func:`make_classifier`."""
    widths = {"widths": study.values["independent_widths"]} if name == "independent" else {}
    classifier = Classifier(study.recipe["model"]["num_classes"], **widths)
    classifier.load_state_dict(load_file(out / "classifiers" / f"{name}.safetensors"))
    return classifier.eval().requires_grad_(False)


def real_identity(study: Study, out: Path) -> str:
    """What the figures of real images depend on."""
    networks = [file_sha256(out / "classifiers" / f"{name}.safetensors") for name in CLASSIFIERS]
    vae = file_sha256(vae_file(out))
    return identity(networks, study.values["generated"], study.recipe["data"], vae)


def make_real(study: Study, out: Path) -> None:
    """Features of two halves of the held-out images, and what one half scores beside the other.

    Also what the second half scores after the VQ-VAE has encoded and decoded it: no transformer
    generates images that are better than those of the right tokens.
    """
    if is_done(out / "real.json", real_identity(study, out)):
        return
    data = images_of(study)
    networks = {name: load_network(study, out, name) for name in CLASSIFIERS}
    labels, features, right = [], [], 0
    batch = study.values["batch"]
    for start in range(0, data.num_held_out, batch):
        images, own = data.held_out(range(start, min(start + batch, data.num_held_out)))
        pixels = to_uint8(images)
        features.append(networks["features"](pixels).features_BD)
        right += int((networks["independent"](pixels).logits_BC.argmax(1) == own).sum())
        labels.append(own)
    label_N, feature_ND = torch.cat(labels), torch.cat(features)
    first, second = halves(label_N.numpy(), study.values["generated"])
    parts = [(feature_ND[part], label_N[part]) for part in map(torch.from_numpy, (first, second))]
    classes = study.recipe["model"]["num_classes"]
    floor = distances(*parts[1], *parts[0], classes)
    features, decoded_right = [], 0
    vae = saved_vae(study, out)
    for places in np.split(second, range(batch, len(second), batch)):
        images, own = data.held_out(places.tolist())
        pixels = to_uint8(vae.decode(encode_images(vae, images)) * 2 - 1)
        features.append(networks["features"](pixels).features_BD)
        decoded_right += int((networks["independent"](pixels).logits_BC.argmax(1) == own).sum())
    decoded = distances(torch.cat(features), parts[1][1], *parts[0], classes)
    arrays = {"features": parts[0][0].numpy(), "labels": parts[0][1].numpy()}
    write_arrays(out / "real.npz", arrays)
    write_json(
        out / "real.json",
        {
            "identity": real_identity(study, out),
            "floor": {**floor, "accuracy": right / data.num_held_out},
            "reconstruction_floor": {**decoded, "accuracy": decoded_right / len(second)},
            **provenance(),
        },
    )


# --- runs ----------------------------------------------------------------------------------------


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
        save_file({name: value.contiguous() for name, value in saved["module"].items()}, temporary)
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
                sums[group] += norm * names.count(name)
    return {group: total / count for group, total in sums.items()} if count else None


def trained_run(study: Study, run: Run) -> Run:
    """The run whose weights a run measures."""
    return run if run.trains else study.find(str(run.model), run.seed)


def measured_identity(study: Study, out: Path, run: Run) -> str:
    """The identity of the weights that a run measures."""
    source = trained_run(study, run)
    return file_sha256(weights_file(study, out, source.name, run.seed))


def measured_layers(study: Study, out: Path, run: Run) -> dict[str, Layers]:
    """The layers of each scale of the schedules that a run measures, by their names."""
    recipe, config = measured_recipe(study, out, run)
    names = dict.fromkeys((*run.schedules, *run.generate))
    return {name: layers_of(config, name, recipe.schedule.bridge) for name in names}


def measured_recipe(study: Study, out: Path, run: Run) -> tuple[Recipe, VARConfig]:
    """A recipe that has the model which a run measures, and the model's sizes."""
    source = trained_run(study, run)
    schedule = {**source.recipe.get("schedule", {}), **PHASES}
    if schedule.get("zone_weights", "shared") != "shared":
        schedule |= {"joint": 0, "refinement": 1}
    for name in ("teacher", "schedules"):
        schedule.pop(name, None)
    training = {"weights": str(vae_file(out))}
    recipe = study.recipe_of({"schedule": schedule, "vae_training": training})
    config = recipe.var_config
    if config.zone_weights == "shared":  # depths that it did not train can be measured too
        others = study.recipe_of({"schedule": {**PHASES, "depths": [4, 2]}}).var_config.subnets
        config = dataclasses.replace(config, subnets={**others, **config.subnets})
    return recipe, config


def load_models(study: Study, out: Path, run: Run) -> tuple[VAR, VQVAE]:
    """The transformer that a run measures, and the VQ-VAE."""
    source = trained_run(study, run)
    recipe, config = measured_recipe(study, out, run)
    var = VAR(config)
    var.load_state_dict(load_file(weights_file(study, out, source.name, run.seed)))
    vae = load_vae(recipe, find_vae(recipe, out / VAE)).eval().requires_grad_(False)
    return var.eval().requires_grad_(False), vae


def shown_labels(study: Study, run: Run, labels_B: Tensor) -> Tensor:
    """The classes that the model is given: others than the right ones in a run that is broken."""
    return (labels_B + 1) % study.recipe["model"]["num_classes"] if run.permuted else labels_B


def losses_identity(study: Study, out: Path, run: Run) -> str:
    """What the losses of a run depend on."""
    sources = [measured_identity(study, out, run), tokens_identity(study, out, "plain")]
    values = study.values
    found = measured_layers(study, out, run)
    layers = {name: found[name] for name in run.schedules}
    return identity(sources, values["images"], values["batch"], run.permuted, run.kv_dtype, layers)


def measure_losses(study: Study, out: Path, run: Run) -> None:
    """The loss of every held-out image at every scale, by teacher forcing."""
    count, batch = study.values["images"], study.values["batch"]
    wanted, folder = losses_identity(study, out, run), run_folder(out, run)
    if is_done(folder / "losses.json", wanted):
        return
    var, vae = load_models(study, out, run)
    source = token_source(study, out, "plain", run.seed)
    count = min(count, source.num_held_out)
    measured = measured_layers(study, out, run)
    layers = {name: measured[name] for name in run.schedules}
    engine = Engine(var, vae) if run.kv_dtype else None
    found: dict[str, list[np.ndarray]] = {name: [] for name in run.schedules}
    started = time.process_time()
    for start in range(0, count, batch):
        samples = source.held_out(range(start, min(start + batch, count)))
        tokens_BL, labels_B = samples.tokens_BL, shown_labels(study, run, samples.labels_B)
        assert tokens_BL is not None, "a source of tokens gives tokens"
        x_teacher = vae.teacher_input(tokens_BL)
        for name, own in layers.items():
            if engine is not None:
                depth, own_bridge = depth_and_bridge(own)
                losses_BL = -engine.forced_log_probs(
                    labels_B, tokens_BL, depth=depth, bridge=own_bridge, max_batch=batch,
                    kv_dtype="fp8",
                )  # fmt: skip
            else:
                losses_BL = token_losses(var, labels_B, x_teacher, tokens_BL, own)
            parts = losses_BL.double().split(var.layout.tokens, dim=1)
            found[name].append(torch.stack([part.mean(1) for part in parts], 1).float().numpy())
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    write_arrays(folder / "losses.npz", arrays)
    write_json(
        folder / "losses.json",
        {
            "identity": wanted,
            "tokens": list(var.layout.tokens),
            "losses": {name: loss_row(a, var.layout.tokens) for name, a in arrays.items()},
            "layer_tokens": {name: layer_tokens(var.config, own) for name, own in layers.items()},
            "seconds": time.process_time() - started,
            **provenance(),
        },
    )


def generated_file(out: Path, run: Run, schedule: str) -> Path:
    """The figures of the images of a schedule."""
    return run_folder(out, run) / f"generated-{schedule}.json"


def generated_identity(study: Study, out: Path, run: Run, schedule: str) -> str:
    """What the generated images of a schedule depend on."""
    settings = {key: study.values[key] for key in ("generated", "batch", "cfg", "top_p")}
    weights = [measured_identity(study, out, run), file_sha256(vae_file(out))]
    layers = measured_layers(study, out, run)[schedule]
    return identity(
        weights, real_identity(study, out), settings, run.permuted, run.kv_dtype, layers, run.seed
    )


def measure_generated(study: Study, out: Path, run: Run, schedule: str) -> None:
    """Generate images of one schedule, all classes in turn, and compare them with real ones."""
    values = study.values
    wanted = generated_identity(study, out, run, schedule)
    path = generated_file(out, run, schedule)
    if is_done(path, wanted):
        return
    var, vae = load_models(study, out, run)
    networks = {name: load_network(study, out, name) for name in CLASSIFIERS}
    classes = var.config.num_classes
    real = np.load(out / "real.npz")
    count = len(real["labels"])
    label_N = torch.arange(count) % classes
    started = time.process_time()
    features, right = [], 0
    layers = measured_layers(study, out, run)[schedule]
    if falling_schedule(var.config, layers) is None:
        batches = _growing_batches(study, run, var, vae, label_N, layers)
    else:
        batches = _engine_batches(study, run, var, vae, label_N, layers)
    for labels_B, pixels in zip(label_N.split(values["batch"]), batches, strict=True):
        features.append(networks["features"](pixels).features_BD)
        right += int((networks["independent"](pixels).logits_BC.argmax(1) == labels_B).sum())
    feature_ND = torch.cat(features)
    real_MD, real_label_M = (torch.from_numpy(real[name]) for name in ("features", "labels"))
    row = distances(feature_ND, label_N, real_MD, real_label_M, classes)
    write_arrays(path.with_suffix(".npz"), {"features": feature_ND.numpy()})
    write_json(
        path,
        {
            "identity": wanted,
            "row": {**row, "accuracy": right / count},
            "seconds": time.process_time() - started,
            **provenance(),
        },
    )


def _engine_batches(
    study: Study,
    run: Run,
    var: VAR,
    vae: VQVAE,
    label_N: Tensor,
    layers: Layers,
) -> Iterator[Tensor]:
    """Images (B, 3, Y, X) uint8, a batch at a time."""
    values, (depth, bridge) = study.values, depth_and_bridge(layers)
    batches = Engine(var, vae).generate_batches(
        shown_labels(study, run, label_N),
        cfg=values["cfg"],
        top_p=values["top_p"],
        seed=run.seed,
        depth=depth,
        bridge=bridge,
        max_batch=values["batch"],
        image_dtype="uint8",
        kv_dtype="fp8" if run.kv_dtype else None,
    )
    for batch in batches:
        yield batch.images


def _growing_batches(
    study: Study, run: Run, var: VAR, vae: VQVAE, label_N: Tensor, layers: Layers
) -> Iterator[Tensor]:
    """The same of a schedule that the engine does not have."""
    values, image_ids_N = study.values, torch.arange(len(label_N))
    shown = shown_labels(study, run, label_N).split(values["batch"])
    for labels_B, image_ids_B in zip(shown, image_ids_N.split(values["batch"]), strict=True):
        tokens_BL = masked_tokens(
            var,
            vae,
            labels_B,
            layers,
            cfg=values["cfg"],
            top_p=values["top_p"],
            seed=run.seed,
            image_ids_B=image_ids_B,
        )
        yield to_uint8(vae.decode(tokens_BL) * 2 - 1)


def measure(study: Study, out: Path, run: Run, report: Callable[[str], None]) -> None:
    """Every stage of a run that is not complete."""
    if run.trains:
        report("training")
        train(study, out, run)
    report("losses")
    measure_losses(study, out, run)
    for schedule in run.generate:
        report(f"generating {schedule}")
        measure_generated(study, out, run, schedule)


def is_measured(study: Study, out: Path, run: Run) -> bool:
    """Whether every stage of a run is complete."""
    folder = run_folder(out, run)
    if run.trains and not is_done(folder / "train.json", training_identity(study, out, run)):
        return False
    return is_done(folder / "losses.json", losses_identity(study, out, run)) and all(
        is_done(generated_file(out, run, name), generated_identity(study, out, run, name))
        for name in run.generate
    )
