"""Training recipes: TOML files checked against frozen dataclasses.

A packaged recipe is loaded by its name (``digits``), any other by the path of its file.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from variant.data.config import DataSection
from variant.errors import UserError
from variant.models.config import (
    MAX_INTEGER,
    STRICT,
    VARConfig,
    VQVAEConfig,
    parse_dataclass,
    problems_of,
    require,
    require_plain_numbers,
    to_plain,
    validate_dataclass,
)
from variant.models.discriminator import LEAST_SIDE
from variant.models.ranges import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    hints_of,
)
from variant.paths import path_kind, read_text, shown
from variant.schedule_files import layers_by_scale
from variant.training.checkpoint_schedule import OutputSection
from variant.training.efficiency import CompileSection, MemorySection
from variant.training.ema import EMASection
from variant.training.logging_section import LoggingSection
from variant.training.optim import OptimSection
from variant.training.overrides import override
from variant.training.parallel import ParallelSection
from variant.training.schedule import ScheduleSection, num_layers
from variant.training.vae_sections import (
    CLASSIFIER,
    LPIPS,
    LPIPS_LEAST_SIDE,
    AdversarySection,
    PerceptualSection,
)
from variant_kernels.arguments import integer
from variant_kernels.plans.depth_schedule import select_layers
from variant_kernels.wording import counted

# Limits of a recipe's text, in characters; the packaged ones have 3,000.
MAX_LENGTH = 2**18
MAX_DOTS = 100  # in one line
MAX_MESSAGE = 1000
# Where the recipe has the settings of a VARConfig that do not stand in the section of the model.
RECIPE_KEYS = {
    "patch_nums": "vae.patch_nums",
    "vocab_size": "vae.vocab_size",
    "vae_channels": "vae.z_channels",
    "subnets": "schedule.depths",
    "bridge": "schedule.bridge",
    "zone_weights": "schedule.zone_weights",
    "lora_rank": "schedule.lora_rank",
    "zone_adaln": "schedule.zone_adaln",
    "class_names": "data.class_names",
}
VAR_KEYS = re.compile(rf"\b(?:{'|'.join(hints_of(VARConfig))})\b")


def recipe_key(kind: str, name: str) -> str:
    """The key of a recipe for a setting of a VARConfig ("var") or a VQVAEConfig ("vae")."""
    return RECIPE_KEYS.get(name, f"model.{name}") if kind == "var" else f"vae.{name}"


@dataclass(frozen=True)
class ModelSection:
    """The sizes of the transformer; codebook, scales and subnets come from the other sections.

    depth: layers.
    embed_dim: width; embed_dim / num_heads must be a multiple of 8 from 16 to 256.
    num_heads: attention heads.
    num_classes: classes; must equal the number of classes of the data.
    mlp_ratio: hidden width of the MLP, in units of embed_dim.
    norm_eps: epsilon of the layer normalisations.
    shared_aln: one class projection (adaLN) shared by all layers.
    attn_l2_norm: L2-normalise q and k, with a learned factor per head.
    cond_drop_rate: probability that a label is dropped, for guidance.
    drop_path_rate: stochastic depth of the last layer; rises linearly from 0.
    weights: pretrained weights: a file (.pth or .safetensors), a model folder, the name of a
        packaged model or a Hub id; without, the weights are drawn at random.
    weights_entry: which of several state dicts in that file: "model", "ema" (an average of the
        weights), or the name of one; without, the plain model.
    """

    depth: Count
    embed_dim: Count
    num_heads: Count
    num_classes: Count
    mlp_ratio: Positive = 4.0
    norm_eps: Positive = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: Share = 0.1
    drop_path_rate: ShareBelowOne = 0.0
    weights: str | None = None
    weights_entry: str | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(
            self.weights_entry is None or self.weights is not None,
            "weights_entry needs weights",
            self.weights_entry,
        )


@dataclass(frozen=True)
class VAETraining:
    """Settings of `variant train-vae`, which minimises reconstruction error and quantisation loss,
    and, if their sections say so, a perceptual and an adversarial loss.

    epochs: passes over the data.
    optim: the section [vae_training.optim].
    reconstruction: weight of the pixel error.
    pixel_loss: the pixel error: "l2" (squared) or "l1" (absolute).
    perceptual: the section [vae_training.perceptual].
    adversary: the section [vae_training.adversary].
    ema_decay: of a moving average of the weights, as in [ema]; 0 keeps none.
    start_weights: a trained VQ-VAE to start from, in the forms of weights; trained further, as a
        second stage.
    trainable: "all", or "decoder": the decoder alone, so that every token stays as it was; needs
        start_weights.
    revive_every: steps between the checks that move unused codes onto features of the current
        batch; 0 never moves a code.  revive_until: share of the steps after which the checks end.
    scale_dropout: share of the steps that reconstruct from the first few scales only, so that
        coarse scales learn to hold as much of the image as they can; falls linearly to 0.
    kmeans: iterations of k-means over the features of the first batch, by which the codes start;
        0 starts them as single features (with revive_every) or at random.
    entropy: weight of the entropy term: sure choices of codes, and all codes alike;
        within each part of a batch where accumulate makes several.
    entropy_temperature: of its softmax over distances, in units of the mean squared distance of two
        codes.
    weights: a trained VQ-VAE that is used instead: the folder of a finished `variant train-vae`, or
        the same forms as the transformer's weights.
    """

    epochs: CountOrZero = 0
    optim: OptimSection | None = None
    reconstruction: Positive = 1.0
    revive_every: CountOrZero = 0
    revive_until: Share = 0.5
    scale_dropout: Share = 0.0
    kmeans: CountOrZero = 0
    entropy: NotNegative = 0.0
    entropy_temperature: Positive = 0.01
    weights: str | None = None
    pixel_loss: Literal["l2", "l1"] = "l2"
    perceptual: PerceptualSection = field(default_factory=PerceptualSection)
    adversary: AdversarySection = field(default_factory=AdversarySection)
    ema_decay: ShareBelowOne = 0.0
    start_weights: str | None = None
    trainable: Literal["all", "decoder"] = "all"

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        require(
            self.weights is not None or (self.epochs > 0 and self.optim is not None),
            "weights, or epochs and the section optim, must be given",
            f"weights none, epochs {self.epochs}",
        )
        require(
            self.weights is None or self.start_weights is None,
            "start_weights names a VQ-VAE to train further; weights, which is used as it is, must "
            "not be set too",
            self.weights,
        )
        if self.trainable == "decoder":
            start = self.start_weights
            require(start is not None, 'trainable "decoder" needs start_weights', start)
            every = self.revive_every
            require(every == 0, 'trainable "decoder" needs revive_every 0: codes stay', every)
            entropy = self.entropy
            require(entropy == 0, 'trainable "decoder" needs entropy 0: codes stay', entropy)
        require(
            self.kmeans == 0 or self.start_weights is None,
            "kmeans starts new codes; it must be 0 with start_weights",
            self.kmeans,
        )

    @property
    def loss_text(self) -> str:
        """The losses besides that of the quantiser, for people."""
        texts = ["squared pixel error" if self.pixel_loss == "l2" else "absolute pixel error"]
        network = self.perceptual.network
        if self.perceptual.weight:
            names = {
                CLASSIFIER: "perceptual (features of a classifier trained on the same labels)",
                LPIPS: "perceptual (LPIPS with VGG16)",
            }
            texts.append(names.get(network, f"perceptual (features of {network})"))
        if self.adversary.weight:
            texts.append("adversarial (PatchGAN)")
        return ", ".join(texts)


@dataclass(frozen=True)
class EvalSection:
    """Evaluation of the held-out loss, which decides the best weights.

    every: epochs between evaluations.  batch_size: images at once.
    limit: largest number of held-out images that are evaluated; 0 is all.
    """

    every: Count = 1
    batch_size: Count = 128
    limit: CountOrZero = 0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run, its seed included.

    name: name of the recipe.
    description: one sentence for the model card.
    seed: seed of weights, order, augmentation and schedule.
    """

    name: str
    description: str
    model: ModelSection
    vae: VQVAEConfig
    vae_training: VAETraining
    data: DataSection
    optim: OptimSection
    schedule: ScheduleSection
    memory: MemorySection = field(default_factory=MemorySection)
    compile: CompileSection = field(default_factory=CompileSection)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    ema: EMASection = field(default_factory=EMASection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    seed: CountOrZero = 0

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        require_plain_numbers(self)
        self._check_scales()
        self._check_teacher()
        self._check_losses()
        self._check_var_config()
        if self.schedule.has_zone_weights:
            self._check_zone_weights()
        classes = self.model.num_classes
        for label in self.logging.sample_labels:
            require(label < classes, f"logging.sample_labels must be below {classes}", label)

    @property
    def var_config(self) -> VARConfig:
        """The configuration of the transformer, with its subnets and bridge."""
        starts = ("weights", "weights_entry")
        sizes = {key: value for key, value in to_plain(self.model).items() if key not in starts}
        # Its sizes are checked before layers are selected from as many as the recipe names.
        config = VARConfig(
            **sizes,
            patch_nums=self.vae.patch_nums,
            vocab_size=self.vae.vocab_size,
            vae_channels=self.vae.z_channels,
            bridge=self.schedule.bridge,
        )
        section = self.schedule
        parts = {
            depth
            for depths in section.schedules
            for depth in depths
            if isinstance(depth, int) and depth != config.depth
        }
        subnets = {
            depth: select_layers(config.depth, depth, section.selection)
            for depth in (*section.depths, *sorted(parts))
        }
        return dataclasses.replace(
            config,
            subnets=subnets,
            zone_weights=section.zone_weights,
            lora_rank=section.lora_rank,
            zone_adaln=section.zone_adaln,
        )

    def _check_var_config(self) -> None:
        """Sizes, subnets and bridge fit together; the messages name the recipe's keys."""
        try:
            _ = self.var_config
        except ValueError as error:
            prefix, _, text = str(error).partition(": ")
            if prefix == "VARConfig":
                text = VAR_KEYS.sub(lambda match: recipe_key("var", match[0]), text)
            elif prefix == "select_layers":
                text = text.replace("depth", "schedule.depths", 1)
            else:
                raise
            raise ValueError(text) from None

    def _check_teacher(self) -> None:
        """A teacher has weights, and teaches subnets."""
        teacher = self.schedule.teacher
        why = f'schedule.teacher "{teacher}"'
        if teacher == "none":
            return
        require(self.schedule.has_subnets, f"{why} needs depths or schedules", self.schedule.depths)
        if teacher == "frozen":
            weights = self.model.weights
            require(weights is not None, f"{why} needs model.weights to start from", weights)
        else:
            decay = self.ema.decay
            require(decay > 0, f"{why} needs a moving average, ema.decay above 0", decay)

    def _check_losses(self) -> None:
        """The networks of the VQ-VAE's losses need a place in their smallest feature maps."""
        section, side = self.vae_training.adversary, self.vae.image_size
        perceptual = self.vae_training.perceptual
        require(
            perceptual.weight == 0 or perceptual.network != LPIPS or side >= LPIPS_LEAST_SIDE,
            f'vae_training.perceptual.network "{LPIPS}" needs at least {LPIPS_LEAST_SIDE} pixels',
            side,
        )
        most = (side // LEAST_SIDE).bit_length() - 1
        require(
            section.weight == 0 or section.layers <= most,
            f"vae_training.adversary.layers must be at most {most} for {side} pixels",
            section.layers,
        )

    def _check_scales(self) -> None:
        """Check bridges and schedules, whose numbers are of the scales and layers of the model."""
        scales, section = len(self.vae.patch_nums), self.schedule
        for bridge in section.bridges:
            require(0 <= bridge <= scales, f"schedule.bridges must be in [0, {scales}]", bridge)
        for depths in section.schedules:
            require(
                len(depths) == scales,
                f"schedule.schedules must have {counted(scales, 'depth')} each, one for every "
                "scale",
                list(depths),
            )
            try:
                section.by_scale(depths, self.model.depth)
            except ValueError as error:
                text = str(error).removeprefix("DepthSchedule.from_depths: ")
                raise ValueError(f"schedule.schedules: {text}") from None

    def _check_zone_weights(self) -> None:
        """Check that every step has tokens that use zone weights."""
        section, scales = self.schedule, len(self.vae.patch_nums)
        bridges = (section.bridge, *section.bridges) if section.depths else section.bridges
        require(
            max(bridges, default=0) < scales,
            f"schedule.bridge and schedule.bridges must be below {scales}: with all scales in the "
            "bridge zone no token uses zone weights",
            max(bridges, default=0),
        )
        for depths in section.schedules:
            require(
                all(isinstance(depth, int) for depth in depths),
                "schedule.schedules must be depths with zone weights, which belong to a depth's "
                "own layers",
                list(depths),
            )
            require(
                num_layers(depths[-1]) < self.model.depth,
                "schedule.schedules must end in a subnet, which has zone weights",
                list(depths),
            )
        require(
            not self.compile.blocks,
            f'compile.blocks must be false with zone_weights "{section.zone_weights}", whose '
            "layers run eagerly",
            True,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return to_plain(self)


def with_seed(op: str, recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with another seed; None keeps its own.

    Args:
        op: the caller's function, for messages.
    Raises:
        TypeError: the seed is no integer.  ValueError: it is not in [0, 2^63).
    """
    if seed is None:
        return recipe
    return dataclasses.replace(recipe, seed=integer(op, "seed", seed, 0, MAX_INTEGER))


def starting_from(recipe: Recipe, model: str) -> Recipe:
    """The recipe with both models started from a model folder, a packaged model or a Hub id.

    The transformer is trained further, the VQ-VAE is used as it is.
    """
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, weights=model, weights_entry=None),
        vae_training=dataclasses.replace(
            recipe.vae_training, weights=model, start_weights=None, trainable="all"
        ),
    )


def recipe_names() -> tuple[str, ...]:
    """Names of the packaged recipes."""
    files = resources.files("variant.training.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load_recipe(
    name_or_path: str | Path, *, seed: int | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """A packaged recipe by name, or any recipe by the path of its TOML file.

    Args:
        seed: replaces the recipe's seed.
        overrides: replace single values: ``("optim.learning_rate=2e-4",)``.
    Raises:
        UserError: no such recipe, not TOML, unknown keys or invalid values; the message is one line
            that names them.
    """
    values = recipe_values(name_or_path, overrides)
    return parse_recipe(values, shown(str(name_or_path)), seed)


def parse_recipe(values: Mapping[str, Any], where: str, seed: int | None = None) -> Recipe:
    """A recipe from plain values.

    Args:
        where: begins the message.  seed: replaces the recipe's seed.
    Raises:
        UserError: unknown keys or invalid values; one line that names them.
    """
    try:
        return with_seed("load_recipe", parse_dataclass(Recipe, values, where), seed)
    except (RecursionError, ValueError) as error:
        message = _one_line(error)
        prefix = "" if message.startswith(where) else f"{where}: "
        raise UserError(f"{prefix}{message}") from None


def recipe_problems(values: Mapping[str, Any]) -> list[str]:
    """Every problem of a recipe's plain values, one text each, beginning with its dotted key."""
    try:
        validate_dataclass(Recipe, values)
    except ValidationError as error:
        return [" ".join(problem.split()) for problem in problems_of(error, Recipe)]
    except RecursionError:
        return ["the recipe is nested too deeply"]
    return []


def recipe_values(name_or_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe's TOML, unchecked; arguments of :func:`load_recipe`.

    Raises:
        UserError: no such recipe, not TOML, or an override of an unknown key.
    """
    name = str(name_or_path)
    if name in recipe_names():
        text = (
            resources.files("variant.training.recipes").joinpath(f"{name}.toml").read_text("utf-8")
        )
    else:
        text = _read_text(name)
    where = shown(name)
    try:
        # tomllib needs memory and time quadratic in the parts of a dotted key.
        if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"has a line of more than {MAX_DOTS} dots")
        values = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{where}: is not valid TOML for a recipe: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError is one
        raise UserError(f"{where}: is not valid TOML: {_one_line(error)}") from None
    try:
        return _with_schedules(override(values, overrides, Recipe), where)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from None


def _with_schedules(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with the layers of schedules that are given by a file or by a name.

    The recipe of a run holds them, so that a file that changes does not change a resumed run.

    Raises:
        UserError: a file that is none of a schedule.
    """
    section = values.get("schedule")
    if not isinstance(section, dict):
        return values
    given = section.get("schedules")
    if not isinstance(given, list) or not any(isinstance(one, str) for one in given):
        return values
    sizes = _sizes(values)
    try:
        schedules = [layers_by_scale(one, sizes) if isinstance(one, str) else one for one in given]
    except UserError as error:
        raise UserError(f"{where}: schedule.schedules: {error}") from None
    return {**values, "schedule": {**section, "schedules": schedules}}


def _sizes(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Layers and scales of the model of a recipe's plain values, which are unchecked.

    Returns:
        None where they are no such values, which the check of the recipe names.
    """
    model, vae = values.get("model"), values.get("vae", {})
    depth = model.get("depth") if isinstance(model, dict) else None
    sides = vae.get("patch_nums", VQVAEConfig.patch_nums) if isinstance(vae, dict) else None
    if type(depth) is not int or not isinstance(sides, list | tuple):
        return None
    return depth, len(sides)


def _one_line(error: Exception) -> str:
    """The error's message on one line, shortened where it quotes very long values."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def _read_text(name: str) -> str:
    """The text of a recipe's file.  Raises: UserError, if there is none, or it is no text."""
    if path_kind(name) is None:
        raise UserError(
            f"{shown(name)}: no such recipe. Packaged: {', '.join(recipe_names())}; "
            "or give the path of a TOML file"
        )
    text = read_text(name)
    if len(text) > MAX_LENGTH:
        raise UserError(
            f"{shown(name)}: is no recipe: it has {len(text):,} characters; at most {MAX_LENGTH:,}"
        )
    return text
