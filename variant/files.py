"""Files: atomic writes, and weights that are read without running code from them.

Every writer of this package replaces a file as a whole, and through a symbolic link the file that
the link names: the link stays.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from variant.errors import UserError
from variant.paths import shown
from variant.tensor_files import (
    checksums_of,
    read_all,
    read_values,
    replace_tensors,
    stored_pickle,
    stored_safetensors,
)
from variant_kernels.wording import counted

PROBE_BYTES = 2**20
DIGITS = 12  # of the random number in a temporary name


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds.

    A block that raises leaves an existing file as it was. A link stays: the file that it names is
    replaced, and who may read it stays the same. A device, which a rename would replace by a file,
    is refused. Several threads and machines may write one path: each has a temporary file, the last
    one counts.

    Args:
        durable: write the content to the disk before the rename, and the rename after it, so that
            a power failure leaves the old file or the new one, and no empty one.
    Raises:
        UserError: the folder cannot be written, the disk is full, ``path`` is no plain file, or no
            path of this system.
    """
    target = _target(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_plain(path, target)
        temporary, mode = _new_file(target)
        try:
            yield temporary
        except (SafetensorError, RuntimeError) as error:
            # safetensors and torch.save report a full or failing disk by these.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            reason = _reason_of_system(temporary) or str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be written: {reason}") from error
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # that of safetensors: owner alone
            temporary.chmod(mode)
        if durable:
            sync(temporary)
        os.replace(temporary, target)
        if durable:
            sync(target.parent)
    except FileExistsError as error:  # of mkdir: a file has the name of the folder
        raise UserError(f"{path}: cannot be written: {path.parent} is no folder") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def put_in_place(finished: Path, path: Path) -> None:
    """Give a finished file the name ``path``, as :func:`atomic_write` does: a link stays.

    Raises:
        OSError, UserError: ``path`` cannot be written.
    """
    target = _target(path)
    _check_plain(path, target)
    mode = wanted = finished.stat().st_mode
    with suppress(OSError):  # no such file, or a link to itself, which is replaced
        wanted = target.stat().st_mode
    if stat.S_IMODE(wanted) != stat.S_IMODE(mode):
        finished.chmod(stat.S_IMODE(wanted))
    try:
        os.replace(finished, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # the link leads to another file system
            raise
        with atomic_write(path, durable=True) as temporary:
            shutil.copyfile(finished, temporary)
        finished.unlink()


def _target(path: Path) -> Path:
    """The file that a path names, or a link.  Raises: UserError, for no path of this system."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL byte, or what the system's encoding does not have
        raise UserError(f"{shown(path)}: cannot be written: {error}") from None
    except FileNotFoundError:
        raise UserError(
            f"{shown(path)}: cannot be written: the current folder was removed"
        ) from None


def _check_plain(path: Path, target: Path) -> None:
    if target.exists() and not target.is_file():
        raise UserError(f"{path}: cannot be written: is no plain file")


def temporary_name(path: Path) -> Path:
    """A hidden path beside ``path`` that no other writer takes, on this machine or another.

    Process numbers repeat: on the machines of one file system, and in containers. The system's
    random numbers leave Python's generator, of which results depend, as it is.
    :func:`variant.folder_lock.clear_leftovers` knows these names.
    """
    return path.with_name(f".{path.name}.{secrets.randbelow(10**DIGITS):0{DIGITS}d}.tmp")


def _new_file(target: Path) -> tuple[Path, int]:
    """A temporary file beside ``target``, empty, and the permissions that ``target`` shall have.

    These are those of an existing file, or those that a new one gets here. A new file tells them:
    to read the umask one must set it, for the files of other threads too.
    """
    while True:
        temporary = temporary_name(target)
        with suppress(FileExistsError):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            break
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    with suppress(OSError):  # no such file, or a link to itself, which is replaced
        mode = target.stat().st_mode
    return temporary, stat.S_IMODE(mode)


def _reason_of_system(temporary: Path) -> str | None:
    """Why a file that is thrown away cannot be longer: torch.save tells no reason.

    None if it can.
    """
    try:
        with open(temporary, "ab", buffering=0) as file:
            for _ in range(2):  # the first write may end where the disk does
                file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return error.strerror
    return None


def sync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk (fsync).

    Raises:
        OSError: it cannot be written; a file system that cannot sync a folder raises nothing.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if is_folder:  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def save_pickle(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """``torch.save`` by :func:`atomic_write`.  Raises: UserError, if it cannot be written."""
    with atomic_write(Path(path)) as temporary:
        torch.save(dict(state), temporary)


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    durable: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Tensors, contiguous and on the CPU, with their checksums, by :func:`atomic_write`.

    The same tensors give the same bytes.

    Args:
        metadata: further texts in the header.
        durable: as in :func:`atomic_write`.
    Raises:
        UserError: the file cannot be written.
    """
    texts = {"format": "pt", **(metadata or {}), **checksums_of(tensors)}
    with atomic_write(Path(path), durable=durable) as temporary:
        write_safetensors(temporary, tensors, texts)
        _sort_metadata(temporary)


def write_safetensors(
    temporary: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors, contiguous and on the CPU, to the path that :func:`atomic_write` yields.

    Tied weights, one tensor under two names, are written twice: safetensors refuses them otherwise.
    ``save_file`` of safetensors 0.8 writes ``.tmp`` and six random letters beside its target first.
    A process that is killed then would leave a file that nobody can tell from another program's, so
    it gets a folder whose name :func:`variant.folder_lock.clear_leftovers` knows.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    folder = temporary.with_suffix(".parts.tmp")
    folder.mkdir()
    addresses: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        apart[key] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    try:
        save_file(apart, folder / "tensors", metadata=metadata)
        os.replace(folder / "tensors", temporary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a .safetensors file; the library writes them in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(
                f"{path}: its header would need {counted(len(text), 'byte')}; it has {size}"
            )
        file.seek(8)
        file.write(text.ljust(size))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, in memory of their own.

    Raises:
        UserError: missing or damaged.
    """
    return read_all(stored_safetensors(path))


def read_pickle(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """A ``.pth`` file's dictionary, its tensors in memory of their own.

    No code in the pickle is run (``weights_only=True``).

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that would run code.
    """
    return replace_tensors(stored_pickle(path), read_values)
