"""Training of the multi-scale VQ-VAE: squared pixel error plus the quantiser's loss.

This recipe is ours and smaller than the original's: it has no discriminator and no perceptual loss,
so it suits small images. Unused codes are moved onto features of the current batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from variant.data.images import Indices, stream
from variant.data.samples import Source
from variant.errors import UserError
from variant.models.vqvae import VQVAE
from variant.training.distributed import Ranks, rank_of_environment
from variant.training.random_state import seed_everything
from variant.training.recipe import Recipe, with_seed
from variant.training.run_setup import open_run
from variant.training.sample_grid import COLUMNS
from variant.training.task import Summary, Task
from variant.training.trainer import Trainer

STREAM_REVIVE, STREAM_SCALES = 5, 6
# A code is unused if a batch uses it less than this share of the average code.
UNUSED = 0.03


class VAETask(Task):
    """The VQ-VAE as a training task.

    The loss of a step is named "loss", that of an evaluation "reconstruction".

    steps: optimiser steps of the complete run.
    """

    kind = "vae"

    def __init__(
        self, module: VQVAE, data: Source, recipe: Recipe, device: torch.device, steps: int
    ) -> None:
        self.module = self.vae = self.network = module
        self.data, self.recipe, self.device = data, recipe, device
        self.training = recipe.vae_training
        self.steps = steps
        self.last_revival = int(self.training.revive_until * steps)

    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        images = self.fetch(indices, epoch).to(self.device).images
        reconstructed, quantisation, _ = self.network(images, self._num_scales(step))
        pixel_error = F.mse_loss(reconstructed.float(), images)
        self.measure("loss/reconstruction", pixel_error)
        self.measure("loss/quantization", quantisation)
        return self.training.reconstruction * pixel_error + quantisation

    def name_of_step(self, step: int) -> str:
        return "loss"

    def _num_scales(self, step: int) -> int:
        """Number of first scales that the step's images are reconstructed from.

        All of them, except in a share of the steps that draws their number uniformly. The share
        falls linearly to 0 at the end of training.
        """
        scales = self.vae.layout.num_scales
        rng = stream(self.recipe.seed, step, STREAM_SCALES)
        is_cut = rng.random() < self.training.scale_dropout * (1 - step / self.steps)
        return int(rng.integers(1, scales)) if is_cut and scales > 1 else scales

    def samples(self, ranks: Ranks) -> dict[str, Tensor]:
        """The first held-out images, and what is decoded from their tokens."""
        count = min(COLUMNS, self.data.num_held_out)
        images = self.data.held_out(range(count)).images.to(self.device)
        return {"original": (images + 1) / 2, "decoded": self.vae.decode(self.vae.encode(images))}

    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        data = self.data
        samples = data.held_out(indices) if held_out else data.unmixed(indices)
        images = samples.images.to(self.device)
        reconstructed = self.vae.decode(self.vae.encode(images)).float() * 2 - 1
        return {"reconstruction": F.mse_loss(reconstructed, images).item()}

    def before_step(self, indices: Indices, epoch: int, step: int) -> None:
        every = self.training.revive_every
        if every and step <= self.last_revival and step % every == 0:
            with self.waiting():
                images = self.data.samples(indices, epoch).images.to(self.device)
            rng = stream(self.recipe.seed, step, STREAM_REVIVE)
            # The first step moves every code, so that all start as features of images.
            revive_codes(self.vae, images, rng, every_code=step == 0)


@torch.no_grad()
def revive_codes(
    module: VQVAE, images_BIYX: Tensor, rng: np.random.Generator, *, every_code: bool = False
) -> int:
    """Move codes that this batch does not use onto features of the batch.

    The features are the residuals that each scale quantises. A moved code equals one of them, so it
    is the nearest code of at least one position.

    Args:
        images_BIYX: in [-1, 1].
        rng: chooses the features.
        every_code: move the used codes too.
    Returns:
        the number of moved codes.
    """
    quantizer = module.quantize
    residual = module.features(images_BIYX).float()
    features_of_scales, tokens_of_scales = [], []
    for k in range(quantizer.layout.num_scales):
        features = quantizer.residual_vectors(residual, k)
        tokens = quantizer.nearest(features)
        residual = residual - quantizer.contribution(tokens.view(len(images_BIYX), -1), k)
        features_of_scales.append(features)
        tokens_of_scales.append(tokens)
    features = torch.cat(features_of_scales)
    vocab_size = quantizer.config.vocab_size
    uses = torch.cat(tokens_of_scales).bincount(minlength=vocab_size)
    unused = (uses < UNUSED * len(features) / vocab_size) | every_code
    num_unused = int(unused.sum())
    chosen = rng.choice(len(features), num_unused, replace=len(features) < vocab_size)
    quantizer.embedding.weight[unused] = features[torch.from_numpy(chosen).to(features.device)]
    return num_unused


def train_vae(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    seed: int | None = None,
    console: Console | None = None,
    device: torch.device | None = None,
    resume_command: str | None = None,
) -> Summary:
    """Train a recipe's VQ-VAE into ``out``.

    Args:
        resume: continue the run that ``out`` holds.
        seed: replaces the recipe's seed.
        console: to print to; None is standard output.
        device: None is the GPU where there is one, else the CPU.
        resume_command: printed when the run is stopped; None derives it from the recipe.
    Raises:
        UserError: the recipe uses a trained VQ-VAE; another training is writing into ``out``; see
            also :class:`variant.training.run_setup.RunSetup` and
            :meth:`variant.training.trainer.Trainer.run`.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with everything saved.
    """
    recipe = with_seed("train_vae", recipe, seed)
    if rank_of_environment()[1] > 1:
        raise UserError("train-vae trains in one process; start it without torchrun")
    optim = recipe.vae_training.optim
    if recipe.vae_training.weights is not None or optim is None:
        raise UserError(
            f"{recipe.name}: trains no VQ-VAE; it uses {recipe.vae_training.weights} instead"
        )
    with open_run(
        VAETask.kind,
        recipe,
        optim,
        out,
        device=device,
        resume=resume,
        resume_command=resume_command,
    ) as setup:
        seed_everything(recipe.seed)
        module = VQVAE(recipe.vae).to(setup.device)
        epochs = recipe.vae_training.epochs
        task = VAETask(module, setup.data, recipe, setup.device, epochs * setup.steps_per_epoch)
        return Trainer(task, setup, epochs, console).run()
