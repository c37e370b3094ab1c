"""The lock of a run's folder, and what killed runs leave behind."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from variant import folder_lock
from variant.errors import UserError
from variant.folder_lock import LOCK_NAME, clear_leftovers, locked_folder, saving

HOLD = """
import sys, time
from pathlib import Path
from variant.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_refused_at_once_in_one_line(tmp_path):
    with locked_folder(tmp_path):
        with (
            pytest.raises(UserError, match="another training is writing") as caught,
            locked_folder(tmp_path),
        ):
            pytest.fail("two at once")
        assert str(caught.value).startswith(f"{tmp_path}: ")
        assert f"(process {os.getpid()})" in str(caught.value)
        assert "\n" not in str(caught.value)
    with locked_folder(tmp_path) as is_locked:
        assert is_locked


def test_a_save_waits_for_the_one_before(tmp_path):
    order, inside = [], threading.Event()

    def save():
        inside.set()
        with saving(tmp_path / "folder"):
            order.append("second")

    with saving(tmp_path / "folder") as is_locked:
        assert is_locked
        thread = threading.Thread(target=save)
        thread.start()
        inside.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_saves_into_two_folders_never_wait_for_each_other(tmp_path):
    """They remove the folders, which stay empty, while others are about to lock them."""
    pairs = (tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a", tmp_path / "a")
    saves = []

    def save(folders):
        for _ in range(20):
            with saving(*folders):
                saves.append(threading.get_ident())
                time.sleep(0)

    threads = [threading.Thread(target=save, args=(pair,), daemon=True) for pair in pairs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(saves) == 4 * 20


def test_a_long_wait_is_told(tmp_path, monkeypatch):
    told, held = threading.Event(), threading.Event()
    texts = []

    def hold():
        with saving(tmp_path):
            held.set()
            told.wait(20)

    def warn(text, *rest, **options):
        texts.append(text)
        told.set()

    monkeypatch.setattr(folder_lock, "PATIENCE", 0.01)
    monkeypatch.setattr(folder_lock.warnings, "warn", warn)
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with saving(tmp_path) as is_locked:
        assert is_locked
    thread.join()
    assert texts == [
        f"{tmp_path}: another saving process is writing into this folder (process {os.getpid()}); "
        "waiting for its end"
    ]


def test_a_save_within_a_save_of_its_thread_is_refused_and_does_not_wait_for_itself(tmp_path):
    """As where a signal comes during a save, and its handler saves too."""
    with (
        saving(tmp_path),
        pytest.raises(UserError, match="this thread is writing into this folder already"),
        saving(tmp_path),
    ):
        pytest.fail("two at once")
    with saving(tmp_path):
        pass


def test_another_name_of_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with (
        locked_folder(tmp_path / "run"),
        pytest.raises(UserError, match="another training is writing"),
        locked_folder(tmp_path / "link"),
    ):
        pytest.fail("two at once")


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(UserError, match=rf"\(process {holder.pid}\)"),
            locked_folder(tmp_path),
        ):
            pytest.fail("two at once")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with locked_folder(tmp_path) as is_locked:
        assert is_locked
    assert not (tmp_path / LOCK_NAME).exists()


def test_of_many_at_once_one_is_in_the_folder(tmp_path):
    """Owners remove the file of the lock while others open it."""
    inside, most, entered = [0], [0], [0]
    guard = threading.Lock()

    def visit():
        for _ in range(60):
            try:
                with locked_folder(tmp_path):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                        entered[0] += 1
                    time.sleep(0)
                    with guard:
                        inside[0] -= 1
            except UserError:
                time.sleep(0)

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert entered[0] > 10


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, None])
def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(folder_lock, "fcntl", None)
    else:
        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with (
        pytest.warns(RuntimeWarning, match=r"cannot be locked .*no other training"),
        locked_folder(tmp_path) as is_locked,
    ):
        assert not is_locked


def test_new_folders_that_stay_empty_are_removed(tmp_path):
    with locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    (tmp_path / "old").mkdir()
    with locked_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "text"])
def test_a_lock_file_of_another_kind_neither_blocks_nor_is_written_to(tmp_path, kind):
    path, other = tmp_path / LOCK_NAME, tmp_path / "other"
    other.write_text("precious")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(other)
    else:
        path.write_text("of a killed run \0\xff")
        with locked_folder(tmp_path) as is_locked:
            assert is_locked
        return
    with (
        pytest.raises(UserError, match=r"must be a regular file|cannot be written") as caught,
        locked_folder(tmp_path),
    ):
        pytest.fail("taken as a lock")
    assert "\n" not in str(caught.value)
    assert other.read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "file/run"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written: "),
        locked_folder(tmp_path / name),
    ):
        pytest.fail("locked")


def test_a_save_into_what_is_no_path_is_one_line(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for folder in (Path("out"), tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match="cannot be written: ") as caught, saving(folder):
            pytest.fail("saved")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be written: No such"), locked_folder(Path("out")):
        pytest.fail("locked")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_lock.os, call, full)
    monkeypatch.setattr(folder_lock, "TRIES", 3)
    with (
        pytest.raises(UserError, match="run: cannot be written: No space left") as caught,
        locked_folder(tmp_path / "new" / "run"),
    ):
        pytest.fail("locked")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with locked_folder(tmp_path / "new" / "run") as is_locked:
        assert is_locked


def test_a_file_that_is_another_one_each_time_is_given_up(tmp_path, monkeypatch):
    """Some file systems number their files anew at every look."""
    monkeypatch.setattr(folder_lock.os.path, "samestat", lambda *_: False)
    monkeypatch.setattr(folder_lock, "TRIES", 3)
    with (
        pytest.raises(UserError, match="is another one each time; choose a folder"),
        locked_folder(tmp_path),
    ):
        pytest.fail("locked")


def test_leftovers_of_the_run_s_files_are_removed_and_no_others(tmp_path):
    left = [".vae-last.pt.123.tmp", ".vae-last.pt.4.5.tmp", ".config.json.123.tmp"]
    kept = ["vae-last.pt", ".other.pt.123.tmp", ".vae-last.pt.tmp~", "x.vae-last.pt.1.tmp"]
    for name in left + kept:
        (tmp_path / name).write_text("")
    removed = clear_leftovers(tmp_path, ("vae-last.pt", "config.json"))
    assert {path.name for path in removed} == set(left)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


# The system kills a process that writes past its limit; Python ignores that signal by itself.
KILLED_WRITE = """
import resource, signal, sys
from pathlib import Path
import torch
from variant.files import save_pickle, save_safetensors
save = save_pickle if sys.argv[2] == "pickle" else save_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save(Path(sys.argv[1]), {"weights": torch.ones(100_000)})
"""


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_what_a_killed_write_leaves_is_removed(tmp_path, kind):
    file = tmp_path / "file"
    file.write_bytes(b"before")
    command = [sys.executable, "-c", KILLED_WRITE, str(file), kind]
    assert subprocess.run(command, check=False).returncode == -signal.SIGXFSZ
    assert len(list(tmp_path.iterdir())) > 1, "killed before the write began"
    clear_leftovers(tmp_path, ["file"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"before"
