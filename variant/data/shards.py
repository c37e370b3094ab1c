"""Token shards: WebDataset tar files of tokens and labels, written once, read at random.

A sample of a shard is two files: ``NUMBER.json`` with the index of the image, its label and, with
mixup, the partner's label and the weight of the label; ``NUMBER.npy`` with the tokens. All samples
take equally many bytes, so that one is read by its place, without an index.

Axes: B samples, L tokens of all scales.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from variant.data.bad_items import BadItem
from variant.data.file_stamps import FileStamps
from variant.errors import UserError
from variant.files import atomic_write
from variant.models.config import LIMITS, parse_dataclass, require
from variant.models.ranges import Count, CountOrZero, check_ranges
from variant.paths import open_regular, path_kind, read_json, shown
from variant_kernels.wording import counted

FORMAT = "variant-tokens-1"
MANIFEST_NAME = "manifest.json"
SHARD_SIZE = 2048  # samples; even, so that no pair of mixup is divided
MAX_SHARD_SIZE = 2**20
MAX_INT16 = 2**15
BAD_SUFFIX = ".bad.json"  # after the name of a shard: its files that could not be read
BLOCK = tarfile.BLOCKSIZE
MAX_END = 2 * tarfile.RECORDSIZE  # bytes after the samples of a shard
REMEDY = "remove it and run the same `variant tokenize` again"
SAMPLE, HELD_OUT = "sample", "held_out"
# Settings of a VQ-VAE that decide the tokens of its images, and that none of its weights tells.
QUANTIZER_KEYS = ("quant_resi", "share_quant_resi", "using_znorm")


@dataclass(frozen=True)
class Part:
    """Samples that follow each other in shards: a pass over the training images, or another part.

    name: "train-p0003", "sample" (training images of epoch 0 without mixup) or "held_out".
    """

    name: str
    count: int

    def shards(self, shard_size: int) -> Iterator[tuple[str, range]]:
        """The file of each shard, and the rows of the part that it holds."""
        for number, start in enumerate(range(0, self.count, shard_size)):
            rows = range(start, min(start + shard_size, self.count))
            yield f"{self.name}-{number:05d}.tar", rows


def pass_name(number: int) -> str:
    """The name of the part of a pass over the training images."""
    return f"train-p{number:04d}"


@dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds.

    seed: of order, augmentation and mixup.  passes: over the training images; pass p has the
        samples of epoch p.
    num_train, num_held_out, num_sample: samples in a pass and in the other parts.
    classes: their names.  augmentation: the keys of the recipe's section data that change images.
    patch_nums, vocab_size: of the VQ-VAE.  vae_sha256: of its weights before the decoder.
    data_sha256: of the images.
    recipe: that the tokens were made with.
    shards: SHA-256 of each file; empty until all are there.
    stamps: of the image files, where data_sha256 does not cover their contents; earlier versions
        recorded none.
    """

    format: str
    seed: CountOrZero
    passes: Count
    num_train: Count
    num_held_out: Count
    num_sample: Count
    shard_size: Count
    classes: tuple[str, ...]
    augmentation: dict[str, float]
    patch_nums: tuple[Count, ...]
    vocab_size: Count
    vae_sha256: str
    data_sha256: str
    recipe: dict[str, Any]
    shards: dict[str, str]
    stamps: FileStamps = field(default_factory=FileStamps)

    def __post_init__(self) -> None:
        # A damaged manifest must not ask for more time and memory than there is.
        scales = int(LIMITS["scales"])
        require(
            1 <= len(self.patch_nums) <= scales,
            f"patch_nums must have 1 to {scales} integers",
            len(self.patch_nums),
        )
        check_ranges(self)
        tokens, codes = int(LIMITS["tokens"]), int(LIMITS["vocab_size"])
        require(
            self.num_tokens <= tokens,
            f"patch_nums must have at most {counted(tokens, 'token')} in total",
            self.num_tokens,
        )
        require(self.vocab_size <= codes, f"vocab_size must be <= {codes:,}", self.vocab_size)
        require(
            self.shard_size <= MAX_SHARD_SIZE,
            f"shard_size must be <= {MAX_SHARD_SIZE:,}",
            self.shard_size,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return sum(side * side for side in self.patch_nums)

    @property
    def quantizer(self) -> dict[str, Any]:
        """The :data:`QUANTIZER_KEYS` that the recipe records, with their values."""
        vae = self.recipe.get("vae")
        return {key: vae[key] for key in QUANTIZER_KEYS if key in vae} if type(vae) is dict else {}

    @property
    def dtype(self) -> np.dtype:
        """That of the stored tokens."""
        return np.dtype("<i2" if self.vocab_size <= MAX_INT16 else "<i4")

    @property
    def num_samples(self) -> int:
        """Samples of all parts."""
        return self.passes * self.num_train + self.num_held_out + self.num_sample

    def parts(self) -> Iterator[Part]:
        """All parts, in the order in which they are written."""
        for number in range(self.passes):
            yield Part(pass_name(number), self.num_train)
        yield Part(HELD_OUT, self.num_held_out)
        yield Part(SAMPLE, self.num_sample)

    def files(self) -> Iterator[tuple[str, Part, range]]:
        """Every shard: its name, its part, its rows."""
        for part in self.parts():
            for name, rows in part.shards(self.shard_size):
                yield name, part, rows


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder of token shards.

    Raises:
        UserError: there is none, it is damaged, or not of this format.
    """
    path = Path(folder) / MANIFEST_NAME
    if path_kind(path) is None:
        raise UserError(
            f"{shown(folder)}: holds no tokens: it has no {MANIFEST_NAME}; `variant tokenize` "
            "writes one"
        )
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else type(values).__name__
    if found != FORMAT:
        raise UserError(f'{shown(path)}: "format" must be "{FORMAT}"; got {str(found)[:100]!r}')
    try:
        return parse_dataclass(Manifest, values, shown(path))
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())[:500]) from None


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Samples in the form of a shard.

    index_B, labels_B: int64.  tokens_BL: integers.  mixed_labels_B (int64), mix_B (float32): None
        without mixup.
    bad: files that could not be read, in whose place others were.
    """

    index_B: np.ndarray
    tokens_BL: np.ndarray
    labels_B: np.ndarray
    mixed_labels_B: np.ndarray | None = None
    mix_B: np.ndarray | None = None
    bad: tuple[BadItem, ...] = ()


def write_shard(path: Path, rows: Rows, dtype: np.dtype) -> str:
    """Write a shard and, beside it, its SHA-256 for ``sha256sum -c``; both whole or not at all.

    Files that could not be read are listed in a third one; without any there is none.

    The shard's name appears last. The same rows give the same bytes.

    Returns:
        SHA-256 of the file.
    Raises:
        UserError: webdataset is not installed, or the files cannot be written.
    """
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise UserError(
            'token shards need webdataset: pip install "variant-kernels[train]"'
        ) from error
    content = io.BytesIO()
    with TarWriter(content, user="", group="", mtime=0) as writer:
        for place in range(len(rows.index_B)):
            entry: dict[str, Any] = {
                "index": int(rows.index_B[place]),
                "label": int(rows.labels_B[place]),
            }
            if rows.mixed_labels_B is not None and rows.mix_B is not None:
                entry["mixed_label"] = int(rows.mixed_labels_B[place])
                entry["mix"] = float(rows.mix_B[place])
            tokens = rows.tokens_BL[place].astype(dtype)
            sample = {"json": json.dumps(entry).encode(), "npy": _as_npy(tokens)}
            writer.write({"__key__": f"{place:06d}", **sample})
    data = content.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with atomic_write(digest_path(path)) as written:
            written.write_text(f"{digest}  {path.name}\n")
        _write_bad_items(path, rows.bad)
    return digest


def _as_npy(tokens_L: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, tokens_L, version=(1, 0), allow_pickle=False)
    return content.getvalue()


def digest_path(shard: Path) -> Path:
    """The file with the SHA-256 of a shard."""
    return shard.with_name(f"{shard.name}.sha256")


def _write_bad_items(shard: Path, items: tuple[BadItem, ...]) -> None:
    path = shard.with_name(shard.name + BAD_SUFFIX)
    if not items:
        path.unlink(missing_ok=True)  # of a shard that was removed
        return
    with atomic_write(path) as temporary:
        content = [dataclasses.asdict(item) for item in items]
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_bad_items(folder: Path, known: set[Path]) -> list[BadItem]:
    """The files that could not be read for the shards of a folder, whichever process wrote them.

    Args:
        known: lists that were read before, to which those that are read now are added.
    Raises:
        UserError: a list is damaged.
    """
    items: list[BadItem] = []
    for path in sorted(set(folder.glob(f"*.tar{BAD_SUFFIX}")) - known):
        if path_kind(path.with_name(path.name.removesuffix(BAD_SUFFIX))) != "file":
            continue  # the shard is not written yet
        known.add(path)
        try:
            items += [parse_dataclass(BadItem, values, "an item") for values in read_json(path)]
        except (RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{shown(path)}: is damaged: {error!s:.200}; remove it") from None
    return items


def read_digest(shard: Path) -> str | None:
    """SHA-256 that was written beside a shard; None if it or the shard is missing or damaged."""
    path = digest_path(shard)
    if path_kind(shard) != "file" or path_kind(path) != "file":
        return None
    with open_regular(path) as file:
        words = file.read(1000).decode("ascii", "replace").split()
    return words[0] if words and len(words[0]) == 64 else None


# --- reading ------------------------------------------------------------------------------------


class ShardReader:
    """Reads samples of shards by their rows.

    A shard's SHA-256 is compared with that of the manifest when its first sample is read.

    Args:
        folder: of the shards.  manifest: of that folder, complete.
    Attributes:
        rows_of: samples of each shard, by its name.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        header = _as_npy(np.zeros(manifest.num_tokens, manifest.dtype))
        self._npy_header = header[: -manifest.num_tokens * manifest.dtype.itemsize]
        # A header and a block with the labels, a header and the blocks with the tokens.
        self._tokens_at = 3 * BLOCK + len(self._npy_header)
        self.stride = 3 * BLOCK + -(-len(header) // BLOCK) * BLOCK
        self.rows_of = {name: len(rows) for name, _, rows in manifest.files()}
        self._checked: dict[str, str | None] = {}

    def reason(self, name: str) -> str | None:
        """Why a shard cannot be read; None if it can."""
        if name not in self._checked:
            self._checked[name] = self._reason(name)
        return self._checked[name]

    def _reason(self, name: str) -> str | None:
        path = self.folder / name
        try:
            with open_regular(path) as file:
                # Compared first: a file of any size may have the name of a shard.
                if os.fstat(file.fileno()).st_size > self.rows_of[name] * self.stride + MAX_END:
                    return f"{shown(path)}: is damaged: it is larger than its samples; {REMEDY}"
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{shown(path)}: cannot be read: {error.strerror or error}"
        if digest != self.manifest.shards[name]:
            return (
                f"{shown(path)}: is damaged: its SHA-256 is not that of {MANIFEST_NAME}; {REMEDY}"
            )
        return None

    def read(self, name: str, places: list[int]) -> list[tuple[Mapping[str, Any], np.ndarray]]:
        """The entries and the tokens of some samples of a shard.

        Args:
            places: of the samples, counted from 0.
        Raises:
            UserError: the shard does not hold samples of this manifest.
        """
        path = self.folder / name
        found = []
        try:
            with open_regular(path) as file:
                for place in places:
                    sample = os.pread(file.fileno(), self.stride, place * self.stride)
                    found.append(self._parse(sample))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{shown(path)}: does not hold samples of {MANIFEST_NAME}: {error}"
            ) from None
        return found

    def _parse(self, sample: bytes) -> tuple[Mapping[str, Any], np.ndarray]:
        start = self._tokens_at
        if sample[start - len(self._npy_header) : start] != self._npy_header:
            raise ValueError("no tokens in its place")
        entry = json.loads(sample[BLOCK : 2 * BLOCK].rstrip(b"\0"))
        if not isinstance(entry, dict):
            raise ValueError("no labels in its place")
        count = self.manifest.num_tokens
        return entry, np.frombuffer(sample, self.manifest.dtype, count, start)
