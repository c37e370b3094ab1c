"""Files: written whole or not at all, read without running code."""

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
    """A temporary path beside ``path`` that takes its place if the block succeeds.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except (SafetensorError, RuntimeError) as error:
            # How safetensors and torch.save report a full or failing disk.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error
        # safetensors writes files that only their owner can read; follow the umask instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_pickle(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """``torch.save`` under a temporary name, then rename."""
    with atomic_write(Path(path)) as temporary:
        torch.save(dict(state), temporary)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, mapped.

    Raises:
        UserError: missing or damaged.
    """
    with _opened(Path(path)) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is missing or damaged: {error}") from error


def is_mmapped(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`read_pickle` maps the file; older files and raw pickles are read whole."""
    return zipfile.is_zipfile(path)


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``.pth`` file's dictionary, without running code from it; tensors are mapped if they can.

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that wants to run code.
    """
    try:
        mmapped = is_mmapped(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmapped)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it is not a plain file of weights (it wants to run code, or is "
            "damaged)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Bytes that are no pickle at all surface as bare keys and values.
        told = isinstance(error, OSError | RuntimeError) and str(error)
        first = str(error).splitlines()[0][:200] if told else "it is no file of torch.save"
        raise UserError(f"{path}: is not a readable checkpoint: {first}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors; got {type(state).__name__}")
    return state


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.  Raises: UserError, where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
