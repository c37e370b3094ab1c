"""Options of the commands as dataclasses, for tyro."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

DtypeName = Literal["float32", "bfloat16", "float16"]
KVDtypeName = Literal["fp8"]
Positional = tyro.conf.Positional


@dataclass
class Generate:
    """Paint images with a supernet at any depth.

    Example: variant generate --model digits --labels 3 1 4 --depth 2 --out out/digits.png
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    labels: tuple[int, ...] = ()
    """Classes to paint; default: every class, at most ten."""
    count: int = 1
    """Images per label."""
    depth: int | None = None
    """Layers in the flexible zone; default: every layer."""
    bridge: int | None = None
    """First scales that run every layer; default: the model's own."""
    all_depths: bool = False
    """Paint the same labels and seed at every depth of the model, side by side."""
    cfg: float = 1.5
    """Classifier-free guidance; 0 turns it off and halves the work."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.96
    """Keep this probability mass; 0 keeps all."""
    seed: int = 0
    """Same seed, same images."""
    dtype: DtypeName | None = None
    """Of weights, K/V and matrix products; default: the weights' own."""
    kv_dtype: KVDtypeName | None = None
    """fp8 keeps K and V in 8 bits with a scale per token and head; default: exact. `variant info
    --kv-dtype fp8` measures what it changes."""
    max_batch: int | None = None
    """Images at once; default: what free memory holds."""
    out: Path = Path("out")
    """A .png file for one grid, or a folder for one file per image."""


@dataclass
class Plan:
    """Print what the K/V cache needs at every depth and bridge; no GPU, no weights.

    Example: variant plan --model var-d30 --batch 64 --memory 48
    """

    model: str = "var-d30"
    """A preset (var-d16, -d20, -d24, -d30, -d36-512), a model folder, or "digits"."""
    batch: int = 64
    """Images; guidance doubles the sequences."""
    dtype: DtypeName = "bfloat16"
    """Of K and V (and of the weights)."""
    kv_dtype: KVDtypeName | None = None
    """fp8: plan for K and V of 8 bits with their scales; print the error that was measured."""
    bridge: int | None = None
    """Bridge of the main table; default: the model's own."""
    memory: float | None = None
    """Device memory in GiB: says what fits beside the weights."""
    page_size: int = 16
    """Tokens per page."""
    guidance: bool = True
    """Whether unconditional sequences run beside the conditional ones."""


@dataclass
class Train:
    """Train a transformer, or a depth supernet, by a recipe; resumable, Ctrl-C safe.

    Example: variant train --recipe digits --out runs/digits
    """

    recipe: str = "digits"
    """Name of a packaged recipe, or a TOML file."""
    out: Path | None = None
    """Folder for checkpoints, metrics and the finished model; default: runs/RECIPE."""
    resume: bool = False
    """Go on from the last checkpoint in that folder."""
    seed: int | None = None
    """Overrides the recipe's seed."""


@dataclass
class TrainVae:
    """Train a multi-scale VQ-VAE by a recipe; resumable, Ctrl-C safe.

    Example: variant train-vae --recipe digits --out runs/digits
    """

    recipe: str = "digits"
    """Name of a packaged recipe, or a TOML file."""
    out: Path | None = None
    """Folder for checkpoints, metrics and the finished VQ-VAE; default: runs/RECIPE."""
    resume: bool = False
    """Go on from the last checkpoint in that folder."""
    seed: int | None = None
    """Overrides the recipe's seed."""


@dataclass
class Bench:
    """Time the engine beside the original VAR code (or a plain-torch loop); print its distance
    to what the machine can do.

    Example: variant bench --model var-d16 --batch 1 --dtype bfloat16 --var-repo ../VAR
    """

    model: str = "digits"
    """Model folder, "digits", or a preset (var-d16, ...) with random weights."""
    batch: tuple[int, ...] = (1, 8)
    """Images at once, one or more sizes."""
    depths: tuple[int, ...] = ()
    """Layers in the flexible zone; default: every depth of the model."""
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    """Of the engine, one or more; peers run in float32 and under bfloat16 autocast, on a GPU
    under float16 autocast only."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where everything runs."""
    kv_dtype: KVDtypeName | None = None
    """fp8: time ours with 8-bit K/V beside exact ones too, and count the tokens that change."""
    bridge: int | None = None
    """First scales that run every layer; default: the model's own."""
    cfg: float = 1.5
    """Classifier-free guidance."""
    top_k: int = 900
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.96
    """Keep this probability mass; 0 keeps all."""
    runs: int = 5
    """Rounds in which everything runs once."""
    var_repo: Path | None = None
    """Clone of FoundationVision/VAR to compare with; default: the plain-torch loop."""
    decoder: bool = False
    """Time the VQ-VAE's decoder too, on its own."""
    memory: bool = False
    """Measure the peak memory of each, in processes of their own."""
    threads: int | None = None
    """Threads; default: torch's."""
    json: Path | None = None
    """File for the results, for benchmarks/report.py and benchmarks/compare.py."""


@dataclass
class Convert:
    """Convert between the original VAR repository's .pth files and a model folder, both ways.

    Example: variant convert --var var_d16.pth --vae vae_ch160v4096z32.pth --out models/var-d16
    Example: variant convert --model models/var-d16 --var var_d16.pth --vae vae.pth
    """

    var: Path
    """The transformer: its .pth file, a trainer checkpoint, or a folder or Hub id of the original's
    Hub class. Written as a .pth file where --model is given."""
    vae: Path
    """The VQ-VAE's .pth file, or the same trainer checkpoint; written where --model is given."""
    model: str | None = None
    """Model folder to write as .pth files."""
    out: Path | None = None
    """Model folder to write from .pth files."""
    num_heads: int | None = None
    """Attention heads; needed only for models without L2 norm, whose files do not tell."""
    dtype: DtypeName | None = None
    """Of the transformer's weights; default: as they are."""


@dataclass
class Info:
    """Describe a model: sizes, subnets and their layers, how it was trained.

    Example: variant info --model digits
    Example: variant info --model digits --kv-dtype fp8
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    kv_dtype: KVDtypeName | None = None
    """fp8: measure on this model, at every depth, what 8-bit K/V change in its logits and greedy
    tokens (paints a few images; slow for a large model on a CPU)."""
    dtype: DtypeName | None = None
    """Of weights and products in that measurement; default: the weights' own."""
    images: int = 4
    """Images of that measurement."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[TrainVae, tyro.conf.subcommand("train-vae")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)
