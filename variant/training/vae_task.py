"""Training of the multi-scale VQ-VAE: squared pixel error plus the quantiser's loss.

This recipe is ours and smaller than the original's: it has no discriminator and no perceptual loss,
so it suits small images. Unused codes are moved onto features of the current batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from variant.data.images import Indices
from variant.data.samples import Source
from variant.errors import UserError
from variant.models.vqvae import VQVAE
from variant.training.code_use import HeldOutUse
from variant.training.codebook import CodebookTraining
from variant.training.distributed import Ranks, rank_of_environment
from variant.training.random_state import seed_everything
from variant.training.recipe import Recipe, with_seed
from variant.training.run_setup import open_run
from variant.training.sample_grid import COLUMNS
from variant.training.task import Summary, Task
from variant.training.trainer import Trainer


class VAETask(Task):
    """The VQ-VAE as a training task.

    The loss of a step is named "loss", that of an evaluation "reconstruction".

    steps: optimiser steps of the complete run.
    ranks: the processes of the run; None is this one alone.
    """

    kind = "vae"

    def __init__(
        self,
        module: VQVAE,
        data: Source,
        recipe: Recipe,
        device: torch.device,
        steps: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.module = self.vae = self.network = module
        self.data, self.recipe, self.device = data, recipe, device
        self.training = recipe.vae_training
        self.ranks = ranks or Ranks()
        self.codebook = CodebookTraining(module, recipe, steps, self.measure, self.ranks)
        self._held_out_use: HeldOutUse | None = None

    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        images = self.fetch(indices, epoch).to(self.device).images
        reconstructed, quantisation, _ = self.network(images, self.codebook.num_scales(step))
        pixel_error = F.mse_loss(reconstructed.float(), images)
        self.measure("loss/reconstruction", pixel_error)
        self.measure("loss/quantization", quantisation)
        pixels = self.training.reconstruction * pixel_error
        return pixels + quantisation + self.codebook.loss()

    def name_of_step(self, step: int) -> str:
        return "loss"

    def samples(self, ranks: Ranks) -> dict[str, Tensor]:
        """The first held-out images, and what is decoded from the first k scales of their tokens
        for every k."""
        count = min(COLUMNS, self.data.num_held_out)
        images = self.data.held_out(range(count)).images.to(self.device)
        rows = {"original": (images + 1) / 2}
        sides = self.vae.layout.shapes
        decoded = self.vae.decode_by_scale(self.vae.encode(images))
        return rows | {f"to {h}x{w}": row for (h, w), row in zip(sides, decoded, strict=True)}

    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        data = self.data
        samples = data.held_out(indices) if held_out else data.unmixed(indices)
        images = samples.images.to(self.device)
        tokens = self.vae.encode(images)
        if held_out and self._held_out_use is not None:
            layout = self.vae.layout
            scales = [tokens[:, layout.slice(k)] for k in range(layout.num_scales)]
            self._held_out_use.add(indices, scales)
        reconstructed = self.vae.decode(tokens).float() * 2 - 1
        return {"reconstruction": F.mse_loss(reconstructed, images).item()}

    def held_out_losses(self, ranks: Ranks) -> dict[str, float]:
        """With the use of the codes at each scale beside the losses."""
        self._held_out_use = self.codebook.held_out_use(ranks.share(self.num_evaluated))
        losses = super().held_out_losses(ranks)
        use, self._held_out_use = self._held_out_use, None
        return losses | use.values(ranks)

    def after_step(self, step: int) -> None:
        self.codebook.end_step()

    def before_step(self, indices: Indices, epoch: int, step: int) -> None:
        if self.codebook.revives_at(step):
            own = indices[self.ranks.share(len(indices))]
            with self.waiting():
                images = self.data.samples(own, epoch).images.to(self.device)
            self.codebook.revive(images, step)


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
        steps = epochs * setup.steps_per_epoch
        task = VAETask(module, setup.data, recipe, setup.device, steps, setup.ranks)
        return Trainer(task, setup, epochs, console).run()
