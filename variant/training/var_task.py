"""Training of the transformer as a depth supernet (VARiant, section 3.3).

Each optimiser step trains one configuration, the full network or one subnet, chosen by
:mod:`variant.training.schedule`; the loss is the cross-entropy averaged over all tokens of all
scales.

Axes: B images of a batch, C copies, N images of the data set, L tokens, V codebook entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from variant.checkpoints.model_folder import save_model
from variant.data.encode import encode_images
from variant.data.images import STREAM_COPY, Indices, stream
from variant.data.samples import Samples, Source
from variant.data.token_source import TokenSource
from variant.engine.engine import Engine
from variant.errors import UserError
from variant.models.flops import training_flop
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import freeze_full_network, zone_of, zone_parameters
from variant.paths import finite
from variant.torch_modes import modes_of_a_new_process
from variant.training.configurations import FULL, Configurations
from variant.training.distillation import Teacher, distillation_loss
from variant.training.distributed import Ranks, connected, device_of_rank
from variant.training.draws import draw_drops
from variant.training.efficiency import convert_to_fp8, execution_of
from variant.training.ema import EMA
from variant.training.initial_weights import (
    find_start,
    find_vae,
    is_tokenizer,
    load_start,
    load_vae,
    tokenizer_sha256,
)
from variant.training.parallel import is_sharded, whole
from variant.training.phase_ends import ended_phase
from variant.training.random_state import seed_everything
from variant.training.recipe import Recipe, with_seed
from variant.training.run_setup import RunSetup, open_run
from variant.training.sample_grid import CFG, COLUMNS, SEED, TOP_P
from variant.training.task import Report, Summary, Task
from variant.training.trainer import Trainer
from variant_kernels import DepthSchedule
from variant_kernels.wording import counted

# In config.json and the model card, by whether the moving average was better.
WEIGHTS = {False: "of the last step of that epoch", True: "their moving average (EMA)"}


class VARTask(Task):
    """The transformer as a training task; losses are named as the configurations."""

    kind = "var"

    def __init__(
        self,
        module: VAR,
        vae: VQVAE,
        data: Source,
        recipe: Recipe,
        device: torch.device,
        steps_per_epoch: int,
    ) -> None:
        self.module = self.var = self.network = module
        self.config = recipe.var_config
        self.vae, self.data, self.recipe = vae, data, recipe
        self.device, self.steps_per_epoch = device, steps_per_epoch
        self.ema_decay = recipe.ema.decay
        self.configurations = Configurations(recipe, steps_per_epoch)
        self.execution = execution_of(recipe.memory, recipe.compile)
        self.scale_tokens = [side**2 for side in recipe.vae.patch_nums]
        self._flop: dict[DepthSchedule, int] = {}
        self.teacher: Teacher | None = None
        self._copies_CNL: Tensor | None = None
        self._labels_N = torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def notes(self) -> list[str]:
        kind = self.recipe.schedule.zone_weights
        if kind == "shared":
            return []
        own = sum(weight.numel() for weight in zone_parameters(self.var))
        return [
            f'zone_weights "{kind}": {counted(own, "parameter")} are trained, the full network is '
            "frozen; every step trains a subnet"
        ]

    def choose_teacher(self, ema: EMA | None) -> None:
        kind = self.recipe.schedule.teacher
        if kind == "frozen":
            self.teacher = Teacher(self.var, EMA(self.var, 0.0))  # never updated
        elif kind == "ema":
            assert ema is not None, "a recipe whose teacher is the average has one"
            self.teacher = Teacher(self.var, ema)

    def prepare(self, report: Report) -> None:
        self._copies_CNL = self._encode_copies(report)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.var.layers()

    @property
    def uses_every_parameter(self) -> bool:
        if self.recipe.schedule.has_zone_weights:  # each depth has weights of its own
            used = [
                {zone_of(self.config, layers) for layers in configuration.schedule.layers}
                for configuration in self.configurations.trained()
                if not configuration.is_full  # no step trains it
            ]
            return all(zones >= self.config.subnets.keys() for zones in used)
        layers = range(self.config.depth)
        return all(
            configuration.schedule.last_scale(layer) >= 0
            for configuration in self.configurations.trained()
            for layer in layers
        )

    def name_of_step(self, step: int) -> str:
        return self.configurations.of_step(step).name

    def describe_step(self, step: int) -> str:
        configuration = self.configurations.of_step(step)
        return f"{configuration.name}, {configuration.schedule}"

    def loss(self, indices: Indices, epoch: int, step: int) -> Tensor:
        schedule = self.configurations.of_step(step).schedule
        if self._copies_CNL is not None:
            samples = self._copied(indices, epoch, self._copies_CNL)
        else:
            samples = self.fetch(indices, epoch)
        samples = samples.to(self.device)
        tokens_BL = self._tokens(samples)
        drops = draw_drops(self.config, self.recipe.seed, step, indices).to(self.device)
        x_teacher = self._teacher_input(tokens_BL)
        condition = {
            "mixed_labels_B": samples.mixed_labels_B,
            "mix_B": samples.mix_B,
            "dropped_B": drops.dropped_B,
        }
        teacher_BLV = None
        if self.teacher is not None and not self.configurations.of_step(step).is_full:
            teacher_BLV = self.teacher.logits(samples.labels_B, x_teacher, **condition)
        result = self.network(
            samples.labels_B,
            x_teacher,
            schedule,
            **condition,
            branch_scales_N2B=drops.branch_scales_N2B,
            targets_BL=tokens_BL if teacher_BLV is None else None,
            execution=self.execution,
        )
        loss = result
        if teacher_BLV is not None:
            weight = self.recipe.schedule.teacher_weight
            loss, divergence = distillation_loss(result, tokens_BL, teacher_BLV, weight)
            key = f"teacher_divergence/{self.name_of_step(step)}"
            self.measure(key, divergence, weight=len(indices))
        if self.meters is not None:
            key = f"loss_by_scale/{self.name_of_step(step)}/"
            self.measure(key, self._by_scale(loss.losses_BL), weight=len(indices))
        return loss.mean

    def _by_scale(self, losses_BL: Tensor) -> Tensor:
        """(K,): the mean loss of each scale's tokens."""
        parts = losses_BL.mean(0).split(self.scale_tokens)
        return torch.stack([part.mean() for part in parts])

    def layer_groups(self) -> dict[str, Sequence[nn.Module]]:
        last = len(self.scale_tokens) - 1
        subnets = [c.schedule for c in self.configurations.evaluated() if not c.is_full]
        groups: dict[str, list[nn.Module]] = {"shared": [], "full_only": []}
        for layer, block in enumerate(self.var.layers()):
            is_shared = any(schedule.last_scale(layer) == last for schedule in subnets)
            groups["shared" if is_shared else "full_only"].append(block)
        return {**groups} if subnets else {}

    def flop_of_step(self, step: int) -> int:
        if self.recipe.schedule.has_zone_weights:
            return 0  # training_flop counts a backward pass of every layer
        schedule = self.configurations.of_step(step).schedule
        if schedule not in self._flop:
            self._flop[schedule] = training_flop(self.configurations.config, schedule)
        return self._flop[schedule]

    def values_of_step(self, step: int) -> dict[str, float]:
        if len(self.configurations.evaluated()) == 1:
            return {}
        return {"schedule/subnet_probability": self.configurations.probability(step)}

    def ended_phase(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        return ended_phase(self.recipe.schedule, history)

    def epochs_by(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        self.configurations.observe(history)
        is_auto = self.recipe.schedule.phases == "auto"
        return self.configurations.ends.refinement if is_auto else None

    def samples(self, ranks: Ranks) -> dict[str, Tensor]:
        """One row for each depth; the draws of all rows are the same."""
        var = self._whole_model(ranks)
        if var is None:
            return {}
        labels = list(self.recipe.logging.sample_labels)
        labels = labels or list(range(min(COLUMNS, self.recipe.model.num_classes)))
        # Neither packed weights nor graphs: both would be copies of weights that change.
        engine = Engine(var, self.vae, pack=False, capture=False)
        rows = {}
        for depth in (None, *self.recipe.schedule.depths):
            caption = FULL if depth is None else f"depth {depth}"
            result = engine.generate(labels, depth=depth, seed=SEED, cfg=CFG, top_p=TOP_P)
            rows[caption] = result.images
        return rows

    def _whole_model(self, ranks: Ranks) -> VAR | None:
        """The model with whole weights on the first rank, a copy where they are sharded."""
        if not any(map(is_sharded, self.var.parameters())):
            return self.var if ranks.is_first else None
        weights = whole(self.var.state_dict(), keep=ranks.is_first)
        if not ranks.is_first:
            return None
        copy = VAR(self.var.config)
        copy.load_state_dict(weights)
        return copy.to(self.device).eval()

    def evaluate(self, indices: Indices, *, held_out: bool) -> dict[str, float]:
        if not held_out and self._copies_CNL is not None:
            samples = self._copy(indices, np.zeros(len(indices), np.int64), self._copies_CNL)
        else:
            samples = self.data.held_out(indices) if held_out else self.data.unmixed(indices)
        samples = samples.to(self.device)
        tokens_BL, labels_B = self._tokens(samples), samples.labels_B
        x_teacher = self._teacher_input(tokens_BL)
        losses = {}
        for configuration in self.configurations.evaluated():
            loss = self.var(labels_B, x_teacher, configuration.schedule, targets_BL=tokens_BL)
            name = configuration.name
            losses[name] = loss.mean.item()
            scales = enumerate(self._by_scale(loss.losses_BL).tolist())
            losses |= {f"{name}/{k}": scale_loss for k, scale_loss in scales}
        return losses

    def _tokens(self, samples: Samples) -> Tensor:
        if samples.tokens_BL is not None:
            return samples.tokens_BL
        assert samples.images_BIYX is not None, "samples have images or tokens"
        return self._tokenize(samples.images_BIYX)

    def _tokenize(self, images: Tensor) -> Tensor:
        return encode_images(self.vae, images)

    def _teacher_input(self, tokens_BL: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.vae.teacher_input(tokens_BL)

    def _encode_copies(self, report: Report) -> Tensor | None:
        """Tokens of each augmented copy of each training image, int32 on the CPU; None without."""
        section, size = self.recipe.data, self.recipe.eval.batch_size
        if section.copies == 0:
            return None
        copies, labels = [], []
        for copy in range(section.copies):
            parts = []
            for start in range(0, self.data.num_train, size):
                report(
                    "images tokenized",
                    copy * self.data.num_train + start,
                    section.copies * self.data.num_train,
                )
                indices = range(start, min(start + size, self.data.num_train))
                samples = self.data.samples(indices, copy).to(self.device)
                parts.append(self._tokens(samples).to("cpu", torch.int32))
                labels += [samples.labels_B.cpu()] if copy == 0 else []
            copies.append(torch.cat(parts))
        self._labels_N = torch.cat(labels)
        return torch.stack(copies)

    def _copied(self, indices: Indices, epoch: int, copies_CNL: Tensor) -> Samples:
        """Samples of some images; every epoch draws one of the copies of each image."""
        rng = stream(self.recipe.seed, epoch, STREAM_COPY)
        copy_N = rng.integers(len(copies_CNL), size=self.data.num_train)
        return self._copy(indices, copy_N[np.asarray(indices)], copies_CNL)

    def _copy(self, indices: Indices, copy_B: np.ndarray, copies_CNL: Tensor) -> Samples:
        index_B = torch.from_numpy(np.asarray(indices))
        tokens_BL = copies_CNL[torch.from_numpy(copy_B), index_B].long()
        return Samples(None, tokens_BL, self._labels_N[index_B])


@modes_of_a_new_process()
def train_var(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    seed: int | None = None,
    console: Console | None = None,
    device: torch.device | None = None,
    resume_command: str | None = None,
) -> Summary:
    """Train a recipe's depth supernet into ``out``, and write the model folder there at the end.

    ``out`` then holds ``config.json`` and ``model.safetensors`` with the weights of the lowest
    held-out loss (mean over the full network and every subnet depth).

    Args:
        resume: continue the run that ``out`` holds.
        seed: replaces the recipe's seed.
        console: to print to; None is standard output.
        device: None is the GPU where there is one, else the CPU.
        resume_command: printed when the run is stopped; None derives it from the recipe.
    Raises:
        UserError: there is no VQ-VAE to tokenize with, or its training has not finished, or it is
            not the one that a resumed run started with; the weights to start from are missing or
            do not fit; data and model have different numbers of classes; another training is
            writing into ``out``; see also :class:`variant.training.run_setup.RunSetup` and
            :meth:`variant.training.trainer.Trainer.run`.
        SystemExit: 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), with everything saved.
    """
    recipe = with_seed("train_var", recipe, seed)
    device = device or device_of_rank()
    with (
        connected(device) as ranks,
        open_run(
            VARTask.kind,
            recipe,
            recipe.optim,
            out,
            device=device,
            resume=resume,
            resume_command=resume_command,
            ranks=ranks,
        ) as setup,
    ):
        return _train(setup, recipe, console)


def _train(setup: RunSetup, recipe: Recipe, console: Console | None) -> Summary:
    data = setup.data
    if recipe.schedule.has_zone_weights and recipe.model.weights is None:
        raise UserError(
            f"{recipe.name}: model.weights must name a trained model with zone_weights "
            f'"{recipe.schedule.zone_weights}", which train subnets of a frozen network; '
            "--start-from MODEL does that too"
        )
    weights = find_vae(recipe, setup.folder)
    vae = load_vae(recipe, weights)
    vae_sha256 = tokenizer_sha256(vae)
    if isinstance(data, TokenSource) and not is_tokenizer(data.manifest.vae_sha256, vae, weights):
        data.refuse_vae(vae_sha256)
    recorded = None if setup.saved is None else setup.saved["inputs"].get("vae_sha256")
    # An earlier version has recorded the file, which the run then goes on to record.
    kept = recorded is not None and is_tokenizer(recorded, vae, weights)
    setup.record_inputs({"vae_sha256": recorded if kept else vae_sha256})
    # A frozen teacher has the weights that the run started from, also in a resumed run.
    reads_start = not setup.keeps_start or recipe.schedule.teacher == "frozen"
    start = find_start(recipe) if reads_start else None
    if reads_start:
        setup.record_inputs({"start_sha256": start and start.sha256()})
    vae = vae.to(setup.device).eval().requires_grad_(False)
    seed_everything(recipe.seed)
    module = VAR(dataclasses.replace(recipe.var_config, class_names=tuple(data.classes)))
    if start is not None and (setup.saved is None or recipe.schedule.teacher == "frozen"):
        load_start(module, recipe, start)
    module = module.to(setup.device)
    if recipe.compile.fp8:
        convert_to_fp8(module, recipe.name, setup.device)
    if recipe.schedule.has_zone_weights:
        freeze_full_network(module)
    task = VARTask(module, vae, data, recipe, setup.device, setup.steps_per_epoch)
    trainer = Trainer(task, setup, recipe.schedule.phase_lengths.total, console)
    summary = trainer.run()  # leaves the best weights in the module
    training = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.to_dict(),
        "steps": summary.steps,
        "epochs": summary.epochs,
        "best_epoch": summary.best_epoch,
        "weights": WEIGHTS[summary.averaged],
        "train_loss": summary.train_loss,
        "held_out_loss": summary.held_out_loss,
    }
    if recipe.vae_training.weights is None:
        training["vqvae_loss"] = recipe.vae_training.loss_text
    extra = {"training": finite(training)}  # losses may have diverged
    weights = whole(module.state_dict(), keep=setup.ranks.is_first)
    if setup.ranks.is_first:
        plain = VAR(module.config).eval()
        plain.load_state_dict(weights)
        save_model(setup.folder, plain, vae.cpu(), extra)
    return summary
