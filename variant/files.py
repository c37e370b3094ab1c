"""Files: atomic writes, and pickles that are read without running code from them."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from variant.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds.

    A block that raises leaves an existing file as it was. A link stays: the file that it names is
    replaced. A device, which a rename would replace by a file, is refused.

    Raises:
        UserError: the folder cannot be written, the disk is full, or ``path`` is no plain file.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: cannot be written: is no plain file")
        try:
            yield temporary
        except (SafetensorError, RuntimeError) as error:
            # safetensors and torch.save report a full or failing disk by these.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error
        # safetensors writes files that only their owner can read; apply the umask instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_pickle(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """``torch.save`` by :func:`atomic_write`.  Raises: UserError, if it cannot be written."""
    with atomic_write(Path(path)) as temporary:
        torch.save(dict(state), temporary)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, memory-mapped.

    Raises:
        UserError: missing or damaged.
    """
    with open_safetensors(path) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """safetensors' ``safe_open`` within the block.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is missing or damaged: {error}") from error


def is_mmapped(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`read_pickle` memory-maps the file; it reads older formats into memory."""
    return zipfile.is_zipfile(path)


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``.pth`` file's dictionary; tensors are memory-mapped where the file's format allows it.

    No code in the pickle is run (``weights_only=True``).

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that would run code.
    """
    try:
        mmapped = is_mmapped(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmapped)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: loading it would run code that it contains, or it is damaged; only "
            "plain files of weights are read"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # For bytes that are no pickle, the text of the error is a key or a value from them.
        has_text = isinstance(error, OSError | RuntimeError) and str(error)
        reason = str(error).splitlines()[0][:200] if has_text else "torch.save did not write it"
        raise UserError(f"{path}: is not a readable checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors; got {type(state).__name__}")
    return state


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.  Raises: UserError, if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
