"""One run at a time in a folder: a lock, and the removal of what killed runs left behind.

The lock is ``flock`` on a file in the folder. The kernel releases it however the process ends, so a
run that was killed never blocks the next one. A long work, as a training, refuses a folder that is
locked; a short one, as a save of several files (:func:`saving`), waits.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from variant.errors import UserError
from variant.paths import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Descriptors of the locks, and the thread that holds each. A copy of this process, such as a worker
# that reads images, would keep the lock of one that died.
_held: dict[int, int] = {}


def _close_held() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)

LOCK_NAME = ".variant-train.lock"
SAVE_LOCK_NAME = ".variant-save.lock"
PATIENCE = 10.0  # seconds before a wait is told
TRIES = 10_000  # to lock a file that others remove meanwhile
MOST_MISSING = 1000  # of them, for a folder that others remove
# A link or a pipe of this name must neither be followed nor waited for.
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def saving(*folders: Path) -> Iterator[bool]:
    """Within the block no other process or thread saves into these folders in such a block.

    For files that belong together: of two saves at once, the second waits and then replaces all
    files of the first.

    Yields:
        whether all are locked, as in :func:`locked_folder`.
    Raises:
        UserError: a folder cannot be written, or this thread is saving into it already, as when a
            signal comes meanwhile whose handler saves too.
    """
    try:
        apart = {os.path.realpath(folder): folder for folder in folders}
    except (OSError, ValueError) as error:  # the current folder was removed; a NUL byte in a path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(folders[0])}: cannot be written: {reason}") from None
    with ExitStack() as stack:
        # In one order everywhere: else two saves could wait for each other.
        locked = [
            stack.enter_context(
                locked_folder(folder, SAVE_LOCK_NAME, work="saving process", waits=True)
            )
            for _, folder in sorted(apart.items())
        ]
        yield all(locked)


@contextmanager
def locked_folder(
    folder: Path, name: str = LOCK_NAME, *, work: str = "training", waits: bool = False
) -> Iterator[bool]:
    """Hold the folder's lock within the block; the folder is created where it is missing.

    Args:
        name: of the file of the lock.
        work: what another owner of the lock does, for the messages.
        waits: wait for another owner's end, with a warning after ten seconds.

    Afterwards the file of the lock is removed, and so are folders that were created here and that
    the block left empty.

    Yields:
        whether the folder is locked; False, after a warning, where its file system has no locks.
    Raises:
        UserError: another owner holds the lock, or, with ``waits``, this thread does; the folder
            cannot be written.
    """
    path, created = folder / name, list[Path]()
    try:
        descriptor, is_locked = _acquire(path, work, waits, created)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        _remove_empty(created)
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "is no folder" if is_file else getattr(error, "strerror", None) or error
        raise UserError(f"{shown(folder)}: cannot be written: {reason}") from None
    _held[descriptor] = threading.get_ident()
    try:
        yield is_locked
    finally:
        _held.pop(descriptor, None)  # a copy of this process has closed it
        with suppress(OSError):
            if is_locked:  # while it is held: the next owner compares its file with the folder's
                path.unlink()
        os.close(descriptor)
        _remove_empty(created)


def clear_leftovers(folder: Path, names: Iterable[str]) -> list[Path]:
    """Remove temporary files and folders of runs that were killed while they wrote these names.

    To be called while the folder is locked.

    Args:
        names: may be patterns.
    Returns:
        what was removed.
    """
    removed = []
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
    return removed


def _create(folder: Path) -> list[Path]:
    """Create a folder; returns it and its parents as far as they are new."""
    new = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        new.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders as far as they are empty, and folders within others first."""
    for folder in sorted(set(folders), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def _acquire(path: Path, work: str, waits: bool, created: list[Path]) -> tuple[int, bool]:
    """The descriptor of the locked file, and whether it is locked.

    Args:
        created: folders that are new are added.
    Raises:
        UserError: another owner holds the lock, or the file is no regular one.
        OSError: the file cannot be opened or written: the disk is full.
    """
    missing = 0
    for _ in range(TRIES):
        try:
            created += _create(path.parent)
            descriptor = os.open(path, FLAGS, 0o666)
        except (FileNotFoundError, FileExistsError):
            # An owner that had created the folder and left it empty has just removed it; or the
            # current folder was removed.
            missing += 1
            is_other = os.path.lexists(path.parent) and not path.parent.is_dir()
            if is_other or missing > MOST_MISSING:
                raise
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: must be a regular file, that of the lock; remove it")
            if not _lock(descriptor, path.parent, work, waits):
                return descriptor, False
            if _is_at(path, descriptor):
                _write_holder(path, descriptor)
                return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise UserError(
        f"{path}: the file of the lock is another one each time; choose a folder of another file "
        "system"
    )


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the locked file is still in the folder.

    Whoever held the lock removed the file at its end, perhaps after it was opened here.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(path: Path, descriptor: int) -> None:
    """Write who holds the lock; without room for that there is none for what the run writes."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise


def _lock(descriptor: int, folder: Path, work: str, waits: bool) -> bool:
    """Take the lock; False, with a warning, where there is none.

    Raises:
        UserError: another owner holds it, and this one does not wait, or it is this thread.
    """
    reason: object = "this system has no flock"
    if fcntl is not None:
        try:
            if waits and _is_own(descriptor):
                raise UserError(
                    f"{folder}: this thread is writing into this folder already; save after that "
                    "has ended, or into another folder"
                )
            if waits:
                _wait(descriptor, folder, work)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise UserError(
                f"{folder}: {_other(descriptor, work)}; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
    warnings.warn(
        f"{folder}: cannot be locked ({reason}); make sure that no other {work} writes there",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _is_own(descriptor: int) -> bool:
    """Whether this thread holds the lock: to wait for it would have no end."""
    status, own = os.fstat(descriptor), threading.get_ident()
    return any(
        thread == own and os.path.samestat(os.fstat(held), status)
        for held, thread in list(_held.items())
    )


def _wait(descriptor: int, folder: Path, work: str) -> None:
    """Take the lock when it is free; the longer the wait, the rarer the looks."""
    assert fcntl is not None
    pause, until = 0.001, time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    warnings.warn(
        f"{folder}: {_other(descriptor, work)}; waiting for its end", RuntimeWarning, stacklevel=2
    )
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _other(descriptor: int, work: str) -> str:
    return f"another {work} is writing into this folder{_holder(descriptor)}"


def _holder(descriptor: int) -> str:
    """`` (process 12)``, as the file of the lock tells; nothing before the holder wrote it."""
    words = os.pread(descriptor, 300, 0).decode(errors="replace").split()
    if len(words) != 2 or not words[0].isdecimal():
        return ""
    host = "" if words[1] == socket.gethostname() else f" on {words[1]}"
    return f" (process {words[0]}{host})"
