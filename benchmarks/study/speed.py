"""What the pieces of the study cost on this machine, measured before anything is run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.study.settings import Study, identity
from variant.data.encode import encode_images
from variant.engine.engine import Engine
from variant.files import atomic_write
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.training.classifier import Classifier

ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """CPU seconds of one thread.

    step: of training, full network.  evaluated_image, generated_image: full network.
    images: training images of the data.
    """

    step: float
    evaluated_image: float
    generated_image: float
    vae_image: float
    encoded_image: float
    classifier_step: float
    images: int


def measured_speed(study: Study, out: Path, images: int) -> Speed:
    """The speed of this machine; measured once for an output folder, in seconds."""
    path = out / "speed.json"
    sizes = identity(study.recipe, study.values["batch"], images)
    try:
        found = json.loads(path.read_text())
        if found.pop("identity") == sizes:
            return Speed(**found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    speed = measure_speed(study, images)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"identity": sizes, **asdict(speed)}, indent=1) + "\n")
    return speed


def measure_speed(study: Study, images: int) -> Speed:
    """Time every piece with random weights."""
    phases = {"joint": 1, "transition": 0, "refinement": 0}
    recipe = study.recipe_of({"schedule": phases})
    config, size = recipe.var_config, recipe.vae.image_size
    var, vae = VAR(config), VQVAE(recipe.vae)
    count, batch = recipe.optim.batch_size, min(study.values["batch"], 50)
    labels_B = torch.zeros(batch, dtype=torch.int64)
    tokens_BL = torch.zeros(batch, config.layout.total, dtype=torch.int64)
    pictures = torch.zeros(64, recipe.vae.in_channels, size, size)
    x_teacher = vae.teacher_input(tokens_BL)
    own = slice(0, min(count, batch))
    classifier = Classifier(config.num_classes)
    pixels = torch.zeros(128, 3, size, size, dtype=torch.uint8)
    optimizer = torch.optim.AdamW(var.parameters(), fused=True)

    def step() -> None:
        var.train()
        var(labels_B[own], x_teacher[own], targets_BL=tokens_BL[own]).mean.backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            var.eval()(labels_B, x_teacher, targets_BL=tokens_BL)

    engine = Engine(var, vae)

    def generate() -> None:
        engine.generate(labels_B, cfg=1.5, top_p=0.96, seed=0, max_batch=batch)

    def reconstruct() -> None:
        result = vae.train()(pictures)
        (result[0].mean() + result[1]).backward()

    def classify() -> None:
        classifier(pixels).logits_BC.mean().backward()

    return Speed(
        step=_seconds(step) * count / len(labels_B[own]),
        evaluated_image=_seconds(evaluate) / batch,
        generated_image=_seconds(generate) / batch,
        vae_image=_seconds(reconstruct) / len(pictures),
        encoded_image=_seconds(lambda: encode_images(vae.eval(), pictures)) / len(pictures),
        classifier_step=_seconds(classify),
        images=images,
    )


def _seconds(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return sorted(times)[ROUNDS // 2]
