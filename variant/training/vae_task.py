"""Training of the multi-scale VQ-VAE.

Its loss is the pixel error plus the quantiser's loss and, where the recipe says so, a perceptual
and an adversarial loss. Unused codes are moved onto features of the current batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from variant.data.images import Indices
from variant.data.samples import ImageSource, Source
from variant.errors import UserError
from variant.models.vqvae import VQVAE
from variant.paths import file_sha256, path_kind
from variant.torch_modes import modes_of_a_new_process
from variant.training.adversary import Adversary
from variant.training.checkpointer import Checkpointer
from variant.training.classifier import (
    RUN_NAME,
    is_there,
    read_classifier,
    save_classifier,
    train_classifier,
)
from variant.training.code_use import HeldOutUse
from variant.training.codebook import CODES, CodebookTraining
from variant.training.console import lossy
from variant.training.distributed import Ranks, connected, device_of_rank, rank_of_environment
from variant.training.image_loss import ImageLoss
from variant.training.initial_weights import Weights, named_weights
from variant.training.optim import OptimSection
from variant.training.parallel import ParallelSection
from variant.training.perceptual import PerceptualLoss, classifier_loss, given_loss
from variant.training.random_state import seed_everything
from variant.training.recipe import Recipe, with_seed
from variant.training.run_setup import RunSetup, open_run
from variant.training.sample_grid import COLUMNS
from variant.training.task import Summary, Task
from variant.training.trainer import Trainer
from variant.training.vae_sections import CLASSIFIER
from variant_kernels.wording import counted


class VAETask(Task):
    """The VQ-VAE as a training task.

    The loss of a step is named "loss"; those of an evaluation are "reconstruction" and, if there is
    a perceptual loss, "perceptual".

    steps: optimiser steps of the complete run.
    ranks: the processes of the run; None is this one alone.
    perceptual: None has no such loss.
    """

    kind = "vae"
    discriminator: Adversary | None = None

    def __init__(
        self,
        module: VQVAE,
        data: Source,
        recipe: Recipe,
        device: torch.device,
        steps: int,
        ranks: Ranks | None = None,
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        self.module = self.vae = self.network = module
        self.data, self.recipe, self.device = data, recipe, device
        self.training = recipe.vae_training
        self.ranks = ranks or Ranks()
        self.codebook = CodebookTraining(module, recipe, steps, self.measure, self.ranks)
        self.ema_decay = self.training.ema_decay
        self.perceptual = perceptual
        section, optim = self.training.adversary, self.training.optim
        if section.weight and optim is not None:
            channels = recipe.vae.in_channels
            self.adversary = self.discriminator = Adversary(
                section, channels, optim, recipe.seed, self.ranks, device
            )
        last_layer = module.decoder.conv_out.weight
        self.image_loss = ImageLoss(
            self.training, perceptual, self.discriminator, last_layer, self.measure
        )
        self._held_out_use: HeldOutUse | None = None

    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        images = self.fetch(indices, epoch).to(self.device).images
        reconstructed, quantisation, _ = self.network(images, self.codebook.num_scales(step))
        self.measure("loss/quantization", quantisation, weight=len(images))
        share = len(images) / self.batch_size
        scale = None if self.scaler is None else self.scaler.scale(images.new_ones(()))
        loss = self.image_loss(reconstructed.float(), images, step, share, scale)
        return loss + quantisation + self.codebook.loss(len(images))

    @property
    def batch_size(self) -> int:
        """Images of a step, over all processes."""
        assert self.training.optim is not None, "a VQ-VAE that is trained has an optimiser"
        return self.training.optim.batch_size

    @property
    def uses_every_parameter(self) -> bool:
        # Scales that are left out leave out their residual convolutions.
        return False

    @property
    def notes(self) -> list[str]:
        optim, notes = self.training.optim, []
        if self.perceptual is not None:
            notes.append(f"perceptual loss: {self.perceptual.what}")
        if self.training.entropy and optim is not None and optim.accumulate > 1:
            notes.append(
                f"entropy term: a batch has {counted(optim.accumulate, 'part')}, each with a term "
                "of its own; a smaller accumulate takes more images together"
            )
        return notes

    def after_backward(self, step: int, rate: float) -> Tensor | None:
        if self.discriminator is None or not self.discriminator.starts_by(step):
            return None
        norm = self.discriminator.step(rate)
        # Every rank has it and adds it: a step weighs the same with any number of processes.
        self.measure("gradient_norm/discriminator", norm, weight=1 / self.ranks.size)
        return norm

    def is_adversarial(self, step: int) -> bool:
        return self.discriminator is not None and step > self.discriminator.section.start_step

    def mean_loss(self, losses: Mapping[str, float]) -> float:
        if "perceptual" not in losses:
            return super().mean_loss(losses)
        # Weighted as in the training loss.
        pixels, distance = self.training.reconstruction, self.training.perceptual.weight
        total = pixels * losses["reconstruction"] + distance * losses["perceptual"]
        return total / (pixels + distance)

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
        return self.image_loss.held_out(reconstructed, images)

    def held_out_losses(self, ranks: Ranks) -> dict[str, float]:
        """With the use of the codes at each scale beside the losses."""
        self._held_out_use = self.codebook.held_out_use(ranks.share(self.num_evaluated))
        losses = super().held_out_losses(ranks)
        use, self._held_out_use = self._held_out_use, None
        return losses | use.values(ranks)

    def after_step(self, step: int) -> None:
        self.codebook.end_step()

    def before_step(self, indices: Indices, epoch: int, step: int) -> Mapping[str, Tensor] | None:
        if not self.codebook.revives_at(step):
            return None
        own = indices[self.ranks.share(len(indices))]
        with self.waiting():
            images = self.data.samples(own, epoch).images.to(self.device)
        return {CODES: self.codebook.revive(images, step)}


@modes_of_a_new_process()
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
        SystemExit: 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), with everything saved.
    """
    recipe = with_seed("train_vae", recipe, seed)
    training, device = recipe.vae_training, device or device_of_rank()
    optim = training.optim
    if training.weights is not None or optim is None:
        raise UserError(f"{recipe.name}: trains no VQ-VAE; it uses {training.weights} instead")
    if rank_of_environment()[1] > 1:
        # FSDP2 gathers weights where a whole module is called; here parts are. They are small.
        recipe = dataclasses.replace(recipe, parallel=ParallelSection("ddp"))
    with (
        connected(device) as ranks,
        open_run(
            VAETask.kind,
            recipe,
            optim,
            out,
            device=device,
            resume=resume,
            resume_command=resume_command,
            ranks=ranks,
        ) as setup,
    ):
        return _train(setup, optim, console)


def _train(setup: RunSetup, optim: OptimSection, console: Console | None) -> Summary:
    recipe, training = setup.recipe, setup.recipe.vae_training
    epochs, steps = training.epochs, training.epochs * setup.steps_per_epoch
    for problem in training.adversary.problems(steps):
        raise UserError(f"{recipe.name}: vae_training.adversary.{problem}")
    if training.trainable == "all" and setup.saved is not None and setup.saved["step"] < steps:
        _check_transformer(setup.folder)
    start = None
    if training.start_weights is not None and not setup.keeps_start:
        start = _start(recipe.name, training.start_weights)
        setup.record_inputs({"start_sha256": start.sha256()})
    seed_everything(recipe.seed)
    module = VQVAE(recipe.vae)
    if start is not None and setup.saved is None:
        start.load_into(module, recipe)
    perceptual = _perceptual(setup, console)  # after weights that do not fit were refused
    module = module.to(setup.device)
    if training.trainable == "decoder":
        module.requires_grad_(False)
        module.decoder.requires_grad_(True)
        module.post_quant_conv.requires_grad_(True)
    task = VAETask(module, setup.data, recipe, setup.device, steps, setup.ranks, perceptual)
    return Trainer(task, setup, epochs, console).run()


def _check_transformer(folder: Path) -> None:
    """Raises: UserError, if the folder holds a transformer, whose tokens would change."""
    transformer = Checkpointer(folder, "var")
    if transformer.exists:
        raise UserError(
            f"{folder}: holds a transformer ({transformer.path.name}) that was trained on the "
            "tokens of this VQ-VAE; more steps would change them. Copy the files vae-* into "
            "another folder, and give it as --out"
        )


def _start(recipe: str, name: str) -> Weights:
    """The trained VQ-VAE that a run starts from.  Raises: UserError, saying what makes one."""
    try:
        return named_weights("vae", name)
    except UserError as error:
        if path_kind(name) is not None:
            raise
        raise UserError(
            f"{recipe}: vae_training.start_weights: {error}; `variant train-vae` with another "
            "recipe trains one into a folder"
        ) from None


def _perceptual(setup: RunSetup, console: Console | None) -> PerceptualLoss | None:
    """The recipe's perceptual loss; its classifier is trained first, by one process for all."""
    section = setup.recipe.vae_training.perceptual
    if not section.weight:
        return None
    if section.network != CLASSIFIER:
        loss = given_loss(section, setup.recipe.name, setup.device)
    else:
        with setup.ranks.one_after_another():
            loss = _classifier(setup, console)
    recorded = None if setup.saved is None else setup.saved["inputs"].get("perceptual_sha256")
    # Earlier versions recorded "" for every function.
    setup.record_inputs({"perceptual_sha256": "" if recorded == "" else loss.sha256})
    return loss


def _classifier(setup: RunSetup, console: Console | None) -> PerceptualLoss:
    """The classifier in the run's folder, trained if there is none of this recipe's images."""
    recipe, source = setup.recipe, setup.data
    assert isinstance(source, ImageSource), "a VQ-VAE is trained on images"
    steps = recipe.vae_training.perceptual.steps
    path = setup.folder / RUN_NAME
    wanted = {
        "data_sha256": source.digest(),
        "seed": recipe.seed,
        "steps": steps,
        "image_size": recipe.vae.image_size,
        "image_channels": recipe.vae.in_channels,
        "augmentation": recipe.data.augmentation_of_images,
    }
    found = read_classifier(path) if is_there(path) else None
    if found is None or not found[1].is_of(**wanted):
        out = lossy(console or Console())
        out.print(f"vae: training the classifier of the perceptual loss, {counted(steps, 'step')}")
        trained = train_classifier(source.data, seed=recipe.seed, steps=steps, device=setup.device)
        source.count_bad()
        save_classifier(path, *trained)
        found = read_classifier(path)
    classifier, record = found
    return classifier_loss(classifier, record.accuracy, file_sha256(path), setup.device)
