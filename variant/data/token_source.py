"""Samples from token shards: training without images and without encoding.

Axes: B samples, L tokens of all scales, N training images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from variant.data.bad_items import BadItem, BadItems
from variant.data.config import AUGMENTATION, DataSection
from variant.data.file_stamps import FileStamps
from variant.data.images import STREAM_REPLACE, Indices, epoch_order, sample_order, stream
from variant.data.samples import Samples, counted
from variant.data.shards import (
    HELD_OUT,
    MANIFEST_NAME,
    SAMPLE,
    Manifest,
    ShardReader,
    pass_name,
    read_manifest,
)
from variant.errors import UserError
from variant.models.config import VQVAEConfig
from variant.paths import shown

MAX_REPLACEMENTS = 64  # samples that are tried in place of one


class TokenSource:
    """Samples of a folder that ``variant tokenize`` wrote; implements
    :class:`variant.data.samples.Source`.

    Epoch e reads pass ``e % passes``, whose samples are in the order of that epoch: with the seed
    of the tokens, an epoch reads its shards from the first to the last. In place of a sample in a
    bad shard comes the same image of another pass, or another image; (seed, epoch, index) determine
    it.

    Args:
        section: of kind "tokens".  seed: of the order of training.
    Raises:
        UserError: the folder has no manifest, its tokens are incomplete, or the section has other
            values of the augmentation than they were made with.
    """

    def __init__(self, section: DataSection, seed: int) -> None:
        assert section.tokens is not None, "a section of kind tokens names a folder"
        self.folder, self.seed = Path(section.tokens), seed
        self.manifest = manifest = read_manifest(self.folder)
        _check_complete(self.folder, manifest)
        _check_augmentation(self.folder, manifest, section)
        self.num_train, self.num_held_out = manifest.num_train, manifest.num_held_out
        self.classes, self.num_classes = list(manifest.classes), len(manifest.classes)
        self.classes_from = f"classes in {shown(self.folder / MANIFEST_NAME)}"
        self.bad = BadItems(manifest.num_samples, section.max_bad)
        self.reader = ShardReader(self.folder, manifest)

    def check(self, name: str, vae: VQVAEConfig) -> None:
        """Raises: UserError, if the tokens are not of a VQ-VAE with these sizes and settings."""
        manifest = self.manifest
        sizes = {"patch_nums": manifest.patch_nums, "vocab_size": manifest.vocab_size}
        wrong = [
            f"vae.{key} must be {theirs!s:.100}, as in {shown(self.folder)}; got {own}"
            for key, theirs in {**sizes, **manifest.quantizer}.items()
            if (own := getattr(vae, key)) != theirs
        ]
        if wrong:
            raise UserError(f"{name}: {'; '.join(wrong)}")

    def refuse_vae(self, sha256: str, owner: str = "recipe") -> None:
        """Raises: UserError: the tokens are of another VQ-VAE than the owner's, of this SHA-256."""
        raise UserError(
            f"{shown(self.folder)}: its tokens were made by another VQ-VAE (SHA-256 "
            f"{self.manifest.vae_sha256[:12]}..., the {owner}'s has {sha256[:12]}...); run "
            "`variant tokenize` with this one into another folder"
        )

    def samples(self, indices: Indices, epoch: int) -> Samples:
        manifest, index_B = self.manifest, np.asarray(indices)
        number = epoch % manifest.passes

        def places(index_B: np.ndarray, number: int) -> np.ndarray:
            return _places(manifest.seed, number, manifest.num_train)[index_B]

        def replacement(index: int, attempt: int) -> tuple[str, int, int]:
            """The same image of another pass while there are some, then another image."""
            if attempt < manifest.passes - 1:
                other = (number + 1 + attempt) % manifest.passes
                return pass_name(other), int(places(np.array([index]), other)[0]), index
            rng = stream(self.seed, epoch, index, attempt, STREAM_REPLACE)
            image = int(rng.integers(manifest.num_train))
            return pass_name(number), int(places(np.array([image]), number)[0]), image

        return self._samples(pass_name(number), places(index_B, number), index_B, replacement)

    def held_out(self, indices: Indices) -> Samples:
        index_B = np.asarray(indices)
        return self._samples(HELD_OUT, index_B, index_B, self._among(HELD_OUT, self.num_held_out))

    def unmixed(self, indices: Indices) -> Samples:
        index_B = np.asarray(indices)
        order_N = sample_order(self.num_train)
        place_N = np.empty_like(order_N)
        place_N[order_N] = np.arange(self.num_train)
        among = self._among(SAMPLE, self.manifest.num_sample, order_N)
        return self._samples(SAMPLE, place_N[index_B], index_B, among)

    def digest(self) -> str:
        """SHA-256 of the SHA-256 of all shards."""
        return hashlib.sha256(json.dumps(self.manifest.shards, sort_keys=True).encode()).hexdigest()

    def class_digests(self) -> dict[str, str]:
        return {}

    def file_stamps(self) -> FileStamps:
        return FileStamps()  # the digest covers the contents

    def _among(
        self, part: str, count: int, image_N: np.ndarray | None = None
    ) -> Callable[[int, int], tuple[str, int, int]]:
        """Other samples of a part.  Args: image_N: the image of each row; None is the row."""

        def replacement(index: int, attempt: int) -> tuple[str, int, int]:
            place = int(stream(self.seed, 0, index, attempt, STREAM_REPLACE).integers(count))
            return part, place, place if image_N is None else int(image_N[place])

        return replacement

    def _samples(
        self,
        part: str,
        place_B: np.ndarray,
        index_B: np.ndarray,
        replacement: Callable[[int, int], tuple[str, int, int]],
    ) -> Samples:
        """Samples by the rows of a part, those of bad shards replaced.

        Args:
            index_B: the image of each row.
            replacement: of an image, by the number of the attempt: part, row and image.
        """
        size = self.manifest.shard_size
        bad: dict[str, BadItem] = {}
        wanted: dict[str, list[tuple[int, int, int]]] = {}
        for row, (place, index) in enumerate(zip(place_B.tolist(), index_B.tolist(), strict=True)):
            at, image, name = place, index, f"{part}-{place // size:05d}.tar"
            attempt = 0
            while (reason := self.reader.reason(name)) is not None:
                bad[name] = BadItem(name, reason, self.reader.rows_of[name])
                if attempt == MAX_REPLACEMENTS:
                    raise UserError(f"{reason}; nor could another sample be read in its place")
                other, at, image = replacement(index, attempt)
                name, attempt = f"{other}-{at // size:05d}.tar", attempt + 1
            wanted.setdefault(name, []).append((row, at % size, image))
        entries: list[Any] = [None] * len(place_B)
        for name, rows in wanted.items():
            found = self.reader.read(name, [place for _, place, _ in rows])
            for (row, _, image), (entry, tokens_L) in zip(rows, found, strict=True):
                if entry.get("index") != image:
                    raise UserError(
                        f"{shown(self.folder / name)}: does not hold image {image} where "
                        f"{MANIFEST_NAME} has it"
                    )
                entries[row] = entry, tokens_L
        return counted(self._joined(entries, tuple(bad.values())), self.bad)

    def _joined(self, entries: list[Any], bad: tuple[BadItem, ...]) -> Samples:
        tokens_BL = np.stack([tokens for _, tokens in entries]).astype(np.int64)
        codes = self.manifest.vocab_size
        if tokens_BL.min() < 0 or tokens_BL.max() >= codes:
            raise self._others("tokens", f"[0, {codes})")
        labels = self._labels([entry.get("label") for entry, _ in entries])
        mixed = mix = None
        if any("mix" in entry for entry, _ in entries):
            mixed = self._labels([entry.get("mixed_label") for entry, _ in entries])
            values = [entry.get("mix") for entry, _ in entries]
            # Compared before torch sees them: it raises for some numbers and texts, and no shape
            # tells of others.
            if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
                raise self._others("mix", "[0, 1]")
            mix = torch.tensor(values, dtype=torch.float32, device="cpu")
        return Samples(None, torch.from_numpy(tokens_BL), labels, mixed, mix, bad)

    def _labels(self, values: list[Any]) -> torch.Tensor:
        """Labels (B,) int64.  Raises: UserError, for what is no label, e.g. 1.5 or None."""
        if not all(type(value) is int and 0 <= value < self.num_classes for value in values):
            raise self._others("labels", f"[0, {self.num_classes})")
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    def _others(self, what: str, interval: str) -> UserError:
        return UserError(
            f"{shown(self.folder)}: its {what} must be in {interval}; a shard has others"
        )


@lru_cache(maxsize=3)
def _places(seed: int, epoch: int, count: int) -> np.ndarray:
    """The row of each training image in the pass of an epoch, (N,): its place in the order."""
    place_N = np.empty(count, np.int64)
    place_N[epoch_order(seed, epoch, count)] = np.arange(count)
    place_N.flags.writeable = False
    return place_N


def _check_complete(folder: Path, manifest: Manifest) -> None:
    # One by one: a damaged manifest may ask for more shards than there is memory for their names.
    missing = next((name for name, _, _ in manifest.files() if name not in manifest.shards), None)
    if missing is not None:
        raise UserError(
            f"{shown(folder)}: its tokens are not complete: {MANIFEST_NAME} has no {missing} yet; "
            "run the same `variant tokenize` again, it continues"
        )


def _check_augmentation(folder: Path, manifest: Manifest, section: DataSection) -> None:
    """Values that the section gives must be those of the tokens; defaults are not compared."""
    wrong = [
        f"data.{name} = {theirs}; the recipe has {own}"
        for name, unset in AUGMENTATION.items()
        if (own := getattr(section, name))
        not in (unset, theirs := manifest.augmentation.get(name, unset))
    ]
    if wrong:
        raise UserError(
            f"{shown(folder)}: its tokens were made with {'; with '.join(wrong)}. Leave "
            f"{'it' if len(wrong) == 1 else 'them'} out, or run `variant tokenize` into another "
            "folder"
        )
