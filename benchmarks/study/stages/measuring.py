"""What is measured of a run: held-out losses and generated images.

Axes: N images, K scales, L tokens, D features.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.study.metrics import distances, loss_row
from benchmarks.study.schedules import (
    Layers,
    depth_and_bridge,
    falling_schedule,
    layer_tokens,
    layers_of,
    masked_tokens,
    token_losses,
)
from benchmarks.study.settings import Run, Study, identity
from benchmarks.study.stages.files import (
    VAE,
    is_done,
    provenance,
    run_folder,
    vae_file,
    write_arrays,
    write_json,
)
from benchmarks.study.stages.shared import (
    CLASSIFIERS,
    PHASES,
    load_network,
    real_identity,
    tokens_identity,
)
from benchmarks.study.stages.training import token_source, train, training_identity, weights_file
from variant.engine.engine import Engine
from variant.models.config import VARConfig
from variant.models.pixels import to_uint8
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.paths import file_sha256
from variant.training.initial_weights import find_vae, load_vae
from variant.training.recipe import Recipe


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
