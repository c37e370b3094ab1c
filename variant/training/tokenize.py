"""Tokens of a recipe's images, computed before training: ``variant tokenize``.

Pass p has the training samples of epoch p, augmented and mixed before they are encoded, so that
training from the shards has the losses of training from the images. Every shard is a function of
the recipe and its number; processes share them by their rank and need not talk to each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from variant.data.bad_items import BadItem, BadItems
from variant.data.config import AUGMENTATION
from variant.data.encode import encode_images
from variant.data.file_stamps import compare_stamps
from variant.data.images import epoch_order, sample_order
from variant.data.samples import Samples, Source
from variant.data.shards import (
    FORMAT,
    HELD_OUT,
    MANIFEST_NAME,
    MAX_SHARD_SIZE,
    SAMPLE,
    SHARD_SIZE,
    Manifest,
    Part,
    Rows,
    read_bad_items,
    read_digest,
    read_manifest,
    write_shard,
)
from variant.data.sources import classes_problem, open_source
from variant.differences import change_texts, differences, listed
from variant.engine.memory import check_fits
from variant.errors import UserError
from variant.files import atomic_write, put_in_place
from variant.folder_lock import locked_folder, saving
from variant.models.parameter_count import vqvae_parameters
from variant.models.vqvae import VQVAE
from variant.paths import foreign_name, path_kind, shown
from variant.torch_modes import modes_of_a_new_process
from variant.training.distributed import local_rank
from variant.training.initial_weights import find_vae, is_tokenizer, load_vae, tokenizer_sha256
from variant.training.recipe import Recipe
from variant_kernels.arguments import integer
from variant_kernels.wording import counted

MAX_PASSES = 10_000
MAX_DIGITS = 10  # of a variable of the environment
SHARD_NAME = r"(?:train-p\d+|sample|held_out)-\d+\.tar"
OWN_NAME = re.compile(rf"{SHARD_NAME}(?:\.sha256|\.bad\.json)?")
TEMPORARY = re.compile(rf"\.(?P<name>{SHARD_NAME})(?:\.sha256|\.bad\.json)?\.\d+\.tmp")

# report(samples, total, shard): so many more of this process's samples are done.
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tokenized:
    """The result of :func:`tokenize`.

    samples: encoded by this process.  shards: written by it.  missing: shards that other processes
        have still to write; the manifest is written with the last one.
    """

    samples: int
    shards: int
    missing: int
    seconds: float


def rank_of_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of processes) by torchrun's variables RANK and WORLD_SIZE; (0, 1) without.

    Raises:
        UserError: one without the other, or no such numbers.
    """
    words = [environment.get(name) for name in ("RANK", "WORLD_SIZE")]
    if words == [None, None]:
        return 0, 1
    if not all(
        word and word.isascii() and word.isdecimal() and len(word) < MAX_DIGITS for word in words
    ):
        raise UserError(
            f"the variables RANK and WORLD_SIZE must both be integers, as torchrun sets them; got "
            f"{words[0]!r:.50} and {words[1]!r:.50}"
        )
    rank, size = (int(str(word)) for word in words)
    if rank >= size:
        raise UserError(f"the variable RANK must be below WORLD_SIZE ({size}); got {rank}")
    return rank, size


def gpu_of_environment(environment: Mapping[str, str], count: int) -> int:
    """The GPU of this process by torchrun's variable LOCAL_RANK: they take turns; 0 without it.

    Args:
        count: GPUs of this machine; 0 gives GPU 0, which the check of devices refuses.
    Raises:
        UserError: LOCAL_RANK is no number.
    """
    return local_rank(environment) % max(1, count)


@modes_of_a_new_process()
def tokenize(
    recipe: Recipe,
    out: Path,
    passes: int,
    *,
    vae_folder: Path,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    shard_size: int = SHARD_SIZE,
    report: Report = lambda samples, total, shard: None,
) -> Tokenized:
    """Write the token shards of a recipe; shards that are there are left as they are.

    Args:
        out: folder of the shards and their manifest.
        passes: over the training images.
        vae_folder: of the trained VQ-VAE, if the recipe names no weights.
        rank, world_size: this process writes every ``world_size``-th shard.
        device: None is the GPU where there is one, else the CPU.
        shard_size: samples of a shard; even.
        report: called after each shard, with its samples, those of all shards of this process, and
            its name.
    Raises:
        TypeError, ValueError: passes or shard_size.
        UserError: no VQ-VAE, no images, or too many bad ones in all shards together; the folder
            holds tokens of other settings, or cannot be written; another process of this rank
            writes there.
    """
    integer("tokenize", "passes", passes, 1, MAX_PASSES)
    if integer("tokenize", "shard_size", shard_size, 2, MAX_SHARD_SIZE) % 2:
        raise ValueError(f"tokenize: shard_size must be even; got {shard_size}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae_config = recipe.vae
    if recipe.data.copies:
        raise UserError(
            f"{recipe.name}: data.copies must be 0: --passes takes its place; got "
            f"{recipe.data.copies}. Give --data.copies 0 --passes {recipe.data.copies}"
        )
    check_fits(recipe.name, "the weights", 4 * vqvae_parameters(vae_config), torch.device("cpu"))
    size, channels = vae_config.image_size, vae_config.in_channels
    if recipe.data.kind == "tokens":
        raise UserError(f'{recipe.name}: data.kind must be that of images; got "tokens"')
    source = open_source(recipe.data, size, channels, recipe.seed)
    problem = classes_problem(recipe.model.num_classes, source)
    if problem is not None:
        raise UserError(f"{recipe.name}: {problem}")
    weights = find_vae(recipe, vae_folder)
    vae = load_vae(recipe, weights)
    wanted = _manifest(recipe, source, passes, tokenizer_sha256(vae), shard_size)
    with locked_folder(out, f".variant-tokenize-{rank}.lock", work="tokenization") as is_locked:
        with saving(out):  # of ranks that begin at once, one writes the manifest
            wanted = _check_folder(
                out, wanted, lambda found: is_tokenizer(found, vae, weights), rank
            )
        mine = list(wanted.files())[rank::world_size]
        if is_locked:
            _clear_leftovers(out, {name for name, _, _ in mine}, rank)
        vae = vae.to(device).eval().requires_grad_(False)
        writer = _Writer(source, vae, device, wanted, recipe.eval.batch_size)
        total = sum(len(rows) for _, _, rows in mine)
        started, samples, shards = time.monotonic(), 0, 0
        known: set[Path] = set()
        source.bad.add_found(read_bad_items(out, known))
        for name, part, rows in mine:
            if read_digest(out / name) is None:
                write_shard(out / name, writer.rows(part, rows), wanted.dtype)
                samples, shards = samples + len(rows), shards + 1
                # Those of other processes too: the limit is a share of all images.
                source.bad.add_found(read_bad_items(out, known))
            report(len(rows), total, name)
        missing = _finish(out, wanted, rank, source.bad)
    return Tokenized(samples, shards, missing, time.monotonic() - started)


def _manifest(
    recipe: Recipe, source: Source, passes: int, vae_sha256: str, shard_size: int
) -> Manifest:
    data, vae = recipe.data, recipe.vae
    return Manifest(
        format=FORMAT,
        seed=recipe.seed,
        passes=passes,
        num_train=source.num_train,
        num_held_out=source.num_held_out,
        num_sample=min(source.num_train, source.num_held_out),
        shard_size=shard_size,
        classes=tuple(source.classes),
        augmentation={name: getattr(data, name) for name in AUGMENTATION},
        patch_nums=vae.patch_nums,
        vocab_size=vae.vocab_size,
        vae_sha256=vae_sha256,
        data_sha256=source.digest(),
        recipe=recipe.to_dict(),
        shards={},
        stamps=source.file_stamps(),
    )


def _check_folder(
    out: Path, wanted: Manifest, is_of_vae: Callable[[str], bool], rank: int
) -> Manifest:
    """Compare the tokens that the folder holds, if any, with those to write.

    Args:
        is_of_vae: whether a manifest's SHA-256 is that of the VQ-VAE in use.
    Returns:
        ``wanted``, with the SHA-256 that the folder's manifest has.
    Raises:
        UserError: they were made with other settings or of other images, or are more passes.
    """
    if path_kind(out / MANIFEST_NAME) is None:
        other = foreign_name(out, lambda name: OWN_NAME.fullmatch(name) is not None)
        if other is not None:
            raise UserError(
                f"{shown(out)}: holds {shown(other)} and no {MANIFEST_NAME}: it is no folder of "
                "`variant tokenize`; give another --out"
            )
        _write_manifest(out, wanted, 0)
        return wanted
    found = read_manifest(out)
    if is_of_vae(found.vae_sha256):
        wanted = dataclasses.replace(wanted, vae_sha256=found.vae_sha256)
    changes = change_texts(differences(_compared(found), _compared(wanted)))
    if changes:
        raise UserError(
            f"{shown(out)}: holds tokens of other settings: {listed(changes)}; give the first "
            "value of each, or choose another folder"
        )
    if found.passes > wanted.passes:
        raise UserError(
            f"{shown(out)}: holds {counted(found.passes, 'pass')}; --passes must be at least as "
            f"many, or choose another folder; got {wanted.passes}"
        )
    # Processes may be on several machines, each with a copy of the images.
    compare_stamps(
        shown(out),
        "holds tokens of",
        found.stamps,
        wanted.stamps,
        "choose another folder",
        warns=rank == 0,
    )
    return wanted


def _compared(manifest: Manifest) -> dict[str, Any]:
    """What must be equal in all processes of a run and in its continuations."""
    free = ("passes", "recipe", "shards", "stamps")
    names = (field.name for field in dataclasses.fields(manifest))
    values = {name: getattr(manifest, name) for name in names if name not in free}
    return {**values, "vae": manifest.quantizer}


def _finish(out: Path, wanted: Manifest, rank: int, bad: BadItems) -> int:
    """Write the complete manifest if every shard is there; returns how many are not.

    The process that ends last finds all of them.

    Raises:
        UserError: for all shards together, too many images could not be read.
    """
    digests = {name: read_digest(out / name) for name, _, _ in wanted.files()}
    missing = sum(digest is None for digest in digests.values())
    if not missing:
        bad.add_found(read_bad_items(out, set()))
        shards = {name: digest for name, digest in digests.items() if digest is not None}
        _write_manifest(out, dataclasses.replace(wanted, shards=shards), rank)
        _clear_leftovers(out, digests.keys(), rank)
    return missing


def _write_manifest(out: Path, manifest: Manifest, rank: int) -> None:
    # By a name of its own: what a killed process left is told from what another rank writes.
    own = out / _own_manifest(rank)
    with atomic_write(own) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", "utf-8")
    try:
        put_in_place(own, out / MANIFEST_NAME)
    except OSError as error:
        raise UserError(f"{shown(out)}: cannot be written: {error.strerror or error}") from None


def _clear_leftovers(out: Path, names: Collection[str], rank: int) -> None:
    """Remove what a process left that was killed while it wrote one of these shards."""
    own = _own_manifest(rank)
    for entry in os.scandir(out):
        match = TEMPORARY.fullmatch(entry.name)
        if (match and match["name"] in names) or entry.name.startswith((own, f".{own}")):
            with suppress(OSError):
                os.unlink(entry.path)


def _own_manifest(rank: int) -> str:
    return f".{MANIFEST_NAME}-{rank}-"


class _Writer:
    """Encodes the samples of shards; the next images are read while some are encoded."""

    def __init__(
        self, source: Source, vae: VQVAE, device: torch.device, manifest: Manifest, batch_size: int
    ) -> None:
        self.source, self.vae, self.device = source, vae, device
        self.manifest, self.batch_size = manifest, batch_size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="samples")

    def rows(self, part: Part, rows: range) -> Rows:
        """The samples of some rows of a part."""
        order, read = self._order(part)
        index_B = order[rows.start : rows.stop]
        # Even, so that an image and its partner of mixup are read at once.
        size = max(2, self.batch_size - self.batch_size % 2)
        parts = [index_B[start : start + size] for start in range(0, len(index_B), size)]
        tokens, labels, mixed, mix = [], [], [], []
        bad: dict[BadItem, None] = {}
        for samples in self._ahead(parts, read):
            tokens.append(encode_images(self.vae, samples.images.to(self.device)).cpu().numpy())
            labels.append(samples.labels_B.numpy())
            bad |= dict.fromkeys(samples.bad)
            if samples.mixed_labels_B is not None and samples.mix_B is not None:
                mixed.append(samples.mixed_labels_B.numpy())
                mix.append(samples.mix_B.numpy())
        return Rows(
            index_B,
            np.concatenate(tokens),
            np.concatenate(labels),
            np.concatenate(mixed) if mixed else None,
            np.concatenate(mix) if mix else None,
            tuple(bad),
        )

    def _order(self, part: Part) -> tuple[np.ndarray, Callable[[np.ndarray], Samples]]:
        """The images of a part in the order of its rows, and what reads them."""
        manifest = self.manifest
        if part.name == HELD_OUT:
            return np.arange(manifest.num_held_out), self.source.held_out
        if part.name == SAMPLE:
            return sample_order(manifest.num_train)[: manifest.num_sample], self.source.unmixed
        number = int(part.name.removeprefix("train-p"))
        order_N = epoch_order(manifest.seed, number, manifest.num_train)
        return order_N, lambda index_B: self.source.samples(index_B, number)

    def _ahead(
        self, parts: list[np.ndarray], read: Callable[[np.ndarray], Samples]
    ) -> Iterator[Samples]:
        waiting = self.pool.submit(read, parts[0])
        for following in [*parts[1:], None]:
            samples = waiting.result()
            if following is not None:
                waiting = self.pool.submit(read, following)
            yield samples
