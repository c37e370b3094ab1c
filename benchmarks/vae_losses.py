"""VQ-VAEs that differ in their losses, side by side on held-out images.

    python -m benchmarks.vae_losses RECIPE --classifier FILE --json FILE NAME=FOLDER ...

Each folder is of a finished `variant train-vae`. The classifier, as `variant eval` trains one for
`--features classifier:RECIPE`, gives the features of the Fréchet distance; it must be another
network than that of the perceptual loss. Changes are against the first run. Nothing is timed:
the machine need not be idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import VAE_LOSSES
from variant.bench.environment import environment
from variant.bench.result_file import write_result
from variant.cli.evaluate import reference_of
from variant.errors import UserError
from variant.evaluation.classifier import load_classifier, to_uint8
from variant.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from variant.evaluation.image_sets import ImageSet
from variant.evaluation.paired import psnr, squared_errors, structural_similarity
from variant.evaluation.reconstruct import load_vqvae
from variant.evaluation.report import floor_of
from variant.models.config import to_plain
from variant.models.vqvae import VQVAE
from variant.training.checkpointer import Checkpointer
from variant.training.resume_rules import read_recipe

BATCH = 100
BLOCKS = 20  # of the jackknife


def gaussian(rows: list[Tensor]) -> Gaussian:
    return FeatureStatistics.of(torch.cat(rows)).gaussian()


def standard_error(real_ND: Tensor, first_ND: Tensor, second_ND: Tensor) -> float:
    """Of the difference between two runs' distances, by a jackknife over blocks of images.

    The runs reconstruct the same images, so that a block is left out on all three sides.
    """
    numbers = torch.arange(len(real_ND)) % BLOCKS
    differences = []
    for block in range(BLOCKS):
        real, first, second = (
            gaussian([rows_ND[numbers != block]]) for rows_ND in (real_ND, first_ND, second_ND)
        )
        differences.append(frechet_distance(real, first) - frechet_distance(real, second))
    values = torch.tensor(differences, dtype=torch.float64)
    return float(((BLOCKS - 1) / BLOCKS * (values - values.mean()).square().sum()).sqrt())


@torch.inference_mode()
def quality(
    vae: VQVAE, images: ImageSet, network: Any, real: Gaussian
) -> tuple[dict[str, Any], Tensor]:
    """Of the reconstructions of all images: rFD, PSNR in dB, SSIM, PSNR and codes by scale.

    Returns:
        these by name, and the features (N, D) of the reconstructions.
    """
    layout, config = vae.layout, vae.config
    errors = torch.zeros(layout.num_scales, dtype=torch.float64)
    hits = torch.zeros(layout.num_scales, config.vocab_size, dtype=torch.int64)
    ssim, features = 0.0, []
    for start in range(0, images.count, BATCH):
        pixels = images.read(range(start, min(start + BATCH, images.count)))
        tokens = vae.encode(pixels[:, : config.in_channels].float() / 127.5 - 1)
        last = pixels
        for k, decoded in enumerate(vae.decode_by_scale(tokens)):
            last = to_uint8(2 * decoded - 1).contiguous()
            errors[k] += squared_errors(pixels, last).sum()
            hits[k] += tokens[:, layout.slice(k)].flatten().bincount(minlength=config.vocab_size)
        ssim += float(structural_similarity(pixels, last).sum())
        features.append(network.run(last).features_BD)
    row = {
        "fd": frechet_distance(real, gaussian(features)),
        "psnr": psnr(float(errors[-1]) / images.count),
        "ssim": ssim / images.count,
        "psnr_by_scale": [psnr(float(error) / images.count) for error in errors],
        "codes_used_by_scale": (hits > 0).double().mean(1).tolist(),
    }
    return row, torch.cat(features)


def training(folder: Path) -> dict[str, Any]:
    """How the VQ-VAE of a folder was trained.

    sha256: of its weights.  start_sha256: of those that it started from; None were random.
    settings: the section [vae_training] of its recipe without the path of the latter.
    """
    checkpointer = Checkpointer(folder, "vae")
    saved = checkpointer.read()
    section = read_recipe(saved["recipe"], str(folder)).vae_training
    assert section.optim is not None, "it was trained"
    settings = {key: value for key, value in to_plain(section).items() if key != "start_weights"}
    return {
        "losses": section.loss_text,
        "train_images": saved["inputs"]["num_train"],
        "batch": section.optim.batch_size,
        "steps": saved["step"],
        "adversary_from": section.adversary.start_step if section.adversary.weight else None,
        "sha256": saved["best_sha256"],
        "start_sha256": saved["inputs"].get("start_sha256"),
        "settings": settings,
    }


def measure(
    recipe: str, classifier: Path, runs: dict[str, Path], count: int | None = None
) -> dict[str, Any]:
    """The fields of a result file without its format and machine.

    Args:
        count: of the held-out images, the first; None takes all.
    """
    images = reference_of(recipe).images
    if images is None:
        raise UserError(f"{recipe}: must be a recipe with held-out images")
    assert images.labels is not None, "those of a recipe have labels"
    count = min(count or images.count, images.count)
    images = dataclasses.replace(images, count=count, labels=images.labels[:count])
    network, record = load_classifier(classifier, recipe, torch.device("cpu"))
    with torch.inference_mode():
        rows = [
            network.run(images.read(range(i, min(i + BATCH, images.count)))).features_BD
            for i in range(0, images.count, BATCH)
        ]
    real, found = gaussian(rows), list[dict[str, Any]]()
    first_ND = None
    for name, folder in runs.items():
        row, features_ND = quality(load_vqvae(str(folder), "cpu"), images, network, real)
        first_ND = features_ND if first_ND is None else first_ND
        error = standard_error(torch.cat(rows), features_ND, first_ND) if found else None
        found.append({"name": name, **training(folder), **row, "fd_change_error": error})
    return {
        "recipe": recipe,
        "images": images.count,
        "classifier": {"sha256": network.sha256, "seed": record.seed, "accuracy": record.accuracy},
        "floor": floor_of(torch.cat(rows), count // 2, images.labels),
        "rows": found,
    }


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae_losses")
    parser.add_argument("recipe")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--images", type=int, help="held-out images, the first ones")
    parser.add_argument("--json", type=Path, required=True)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    runs = {name: Path(folder) for name, _, folder in (run.partition("=") for run in options.runs)}
    machine = environment(["python", "-m", "benchmarks.vae_losses", *words])
    measured = measure(options.recipe, options.classifier, runs, options.images)
    write_result(options.json, {"format": VAE_LOSSES, "environment": machine, **measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
