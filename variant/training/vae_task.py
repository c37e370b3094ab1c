"""Training of the multi-scale VQ-VAE: squared pixel error plus the quantiser's loss.

Ours, and smaller than the original's recipe: no adversary and no perceptual loss. What it does
have is a remedy for codes that nothing uses: they move onto features of the current batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from variant.data.images import ImageData, Indices, stream
from variant.errors import UserError
from variant.models.vqvae import VQVAE
from variant.training.random_state import seed_everything
from variant.training.recipe import Recipe
from variant.training.run_setup import RunSetup
from variant.training.task import Summary, Task
from variant.training.trainer import Trainer

STREAM_REVIVE, STREAM_SCALES = 5, 6
# A code is unused when it gets less than this share of an even use of the codebook.
UNUSED = 0.03


class VAETask(Task):
    """The VQ-VAE as a training task; steps report "loss", evaluations "reconstruction"."""

    kind = "vae"

    def __init__(
        self, module: VQVAE, data: ImageData, recipe: Recipe, device: torch.device, steps: int
    ) -> None:
        self.module = self.vae = module
        self.data, self.recipe, self.device = data, recipe, device
        self.training = recipe.vae_training
        self.steps = steps
        self.last_revival = int(self.training.revive_until * steps)

    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        images = self.data.train(indices, epoch)[0].to(self.device)
        reconstructed, quantisation, _ = self.vae(images, self._num_scales(step))
        pixel_error = F.mse_loss(reconstructed.float(), images)
        return self.training.reconstruction * pixel_error + quantisation

    def name_of_step(self, step: int) -> str:
        return "loss"

    def _num_scales(self, step: int) -> int:
        """All scales, or in a share of the steps only the first few, uniformly many.

        The share falls linearly, to none at the end, when the finest details are learned.
        """
        scales = self.vae.layout.num_scales
        rng = stream(self.recipe.seed, step, STREAM_SCALES)
        is_cut = rng.random() < self.training.scale_dropout * (1 - step / self.steps)
        return int(rng.integers(1, scales)) if is_cut and scales > 1 else scales

    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        data = self.data
        images = (data.held_out(indices) if held_out else data.train(indices, 0))[0].to(self.device)
        made = self.vae.decode(self.vae.encode(images)).float() * 2 - 1
        return {"reconstruction": F.mse_loss(made, images).item()}

    def before_step(self, indices: Indices, epoch: int, step: int) -> None:
        every = self.training.revive_every
        if every and step <= self.last_revival and step % every == 0:
            images = self.data.train(indices, epoch)[0].to(self.device)
            rng = stream(self.recipe.seed, step, STREAM_REVIVE)
            # At the first step every code is new: all start from features.
            revive_codes(self.vae, images, rng, every_code=step == 0)


@torch.no_grad()
def revive_codes(
    module: VQVAE, images_BIYX: Tensor, rng: np.random.Generator, *, every_code: bool = False
) -> int:
    """Move codes that this batch does not use onto features of the batch; returns how many.

    The features are what each scale has left to code, so a moved code is the nearest one to at
    least one position.
    """
    quantizer = module.quantize
    rest = module.features(images_BIYX).float()
    rows, tokens = [], []
    for k in range(quantizer.layout.num_scales):
        rows.append(quantizer.rows(rest, k))
        tokens.append(quantizer.nearest(rows[-1]))
        rest = rest - quantizer.contribution(tokens[-1].view(len(images_BIYX), -1), k)
    all_rows = torch.cat(rows)
    vocab = quantizer.config.vocab_size
    hits = torch.cat(tokens).bincount(minlength=vocab)
    unused = (hits < UNUSED * len(all_rows) / vocab) | every_code
    chosen = rng.choice(len(all_rows), int(unused.sum()), replace=len(all_rows) < vocab)
    quantizer.embedding.weight[unused] = all_rows[torch.from_numpy(chosen).to(all_rows.device)]
    return len(chosen)


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
        seed: replaces the recipe's.
        resume_command: what to print when the run is stopped; None derives it from the recipe.
    Raises:
        UserError: the recipe trains none; see also :class:`variant.training.run_setup.RunSetup` and
            :meth:`variant.training.trainer.Trainer.run`.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, with everything saved.
    """
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    optim = recipe.vae_training.optim
    if recipe.vae_training.weights is not None or optim is None:
        raise UserError(f"{recipe.name}: trains no VQ-VAE; it uses {recipe.vae_training.weights}")
    setup = RunSetup(
        VAETask.kind,
        recipe,
        optim,
        out,
        device=device,
        resume=resume,
        resume_command=resume_command,
    )
    seed_everything(recipe.seed)
    module = VQVAE(recipe.vae).to(setup.device)
    epochs = recipe.vae_training.epochs
    task = VAETask(module, setup.data, recipe, setup.device, epochs * setup.steps_per_epoch)
    return Trainer(task, setup, epochs, console).run()
