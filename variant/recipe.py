"""Training recipes: TOML files checked against frozen dataclasses.

A packaged recipe is named (``digits``); any other is given by the path of its file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from variant.errors import UserError
from variant.models.config import STRICT, VARConfig, VQVAEConfig, parse_dataclass, require, to_plain
from variant.schedule import Phases, paper_phases
from variant_kernels.plans.depth_schedule import Selection, select_layers


@dataclass(frozen=True)
class ModelSection:
    """The transformer's own sizes; codebook, scales and subnets follow from the other sections.

    weights: a file to start from (.pth or .safetensors); None starts from fresh weights.
    """

    depth: int
    embed_dim: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: float = 0.1
    drop_path_rate: float = 0.0
    weights: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True)
class DataSection:
    """Where images come from and how training images are augmented.

    kind: "digits" (scikit-learn's scans) or "folder" (one sub-folder of images per class).
    train, held_out: folders of kind "folder".
    copies: augmented copies of each image whose tokens are computed once; 0 computes tokens anew
        in every epoch, which mixup needs.
    rotate, zoom, shift, shear: digits' largest random distortion: degrees, share of the size, share
        of the width, slope.
    hflip: probability of a horizontal flip of a folder's images.
    randaugment_ops, randaugment_magnitude: RandAugment (arXiv 1909.13719) of a folder's images;
        magnitude of 30.
    mixup: alpha of the Beta distribution (arXiv 1710.09412); 0 is none.
    workers: threads that read images of kind "folder".
    """

    kind: Literal["digits", "folder"]
    train: str | None = None
    held_out: str | None = None
    copies: int = 0
    hflip: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0.0
    mixup: float = 0.0
    workers: int = 4

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        for name in ("copies", "rotate", "shift", "shear", "randaugment_ops", "mixup"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        require(0 <= self.hflip <= 1, "hflip must be in [0, 1]", self.hflip)
        require(0 <= self.zoom < 1, "zoom must be in [0, 1)", self.zoom)
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, "randaugment_magnitude must be in [0, 30]", magnitude)
        require(self.workers >= 1, "workers must be at least 1", self.workers)
        require(
            not (self.copies and self.mixup),
            "copies must be 0 with mixup, which mixes pixels anew in every batch",
            self.copies,
        )
        foreign = {
            "digits": {"hflip": 0, "randaugment_ops": 0, "train": None, "held_out": None},
            "folder": {"rotate": 0, "zoom": 0, "shift": 0, "shear": 0},
        }
        for name, unset in foreign[self.kind].items():
            value = getattr(self, name)
            require(value == unset, f'{name} is not for kind "{self.kind}"', value)
        if self.kind == "folder":
            require(
                self.train is not None and self.held_out is not None,
                'train and held_out must name folders for kind "folder"',
                (self.train, self.held_out),
            )


@dataclass(frozen=True)
class OptimSection:
    """AdamW and how it is driven. Weight decay spares biases, norms, embeddings and scale_mul.

    batch_size: images per optimiser step.  accumulate: parts that a batch is computed in.
    schedule: "constant", or "cosine" from learning_rate to final_ratio times it.
    warmup: share of all steps over which the rate rises from 0.
    """

    batch_size: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    schedule: Literal["constant", "cosine"] = "constant"
    final_ratio: float = 0.0
    warmup: float = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        require(self.learning_rate > 0, "learning_rate must be positive", self.learning_rate)
        require(all(0 <= beta < 1 for beta in self.betas), "betas must be in [0, 1)", self.betas)
        require(self.weight_decay >= 0, "weight_decay must be >= 0", self.weight_decay)
        require(self.clip > 0, "clip must be positive", self.clip)
        require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"accumulate must divide batch_size ({self.batch_size})",
            self.accumulate,
        )
        require(0 <= self.final_ratio <= 1, "final_ratio must be in [0, 1]", self.final_ratio)
        require(0 <= self.warmup < 1, "warmup must be in [0, 1)", self.warmup)


@dataclass(frozen=True)
class VAETraining:
    """How `variant train-vae` trains the VQ-VAE: reconstruction error and quantisation loss.

    epochs: passes over the data.  reconstruction: weight of the squared pixel error.
    revive_every: steps between checks for unused codes, which are moved onto features of the
        current batch; 0 never moves one.  revive_until: share of the steps with such checks.
    scale_dropout: share of the first steps that reconstruct from a few scales only, so that coarse
        scales learn to say as much as they can; it falls linearly to none.
    weights: a trained VQ-VAE to use instead of training one (.pth or .safetensors).
    """

    epochs: int = 0
    optim: OptimSection | None = None
    reconstruction: float = 1.0
    revive_every: int = 0
    revive_until: float = 0.5
    scale_dropout: float = 0.0
    weights: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(self.epochs >= 0, "epochs must be >= 0", self.epochs)
        require(
            self.weights is not None or (self.epochs > 0 and self.optim is not None),
            "needs either weights, or epochs and an optim section",
            None,
        )
        require(self.reconstruction > 0, "reconstruction must be positive", self.reconstruction)
        require(self.revive_every >= 0, "revive_every must be >= 0", self.revive_every)
        for name in ("revive_until", "scale_dropout"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]", getattr(self, name))


@dataclass(frozen=True)
class ScheduleSection:
    """Which subnets are trained, and the three phases in epochs.

    depths: subnet depths; each subnet step draws one of them.  bridge: scales that run every layer.
    joint_probability: of a subnet step in the first phase.
    joint, transition, refinement: epochs; all three or none, which takes the paper's table.
    """

    depths: tuple[int, ...]
    bridge: int
    selection: Selection = "nested"
    joint_probability: float = 0.2
    joint: int | None = None
    transition: int | None = None
    refinement: int | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(len(set(self.depths)) == len(self.depths), "depths must not repeat", self.depths)
        p0 = self.joint_probability
        require(0 <= p0 <= 1, "joint_probability must be in [0, 1]", p0)
        given = [value is not None for value in (self.joint, self.transition, self.refinement)]
        require(
            all(given) or not any(given),
            "joint, transition and refinement must be given together or not at all",
            (self.joint, self.transition, self.refinement),
        )
        require(self.phases.total >= 1, "the phases must have at least one epoch", self.phases)

    @property
    def phases(self) -> Phases:
        """The three lengths, explicit or from the paper's table."""
        if self.joint is None or self.transition is None or self.refinement is None:
            return paper_phases(self.depths)
        return Phases(self.joint, self.transition, self.refinement)


@dataclass(frozen=True)
class EvalSection:
    """every: epochs between evaluations of the held-out loss, which choose the best weights.
    batch_size: images at once.  limit: held-out images used at most; 0 is all."""

    every: int = 1
    batch_size: int = 128
    limit: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(self.every >= 1, "every must be at least 1", self.every)
        require(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size)
        require(self.limit >= 0, "limit must be >= 0", self.limit)


@dataclass(frozen=True)
class OutputSection:
    """checkpoint_every: epochs between checkpoints; the last one is always kept."""

    checkpoint_every: int = 1

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(
            self.checkpoint_every >= 1,
            "checkpoint_every must be at least 1",
            self.checkpoint_every,
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run is determined by, its seed included."""

    name: str
    description: str
    model: ModelSection
    vae: VQVAEConfig
    vae_training: VAETraining
    data: DataSection
    optim: OptimSection
    schedule: ScheduleSection
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)
    seed: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed must be >= 0", self.seed)
        _ = self.var_config  # sizes, subnets and bridge are checked there

    @property
    def var_config(self) -> VARConfig:
        """The configuration of the transformer, subnets and bridge included."""
        sizes = {key: value for key, value in to_plain(self.model).items() if key != "weights"}
        subnets = {
            depth: select_layers(self.model.depth, depth, self.schedule.selection)
            for depth in self.schedule.depths
        }
        return VARConfig(
            **sizes,
            patch_nums=self.vae.patch_nums,
            vocab_size=self.vae.vocab_size,
            vae_channels=self.vae.z_channels,
            subnets=subnets,
            bridge=self.schedule.bridge,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return to_plain(self)


def recipe_names() -> tuple[str, ...]:
    """Names of the packaged recipes."""
    files = resources.files("variant.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path, *, seed: int | None = None) -> Recipe:
    """A packaged recipe by name, or any recipe by the path of its TOML file.

    Args:
        seed: replaces the recipe's own.
    Raises:
        UserError: no such recipe, not TOML, unknown keys or bad values: one line naming them.
    """
    name = str(name_or_path)
    if name in recipe_names():
        text = resources.files("variant.recipes").joinpath(f"{name}.toml").read_text("utf-8")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(
                f"{name}: no such recipe. Packaged: {', '.join(recipe_names())}; "
                "or give the path of a TOML file"
            )
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: cannot be read: {error}") from None
    try:
        recipe = parse_dataclass(Recipe, tomllib.loads(text), name)
        return recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name}: is not valid TOML: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
