"""Tensors in files, read without running code from them and without mapping them into memory.

``stored_pickle`` and ``stored_safetensors`` read the names, shapes and dtypes of a file's tensors.
The values are read later, tensor by tensor (:meth:`StoredTensor.read`), so that a model is compared
with its file before memory is allocated, and is converted without a copy of the whole file.
Values are always copied: whatever happens to the file afterwards, the tensors stay. (The pages of a
mapped file that another process truncates are gone, with what was written to them, and reading them
ends the process by SIGBUS.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import struct
import sys
import threading
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor

from variant.errors import UserError
from variant.paths import open_regular, shown, unique_keys
from variant_kernels.wording import counted

# Limits of what describes the tensors; published models have less than 1 MiB.
MAX_HEADER_BYTES = 2**25
# Tensors may share values in a file, but each gets memory of its own.
MAX_EXPANSION = 4
# Of the header of a .safetensors file: published models have fewer than 10,000 tensors, and torch
# has no operations on more axes.
MAX_TENSORS, MAX_AXES = 2**15, 64
CHUNK_BYTES = 2**19  # of reads and of sum64: another value makes other sums
# Key of the metadata of a .safetensors file; as JSON, for each tensor its sum64 in hexadecimal.
CHECKSUMS = "sum64"
ZIP = b"PK\x03\x04"  # begins the archive of torch.save
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: the class that it does not load
_ALLOWING = threading.Lock()

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Source:
    """An open file of tensors.

    It stays open as long as one of its tensors is in use, and is read even if another file has
    taken its name meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO) -> None:
        self.where = shown(path)
        self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        self.state = self._state()
        self.size = self.state[0]
        try:
            begin = os.pread(self.descriptor, len(LFS_POINTER), 0)
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read: {error.strerror}") from None
        if begin == LFS_POINTER:
            raise UserError(
                f"{self.where}: is a pointer of Git LFS, not the file itself; `git lfs pull` in "
                "its repository fetches it"
            )
        self._allocated = 0
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._last: tuple[Region, Tensor] | None = None

    def read_bytes(self, region: Region, *, into_scratch: bool = False) -> Tensor:
        """The bytes of a region, (N,) uint8.

        Args:
            into_scratch: into memory that the next such call overwrites, for values that are cast
                at once. Buffers freed between the cast tensors would leave holes in the heap: up to
                a third of a float32 file of 460 MB read as bfloat16.
        Raises:
            UserError: the file ends before, was written to since it was opened, or does not have
                the region's checksum.
        """
        if into_scratch:
            if len(self._scratch) < region.size:
                self._scratch = self._scratch.new_empty(region.size)
            buffer = self._scratch[: region.size]
        else:
            buffer = torch.empty(region.size, dtype=torch.uint8, device="cpu")
        view, update = _bytes_of(buffer), _UPDATES[region.checksum]
        found = 0
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._read_chunk(chunk, region.offset + start)
            found = update(chunk, found)  # while the chunk is in the processor's cache
        if self._state() != self.state:
            raise UserError(f"{self.where}: was written to while it was being read; load it again")
        if found != region.expected:
            raise UserError(
                f"{self.where}: is damaged: the checksum of {region.name} is {found:x}; expected "
                f"{region.expected:x}. Fetch or write the file again"
            )
        return buffer

    def shared_bytes(self, region: Region) -> Tensor:
        """As :meth:`read_bytes`, kept until another region is read: views often follow in turn."""
        if self._last is None or self._last[0] != region:
            self._last = None
            self._last = (region, self.read_bytes(region))
        return self._last[1]

    def allocate(self, size: int) -> None:
        """Count the memory of a tensor.  Raises: UserError, if the file's tensors are absurd."""
        self._allocated += size
        if self._allocated > MAX_EXPANSION * self.size:
            raise UserError(
                f"{self.where}: its tensors overlap: they would take more than {MAX_EXPANSION} "
                f"times the {counted(self.size, 'byte')} of the file"
            )

    def _read_chunk(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.where}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise UserError(f"{self.where}: is damaged: it ends within the values of a tensor")
            done += count

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Region:
    """Bytes of a file: a tensor of .safetensors, a record of .pth.

    expected: their checksum, which a .pth has as "crc32", a .safetensors of ours as "sum64".
    """

    name: str
    offset: int
    size: int
    checksum: Literal["none", "crc32", "sum64"] = "none"
    expected: int = 0


def _sum64(chunk: memoryview, before: int) -> int:
    """The next value of a sum over chunks of CHUNK_BYTES.

    Each chunk adds its little-endian 64-bit words, after the sum so far was multiplied by an odd
    constant, all modulo 2^64. It changes with any one bit, with most other damage, and where chunks
    change places. Measured on one core of an AMD EPYC: 76 GB/s; CRC-32 of zlib 4.1 GB/s, which
    would double the time that loading takes from the page cache.
    """
    whole = len(chunk) & ~7
    words = np.frombuffer(chunk[:whole], "<u8")
    total = int(np.add.reduce(words, dtype=np.uint64)) + int.from_bytes(chunk[whole:], "little")
    return (before * 0x9E3779B97F4A7C15 + total) % 2**64


_UPDATES: dict[str, Callable[[memoryview, int], int]] = {
    "none": lambda chunk, before: 0,
    "crc32": zlib.crc32,
    "sum64": _sum64,
}


class StoredTensor(Tensor):
    """A tensor on the meta device whose values are in a file: shape and dtype without values."""

    source: Source
    region: Region

    @classmethod
    def of(cls, meta: Tensor, source: Source, region: Region) -> Self:
        """A meta tensor, a view of the values in ``region``.

        Raises:
            UserError: it would reach beyond the region.
        """
        stored = meta.detach().as_subclass(cls)
        stored.source, stored.region = source, region
        item, size = meta.element_size(), math.prod(meta.shape)
        last = sum((n - 1) * step for n, step in zip(meta.shape, meta.stride(), strict=True))
        end = (meta.storage_offset() + last + 1) * item if size else 0
        if min(meta.stride(), default=0) < 0 or end > region.size or size * item > region.size:
            raise UserError(
                f"{source.where}: is damaged: a tensor of shape {tuple(meta.shape)} reaches beyond "
                f"the {counted(region.size, 'byte')} of {region.name}"
            )
        return stored

    def read(self, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """The values, in new memory.

        Args:
            dtype: of floating-point tensors; None keeps it.  device: None is the CPU.
        Raises:
            UserError: the file is damaged, or was written to since it was opened.
        """
        shape, step, start = tuple(self.shape), self.stride(), self.storage_offset()
        if not math.prod(shape):
            values = torch.empty(shape, dtype=self.dtype, device="cpu")
        else:
            size = self.element_size() * math.prod(shape)
            self.source.allocate(size)
            if size == self.region.size and self.is_contiguous():
                cast_follows = dtype not in (None, self.dtype) and self.is_floating_point()
                values = self.source.read_bytes(self.region, into_scratch=cast_follows)
                values = values.view(self.dtype).view(shape)
            else:
                values = (
                    self.source.shared_bytes(self.region)
                    .view(self.dtype)
                    .as_strided(shape, step, start)
                    .clone(memory_format=torch.contiguous_format)
                )
        new_dtype = dtype if dtype is not None and values.is_floating_point() else values.dtype
        return values.to(device=device or "cpu", dtype=new_dtype)


def read_values(
    tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The values of a stored tensor, as :meth:`StoredTensor.read`; ``.to`` of any other."""
    if isinstance(tensor, StoredTensor):
        return tensor.read(dtype, device)
    new_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device or tensor.device, dtype=new_dtype)


def read_all(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """:func:`read_values` of each tensor, one after the other: one is in memory beside the result.

    (Two threads would read faster on idle cores, but hold more: glibc's allocator keeps for each
    thread what that thread has freed.)
    """
    return {name: read_values(tensor, dtype, device) for name, tensor in tensors.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a (N,) uint8 tensor on the CPU."""
    return memoryview(cast("Any", tensor.numpy()))


# --- .safetensors -------------------------------------------------------------------------------


class StoredTensors(dict[str, StoredTensor]):
    """The tensors of a ``.safetensors`` file by name; metadata: what its header says of them."""

    metadata: Mapping[str, Any] = {}


def stored_safetensors(path: str | os.PathLike[str]) -> StoredTensors:
    """The tensors of a ``.safetensors`` file, without their values.

    Raises:
        UserError: missing or damaged; one line.
    """
    with open_regular(path) as file:
        source = Source(path, file)

    def damaged(reason: str) -> UserError:
        return UserError(f"{source.where}: is missing or damaged: {reason}")

    if source.size < 8:
        raise damaged("it has no header")
    head = source.read_bytes(Region("the header", 0, 8))
    (length,) = struct.unpack("<Q", bytes(head.numpy()))
    start = 8 + length
    if head.numpy().tobytes().startswith(ZIP):
        raise UserError(f"{source.where}: is a file of torch.save; rename it to end in .pth")
    if start > source.size or length > MAX_HEADER_BYTES:
        raise damaged(
            f"a header of {counted(length, 'byte')} in a file of {counted(source.size, 'byte')}"
        )
    text = bytes(source.read_bytes(Region("the header", 8, length)).numpy())
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        if not isinstance(header, dict):
            raise ValueError("the header must be an object")
        metadata = header.pop("__metadata__", None) or {}
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it lists {counted(len(header), 'tensor')}; at most {MAX_TENSORS:,}")
        if not isinstance(metadata, dict):
            raise ValueError("its __metadata__ must be an object")
        entries = [_entry(name, values) for name, values in header.items()]
        checksums = json.loads(metadata.get(CHECKSUMS, "{}"))
        regions = _regions(entries, start, source.size, checksums)
    except RecursionError:
        raise damaged("its header is nested too deeply") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(" ".join(str(error).split())[:200]) from None
    meta = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    stored = StoredTensors({n: StoredTensor.of(x, source, regions[n]) for n, x in meta.items()})
    stored.metadata = metadata
    return stored


@dataclass(frozen=True)
class _Entry:
    """One tensor in the header of a .safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, values: Any) -> _Entry:
    """Raises: ValueError, TypeError or KeyError for what is no entry."""
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    shape, offsets = values["shape"], values["data_offsets"]
    if values["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {values['dtype']!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r}: shape and data_offsets must be lists of integers >= 0")
    # Also of an empty tensor: torch multiplies the sides to strides before it looks for a 0.
    if len(shape) > MAX_AXES or math.prod(side or 1 for side in shape) >= 2**63:
        raise ValueError(f"{name!r} has more than {MAX_AXES} axes or 2^63 values")
    dtype, (begin, end) = DTYPES[values["dtype"]], offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r} of shape {shape} has {counted(end - begin, 'byte')}")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def _regions(
    entries: list[_Entry], start: int, size: int, checksums: Mapping[str, str]
) -> dict[str, Region]:
    """The place of every tensor.  Raises: ValueError, if they leave a gap or overlap."""
    position, regions = 0, {}
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise ValueError(f"the values of {entry.name!r} start at {entry.begin}, not {position}")
        position = entry.end
        region = Region(repr(entry.name), start + entry.begin, entry.end - entry.begin)
        if checksums:
            region = replace(region, checksum="sum64", expected=int(checksums[entry.name], 16))
        regions[entry.name] = region
    if start + position != size:
        raise ValueError(
            f"it has {counted(size, 'byte')}; its header describes {start + position:,}"
        )
    return regions


def checksums_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of a ``.safetensors`` file with which :func:`stored_safetensors` finds damage.

    Args:
        tensors: contiguous, on the CPU.
    """
    sums = {}
    for name, tensor in tensors.items():
        view, total = _bytes_of(tensor.reshape(-1).view(torch.uint8)), 0
        for start in range(0, len(view), CHUNK_BYTES):
            total = _sum64(view[start : start + CHUNK_BYTES], total)
        sums[name] = f"{total:016x}"
    return {CHECKSUMS: json.dumps(sums)}


# --- .pth ---------------------------------------------------------------------------------------


def stored_pickle(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The dictionary in a ``.pth`` file, its tensors without their values.

    No code in the pickle is run (``weights_only=True``). Files in the format of torch before 1.6
    are read whole: their tensors are ordinary ones. An ``argparse.Namespace``, in which many
    trainers keep their command line, becomes a dictionary.

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that would run code.
    """
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickle protocols and of TorchScript
        source = Source(path, file)
        try:
            start = file.read(9)
            zipped = start.startswith(ZIP)
            if start[6:] == b"\0\0{":  # the length of a header in 8 bytes, and the header
                raise UserError(f"{source.where}: is a .safetensors file; rename it to end so")
            file.seek(0)
            records = _records(file, source) if zipped else {}
            state = _unpickled(file, "meta" if zipped else "cpu")
            state = replace_tensors(
                state,
                (lambda meta: _stored(meta, source, records)) if zipped else (lambda own: own),
            )
        except UserError:
            raise
        except pickle.UnpicklingError as error:
            raise UserError(f"{source.where}: {_refusal(str(error))}") from None
        except Exception as error:
            # The bytes decide what is raised: a dozen types are possible. The text of an error is a
            # key or a value from them, except in errors of the system and of torch.
            has_text = isinstance(error, OSError | RuntimeError | zipfile.BadZipFile) and str(error)
            reason = str(error).splitlines()[0][:200] if has_text else "torch.save did not write it"
            raise UserError(f"{source.where}: is not a readable checkpoint: {reason}") from None
    if not isinstance(state, dict):
        kind = "Tensor" if isinstance(state, Tensor) else type(state).__name__
        raise UserError(f"{source.where}: must hold a dictionary of tensors; got {kind}")
    return state


def _unpickled(file: BinaryIO, place: str) -> Any:
    """What ``torch.load`` reads without running code.

    It refuses every class but torch's own until the caller allows others, for the whole process. A
    Namespace is plain values, so it is allowed for as long as such a file is read.
    """
    try:
        return torch.load(file, map_location=place, weights_only=True)
    except pickle.UnpicklingError as error:
        named = _REFUSED.search(str(error))
        if named is None or named[1] != "argparse.Namespace":
            raise
    file.seek(0)
    with _ALLOWING, torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location=place, weights_only=True)


def _refusal(message: str) -> str:
    """Our words for an error of torch's restricted unpickler."""
    named = _REFUSED.search(message)
    if named is None:
        return (
            "refused: loading it would run code that it contains, or it is damaged; only plain "
            "files of weights are read"
        )
    return (
        f"refused: it holds a {named[1]}, and loading that would run code; only tensors, numbers, "
        "text, lists and dictionaries are read. Save it again with torch.save(model.state_dict())"
    )


def _records(file: BinaryIO, source: Source) -> dict[int, Region]:
    """The records of tensors in the archive, by the offset of their bytes; checks all others.

    Raises:
        UserError: an archive that torch.save does not write.  BadZipFile: a damaged one.
    """
    where, size = source.where, source.size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.serialization.set_crc32_options(False) writes zeros.
        checked = any(entry.CRC for entry in entries)
        records = {}
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise UserError(
                    f"{where}: is not a readable checkpoint: {entry.filename!r} is compressed; "
                    "torch.save writes plain values. Load it with torch and save it again"
                )
            if entry.file_size > size:
                raise zipfile.BadZipFile(f"{entry.filename!r} is larger than the file")
            if "/data/" in entry.filename:
                offset = _offset_of(file, entry)
                record = Region(entry.filename, offset, entry.file_size)
                if checked:
                    record = replace(record, checksum="crc32", expected=entry.CRC)
                records[offset] = record
                continue
            if entry.file_size > MAX_HEADER_BYTES:
                raise UserError(
                    f"{where}: is not a readable checkpoint: {entry.filename!r} has more than "
                    f"{MAX_HEADER_BYTES:,} bytes; weights need less"
                )
            content = os.pread(file.fileno(), entry.file_size, _offset_of(file, entry))
            if checked and zlib.crc32(content) != entry.CRC:
                raise UserError(f"{where}: is damaged: the checksum of {entry.filename} is wrong")
            order = content.decode("ascii", "replace")
            if entry.filename.endswith("/byteorder") and order != sys.byteorder:
                raise UserError(
                    f"{where}: has the byte order {order!r}; this machine's is {sys.byteorder!r}. "
                    "Load it with torch and save it again"
                )
    file.seek(0)
    return records


def _offset_of(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes start: after its local header, whose two last fields are lengths."""
    header = os.pread(file.fileno(), 30, entry.header_offset)
    if len(header) != 30:
        raise zipfile.BadZipFile(f"{entry.filename!r} lies beyond the end of the file")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


def replace_tensors(value: Any, replacement: Callable[[Tensor], Any]) -> Any:
    """``value`` with other tensors in its dictionaries, lists and tuples, which are changed in
    place where they can be; a Namespace becomes a dictionary."""
    done: dict[int, tuple[Any, Any]] = {}

    def visit(value: Any) -> Any:
        if id(value) in done:
            return done[id(value)][1]
        result = value
        if isinstance(value, Tensor):
            result = replacement(value)
        elif isinstance(value, argparse.Namespace):
            result = visit(vars(value))
        elif isinstance(value, dict | list):
            done[id(value)] = (value, value)  # before its items, which may hold it
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                value[key] = visit(item)
        elif type(value) is tuple:
            result = tuple(visit(item) for item in value)
        else:
            return value
        done[id(value)] = (value, result)  # value too: its id stays its own while it is alive
        return result

    return visit(value)


def _stored(tensor: Tensor, source: Source, records: Mapping[int, Region]) -> StoredTensor:
    kind = type(tensor).__name__
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
        raise UserError(f"{source.where}: holds a {kind} that is sparse, quantized or a lazy view")
    storage = tensor.untyped_storage()
    # torch notes the offset of meta tensors' storages in the file under this name.
    offset = getattr(storage, "_checkpoint_offset", None)
    region = None if offset is None else records.get(offset)
    if not storage.nbytes():
        region = Region("an empty tensor", 0, 0)
    if offset is None and storage.nbytes():
        raise UserError(
            f"{source.where}: has no values of a tensor of shape {tuple(tensor.shape)}, which was "
            "saved from the meta device. Load the weights before they are saved"
        )
    if region is None or region.size != storage.nbytes():
        raise UserError(
            f"{source.where}: is damaged: no record of the archive has the "
            f"{counted(storage.nbytes(), 'byte')} of a tensor of shape {tuple(tensor.shape)}"
        )
    return StoredTensor.of(tensor, source, region)
