"""What all runs share: the VQ-VAE, the tokens, the classifiers and the figures of real images.

Axes: N images, D features.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.study.metrics import distances, halves
from benchmarks.study.settings import Study, identity
from benchmarks.study.stages.files import (
    VAE,
    begin,
    is_done,
    provenance,
    vae_file,
    write_arrays,
    write_json,
)
from variant.data.encode import encode_images
from variant.data.images import ImageData
from variant.data.sources import open_data
from variant.files import atomic_write, write_safetensors
from variant.models.pixels import to_uint8
from variant.models.vqvae import VQVAE
from variant.paths import file_sha256
from variant.training.checkpointer import Checkpointer
from variant.training.classifier import Classifier, held_out_accuracy, train_classifier
from variant.training.initial_weights import find_vae, load_vae
from variant.training.recipe import Recipe
from variant.training.tokenize import tokenize
from variant.training.vae_task import train_vae

CLASSIFIERS = ("features", "independent")
PHASES = {"joint": 1, "transition": 0, "refinement": 0}
# Identities leave out these values, so that those of a study with them are what they were before
# identities covered the data and the seed of the VQ-VAE.
IMAGES = {"data": {"kind": "idx", "dataset": "fashion-mnist"}, "seed": 0}


def vae_recipe(study: Study) -> Recipe:
    """The recipe of the VQ-VAE."""
    output = {"checkpoint_minutes": study.values["checkpoint_minutes"]}
    return study.recipe_of({"schedule": PHASES, "output": output})


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
    # Beside the folder: `variant tokenize` takes no folder that holds other files than its own.
    begin(folder, wanted, folder.with_name(f"{name}.json"))
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
        write_safetensors(temporary, classifier.state_dict())
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
