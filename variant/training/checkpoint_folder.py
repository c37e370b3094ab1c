"""A checkpoint in a folder, written by all processes of a run, each its part of the tensors.

torch.distributed.checkpoint writes the tensors: ``.metadata``, ``__RANK_0.distcp``. Beside them are
``contents.pt``, the entries that are no tensors, and ``manifest.json``, the SHA-256 of every file.
The files are written under a temporary name of the folder, which is renamed when all are complete.
Any number of processes can read the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variant.errors import UserError
from variant.files import read_pickle, sync, temporary_name
from variant.paths import file_sha256, open_regular, path_kind, read_text

CONTENTS_NAME = "contents.pt"
MANIFEST_NAME = "manifest.json"
METADATA_NAME = ".metadata"
# One of these waits for the slowest process to write its part.
GROUP_TIMEOUT = timedelta(hours=2)
# What the pickle of the metadata may name; anything else could run code.
CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}


class FolderWriter:
    """Writes checkpoints in the background, one at a time.

    Every process calls every method, in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        contents: Mapping[str, Any],
        *,
        links: Mapping[str, Path],
        finish: Callable[[], None],
    ) -> None:
        """Begin to write a checkpoint, which may change from now on; :meth:`wait` ends it.

        Args:
            folder: new, or replaced.
            tensors: by name, whole or sharded; those of rank 0 count where all have them whole.
            contents: plain values, those of rank 0.
            links: files that the folder gets under these names too.
            finish: called by rank 0 when the folder is complete.
        Raises:
            UserError: the checkpoint before could not be written.
        """
        # Imported here: it takes a second.
        from torch import distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        if self._group is None:
            # Of its own: operations of the training meanwhile must not meet those of the writing.
            self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        temporary = folder.with_name(f".{folder.name}.parts.tmp")
        # Some versions of torch copy tensors of GPUs only.
        copies = {
            name: tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach()
            for name, tensor in tensors.items()
        }
        future = async_save(copies, checkpoint_id=temporary, process_group=self._group)

        def complete(digests: dict[str, str]) -> None:
            _complete(temporary, folder, digests, contents, links)
            finish()

        self._thread = threading.Thread(
            target=self._end,
            args=(future, temporary, complete),
            name="checkpoint",
            daemon=True,  # a lost process must not keep this one alive
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the checkpoint is written, if one is.

        Args:
            seconds: at most; None has no limit.
        Raises:
            UserError: it could not be written; on every process.
        """
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            return
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise UserError(error)

    def poll(self) -> None:
        """As :meth:`wait`, but only if the writing has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _end(
        self, future: Any, temporary: Path, complete: Callable[[dict[str, str]], None]
    ) -> None:
        """In the background: wait for the tensors, and rename the folder if all went well."""
        from torch import distributed as dist

        digests, reason = {}, None
        rank, size = dist.get_rank(), dist.get_world_size()
        try:
            future.result()
            digests = _digests(sorted(temporary.glob(f"__{rank}_*.distcp")))
        except BaseException as error:  # CheckpointException is no Exception
            reason = _reason(error)
        try:
            parts: list[Any] = [None] * size
            dist.all_gather_object(parts, (digests, reason), group=self._group)
            outcome = [next((text for _, text in parts if text is not None), None)]
            if rank == 0 and outcome[0] is None:
                try:
                    names = {name: value for part, _ in parts for name, value in part.items()}
                    complete(names)
                except Exception as error:
                    outcome = [_reason(error)]
            if rank == 0 and outcome[0] is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            reason = outcome[0]
        except Exception as error:  # a process is lost
            reason = reason or _reason(error)
        if reason is not None:
            self._error = f"{temporary.parent}: the checkpoint cannot be written: {reason}"


def _complete(
    temporary: Path,
    folder: Path,
    digests: dict[str, str],
    contents: Mapping[str, Any],
    links: Mapping[str, Path],
) -> None:
    """Add the files that are no tensors, then rename the folder."""
    torch.save(dict(contents), temporary / CONTENTS_NAME)
    sync(temporary / CONTENTS_NAME)
    digests = digests | _digests(temporary / name for name in (CONTENTS_NAME, METADATA_NAME))
    for name, path in links.items():
        link(path, temporary / name)
    files = json.dumps(dict(sorted(digests.items())))
    own = hashlib.sha256(files.encode()).hexdigest()
    (temporary / MANIFEST_NAME).write_text(f'{{"files": {files},\n"sha256": "{own}"}}\n')
    sync(temporary / MANIFEST_NAME)
    sync(temporary)
    remove_folder(folder)
    os.replace(temporary, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint, renamed first: what a killed process leaves is no checkpoint.

    Raises:
        OSError: it cannot be renamed.
    """
    if path_kind(folder) is None:
        return
    leaving = temporary_name(folder)
    os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def link(path: Path, name: Path) -> None:
    """A second name of a file; its copy, where the file system has one name for a file.

    Raises:
        OSError: the folder cannot be written.
    """
    with suppress(FileNotFoundError):
        name.unlink()  # of a run that was killed before its next checkpoint
    try:
        os.link(os.path.realpath(path), name)
    except OSError:
        temporary = temporary_name(name)
        try:
            shutil.copyfile(path, temporary)
            sync(temporary)
            os.replace(temporary, name)
        finally:
            with suppress(OSError):
                temporary.unlink()


# --- reading ------------------------------------------------------------------------------------


def is_checkpoint_folder(path: Path) -> bool:
    """Whether the folder of this path holds a checkpoint."""
    return path.is_dir() and (path / MANIFEST_NAME).exists()


def check_folder(folder: Path) -> list[str]:
    """Compare every file with its SHA-256 in the manifest.

    Returns:
        the names of the files.
    Raises:
        UserError: naming the file that is damaged or missing.
    """
    path = folder / MANIFEST_NAME
    text = read_text(path)
    try:
        files, own = json.loads(text)["files"], json.loads(text)["sha256"]
        if hashlib.sha256(json.dumps(files).encode()).hexdigest() != own:
            raise ValueError("its bytes do not give its SHA-256")
        # Not of other folders.
        wrong = [name for name in files if name != Path(name).name or not isinstance(name, str)]
        if wrong or CONTENTS_NAME not in files or METADATA_NAME not in files:
            raise ValueError("it does not list the files of a checkpoint")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())[:200]}") from None
    for name, digest in files.items():
        if file_sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name}: is damaged: its bytes do not give the SHA-256 in {MANIFEST_NAME}"
            )
    return list(files)


def read_contents(folder: Path) -> dict[Any, Any]:
    """The entries that are no tensors.  Raises: UserError, if they cannot be read."""
    return read_pickle(folder / CONTENTS_NAME)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes in the folder, without their values (on the meta device).

    Raises:
        UserError: the metadata is damaged, or would run code.
    """
    metadata = _reader(folder).read_metadata()
    try:
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in metadata.state_dict_metadata.items()
        }
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / METADATA_NAME}: is damaged: {_reason(error)}") from None


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors of these names, whole or sharded, each process its own parts.

    Raises:
        UserError: a tensor is missing or has another shape, or the files cannot be read.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = stored_tensors(folder)
    for name, tensor in tensors.items():
        if name not in stored or stored[name].shape != tensor.shape:
            found = tuple(stored[name].shape) if name in stored else "none"
            raise UserError(
                f"{folder}: does not fit the model: {name} must be {tuple(tensor.shape)}; it has "
                f"{found}"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no_dist, which is meant
            # Without messages between processes: the metadata tells each what it has to read.
            load(tensors, storage_reader=_reader(folder), no_dist=True)
    except BaseException as error:  # CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | UserError):
            raise
        raise UserError(f"{folder}: cannot be read: {_reason(error)}") from None


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        """Reads metadata that names known classes only, and files of this folder only."""

        def read_metadata(self, *args: Any, **rest: Any) -> Any:
            path = folder / METADATA_NAME
            with open_regular(path) as file:
                try:
                    metadata = _Unpickler(file).load()
                    places = {info.relative_path for info in metadata.storage_data.values()}
                    if any(place != Path(place).name for place in places):
                        raise ValueError("it names files of other folders")
                    metadata.storage_meta = metadata.storage_meta or StorageMeta()
                    metadata.storage_meta.load_id = self.load_id
                except Exception as error:  # the bytes decide what is raised
                    raise UserError(f"{path}: is damaged: {_reason(error)}") from None
            return metadata

    return Reader(folder)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"names {module}.{name}"[:100])
        return super().find_class(module, name)


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in paths}


def _reason(error: BaseException) -> str:
    """What went wrong, on one line; of several processes the first that failed."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = min(failures.items())
        return f"rank {rank}: {_reason(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
