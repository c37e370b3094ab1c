"""Atomic writes, and texts and JSON that are read."""

import dataclasses
import errno
import json
import os
import random
import secrets
import stat
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from variant import files
from variant.errors import UserError
from variant.files import (
    atomic_write,
    read_safetensors,
    save_safetensors,
    temporary_name,
    write_safetensors,
)
from variant.paths import read_json, read_text
from variant.tensor_files import stored_pickle
from variant.training import tokenize
from variant.training.checkpointer import Checkpointer


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "a" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("before")
    link.symlink_to(target)
    with atomic_write(link) as temporary:
        temporary.write_text("after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("disks", [1, 2])
def test_a_finished_file_is_put_in_place_as_a_written_one(tmp_path, monkeypatch, disks):
    target, link, finished = tmp_path / "a" / "target", tmp_path / "link", tmp_path / "finished"
    replace = os.replace

    def replace_on_one_disk(source, to):
        if disks == 2 and os.path.dirname(source) != os.path.dirname(to):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, to)

    def put(text):
        finished.write_text(text)
        files.put_in_place(finished, link)
        assert not finished.exists()
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    monkeypatch.setattr(os, "replace", replace_on_one_disk)
    target.parent.mkdir()
    link.symlink_to("a/target")
    put("first")  # the link names no file yet
    target.chmod(0o640)
    put("second")
    assert link.is_symlink()
    assert target.read_text() == "second"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("content", ["/dev/full", "loop"])
def test_a_finished_file_replaces_no_device_but_a_link_to_itself(tmp_path, content):
    path, finished = tmp_path / "loop", tmp_path / "finished"
    path.symlink_to(content)
    finished.write_text("text")
    if content == "loop":
        files.put_in_place(finished, path)
        assert path.read_text() == "text"
    else:
        with pytest.raises(UserError, match="loop: cannot be written: is no plain file"):
            files.put_in_place(finished, path)
        assert path.is_symlink()
        assert finished.read_text() == "text"


def test_best_weights_and_a_manifest_are_written_through_a_link(tmp_path):
    """Both appear by the renaming of a finished file."""

    @dataclasses.dataclass
    class Contents:
        shards: str

    (tmp_path / "disk").mkdir()
    for name in ("best", "manifest.json"):
        (tmp_path / "disk" / name).write_text("before")
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    finished = tmp_path / "next"
    finished.write_text("after")
    run = SimpleNamespace(next_best=finished, best=tmp_path / "best", best_sha256="1")
    Checkpointer._keep_next_best(run)
    tokenize._write_manifest(tmp_path, Contents("after"), 0)
    assert {path.name: path.is_symlink() for path in tmp_path.iterdir() if path.is_file()} == {
        "best": True, "manifest.json": True
    }  # fmt: skip
    assert (tmp_path / "disk" / "best").read_text() == "after"
    assert read_json(tmp_path / "disk" / "manifest.json") == {"shards": "after"}


def test_who_may_read_a_file_stays_the_same(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.ones(2)}
    before = os.umask(0o027)
    try:
        save_safetensors(path, tensors)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o400):
            path.chmod(mode)
            save_safetensors(path, tensors)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_new_file_is_for_all_that_the_umask_allows(tmp_path):
    before = os.umask(0)
    try:
        with atomic_write(tmp_path / "new" / "folder" / "a"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "folder" / "a").stat().st_mode) == 0o666


@pytest.mark.parametrize("write", [atomic_write, save_safetensors])
def test_a_durable_file_is_on_the_disk_before_its_name_and_the_name_too(
    tmp_path, monkeypatch, write
):
    path, synced = tmp_path / "a", []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path, path.exists())))

    def written(**options):
        synced.clear()
        if write is save_safetensors:
            save_safetensors(path, {"a": torch.ones(1)}, **options)
        else:
            with atomic_write(path, **options) as temporary:
                temporary.write_text("text")
        return synced

    assert written() == []
    (temporary, was_there), after = written(durable=True)
    assert (temporary.parent, was_there) == (tmp_path, True)
    assert temporary.name.startswith(".a.")
    assert after == (tmp_path, True)


@pytest.mark.parametrize(
    ("is_folder", "error", "raised"),
    [(True, errno.EINVAL, False), (True, errno.ENOTSUP, False), (True, errno.EIO, True),
     (False, errno.EINVAL, True), (False, errno.EIO, True)],
)  # fmt: skip
def test_a_folder_that_cannot_be_synced_is_left(tmp_path, monkeypatch, is_folder, error, raised):
    path = tmp_path if is_folder else tmp_path / "a"
    (tmp_path / "a").touch()
    files.sync(path)

    def fsync(descriptor):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    if raised:
        with pytest.raises(OSError, match=os.strerror(error)):
            files.sync(path)
    else:
        files.sync(path)
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "none")


@pytest.mark.parametrize(
    ("error", "system", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left"), None, "No space left"),
        (OSError("without a number"), None, "without a number"),
        (SafetensorError("first\nsecond"), None, "first"),
        (SafetensorError("first\nsecond"), "No space left", "No space left"),
        (
            RuntimeError("inline_container.cc: unexpected pos\nsecond"),
            None,
            "inline_container.cc: u",
        ),
        (RuntimeError("inline_container.cc"), "No space left", "No space left"),
    ],
)
def test_why_a_file_could_not_be_written(tmp_path, monkeypatch, error, system, reason):
    monkeypatch.setattr(files, "_reason_of_system", lambda temporary: system)
    caught = pytest.raises(UserError, match=f"a: cannot be written: {reason}")
    with caught as told, atomic_write(tmp_path / "a"):
        raise error
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_block_stay_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^another$"), atomic_write(tmp_path / "a"):
        raise RuntimeError("another")


def test_the_system_tells_why_a_file_cannot_be_longer(tmp_path):
    assert files._reason_of_system("/dev/full") == os.strerror(errno.ENOSPC)
    assert files._reason_of_system(tmp_path / "a") is None
    assert (tmp_path / "a").stat().st_size == 2 * files.PROBE_BYTES


def test_a_temporary_name_has_twelve_digits(monkeypatch):
    for number, digits in ((5, "000000000005"), (-1, "999999999999")):
        monkeypatch.setattr(secrets, "randbelow", lambda end, n=number: n % end)
        assert temporary_name(files.Path("folder/a.b")) == files.Path(f"folder/.a.b.{digits}.tmp")


def test_metadata_are_sorted_texts_in_any_script(tmp_path):
    path, texts = tmp_path / "a.safetensors", {"z": "é", "日本": "ok", "a": '"'}
    save_safetensors(path, {"x": torch.ones(2)}, metadata=texts)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert content[8:9] == b"{"
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    assert list(metadata) == sorted(["format", "sum64", *texts])
    assert {key: metadata[key] for key in texts} == texts
    assert torch.equal(read_safetensors(path)["x"], torch.ones(2))


def test_the_umask_stays_while_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("of other threads too"))
    save_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})


def test_two_threads_write_one_path(tmp_path):
    path, meet = tmp_path / "a.safetensors", threading.Barrier(2, timeout=20)
    errors = []

    def write(value):
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(value)
                meet.wait()
                assert temporary.read_text() == value
            save_safetensors(path, {"a": torch.ones(2)})
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=write, args=(value,)) for value in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert torch.equal(read_safetensors(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_process_number_share_no_file(tmp_path):
    """As on two machines with one file system, or in two containers."""
    path, state = tmp_path / "a", random.getstate()
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        write_safetensors(first, {"a": torch.ones(2)})
        assert second.read_text() == "second"
    assert torch.equal(read_safetensors(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]
    assert random.getstate() == state


def test_weights_are_not_copied_to_be_written(tmp_path, monkeypatch):
    """A model may take more than half of the memory; only a second name of a tensor is copied."""
    written, save = {}, files.save_file
    monkeypatch.setattr(
        files,
        "save_file",
        lambda tensors, *rest, **more: written.update(tensors) or save(tensors, *rest, **more),
    )
    one, other = torch.ones(3), torch.zeros(2)
    save_safetensors(tmp_path / "a", {"one": one, "other": other, "tied": one})
    assert (written["one"] is one, written["other"] is other) == (True, True)
    assert written["tied"].data_ptr() != one.data_ptr()
    assert torch.equal(read_safetensors(tmp_path / "a")["tied"], one)


def test_a_temporary_name_that_is_taken_is_left_alone(tmp_path, monkeypatch):
    numbers = iter([7, 7, 8])
    monkeypatch.setattr(secrets, "randbelow", lambda end: next(numbers))
    taken = temporary_name(tmp_path / "a")
    taken.symlink_to("other")
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("text")
    assert taken.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a", taken.name}


def test_what_is_no_plain_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no plain file"), atomic_write(tmp_path / "pipe"):
        pytest.fail("was not refused")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_that_was_removed_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"^x: cannot be written: the current folder was removed$"):
        save_safetensors("x", {"a": torch.ones(1)})


@pytest.mark.parametrize("name", ["a\0b", "a\udc00b\ud800"])
def test_what_is_no_path_of_this_system_is_named(tmp_path, name):
    caught = pytest.raises(UserError, match=r"a\\.*: cannot be written: ")
    with caught as refused, atomic_write(tmp_path / name):
        pytest.fail("was not refused")
    str(refused.value).encode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ['{"a": 1, "b": 2, "a": 1}', '[{"x": {"a": 1, "a": {}}}]', '{"a": 1, "\\u0061": 2}']
)
def test_a_key_that_comes_twice_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json: .*an object has the key a twice"):
        read_json(path)
    path.write_text('{"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {}}', "utf-8-sig")
    assert read_json(path) == {"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {}}


def test_a_key_that_comes_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{" + ", ".join(f'"{index}": 1' for index in [*range(10**5), 99_999]) + "}")
    started = time.process_time()
    with pytest.raises(UserError, match="the key 99999 twice"):
        read_json(path)
    assert time.process_time() - started < 5  # where each key is sought among all: 10 minutes


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(path) == "{}"
    path.write_bytes("{}".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.json: cannot be read as text in UTF-8"):
        read_text(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")

    def pread(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(UserError, match=r"a\.pth: cannot be read: Input/output error"):
        stored_pickle(tmp_path / "a.pth")
