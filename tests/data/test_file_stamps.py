"""Stamps of image files: what tells that they were replaced by others of their sizes."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
from PIL import Image

from variant.data import file_stamps as module
from variant.data.config import DataSection
from variant.data.file_stamps import SAMPLED, SAMPLED_BYTES, FileStamps, compare_stamps, file_stats
from variant.data.sources import open_data
from variant.errors import UserError


def file_stamps(parts):
    return module.file_stamps(parts, {part: file_stats(paths) for part, paths in parts.items()})


def compare(before, now, warns=True):
    compare_stamps("run", "was trained with", before, now, "do that", warns=warns)


def files(folder, count):
    (folder / "a").mkdir(parents=True)
    paths = [folder / "a" / f"{index:04d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(b"%06d" % index)
    return paths


def test_a_bounded_number_of_files_is_read_from_the_first_to_the_last(tmp_path):
    paths = files(tmp_path, 10 * SAMPLED)
    contents = file_stamps({"train": paths, "held_out": paths[:3]}).contents
    names = sorted(contents)
    assert len(names) == SAMPLED + 3
    assert names[:3] == [f"held_out/a/{index:04d}.png" for index in range(3)]
    assert names[3] == "train/a/0000.png"
    assert names[-1] == f"train/a/{10 * SAMPLED - 1:04d}.png"


def test_replaced_files_are_named_and_others_are_not_compared(tmp_path):
    paths = files(tmp_path, 5)
    before = file_stamps({"train": paths})
    with warnings.catch_warnings(action="error"):
        compare(before, file_stamps({"train": paths}))
    times = paths[2].stat().st_mtime_ns
    paths[2].write_bytes(b"000009")
    os.utime(paths[2], ns=(times, times))
    now = file_stamps({"train": paths})
    assert now.times == before.times
    message = (
        r"^run: was trained with other images: the contents of train/a/0002\.png were replaced"
    )
    with pytest.raises(UserError, match=message + "; restore them, or do that$"):
        compare(before, now)
    with warnings.catch_warnings(action="error"):
        compare(FileStamps(), now)
        compare(before, FileStamps({}, before.times))


def test_every_time_counts_and_no_place(tmp_path):
    paths = files(tmp_path / "x", 10 * SAMPLED)
    before = file_stamps({"train": paths})
    os.rename(tmp_path / "x", tmp_path / "y")
    moved = [tmp_path / "y" / "a" / path.name for path in paths]
    assert file_stamps({"train": moved}) == before
    os.utime(moved[1], ns=(0, -5))  # not among those that are read
    now = file_stamps({"train": moved})
    assert now.contents == before.contents
    assert now.times != before.times
    with pytest.warns(RuntimeWarning, match=rf"^run: .* {SAMPLED} of them were compared"):
        compare(before, now)
    with warnings.catch_warnings(action="error"):
        compare(before, now, warns=False)


@pytest.mark.parametrize("time", [2**63 + 5, -(2**60)])
def test_a_time_that_is_no_positive_int64_counts(tmp_path, time):
    paths = files(tmp_path, 2)
    before = file_stamps({"train": paths})
    try:
        os.utime(paths[0], ns=(0, time))
    except OSError:
        pytest.skip("the file system has no such times")
    assert file_stamps({"train": paths}).times != before.times


def test_huge_and_unreadable_files_and_odd_names_do_no_harm(tmp_path):
    paths = files(tmp_path, 3)
    with paths[0].open("r+b") as file:
        file.truncate(20 * 2**30)  # takes no space on the disk
    paths[1].unlink()
    os.mkfifo(paths[1])
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff\n.png"))
    paths[2].rename(odd)
    stamps = file_stamps({"train": [paths[0], paths[1], odd]})
    assert list(stamps.contents) == ["train/a/0000.png", "train/a/\\xff\n.png"]
    with paths[0].open("r+b") as file:
        file.seek(SAMPLED_BYTES)
        file.write(b"x")
    assert file_stamps({"train": [paths[0], paths[1], odd]}).contents == stamps.contents
    with pytest.raises(UserError, match=r"0002\.png: cannot be read"):
        file_stamps({"train": paths})


def test_a_folder_asks_for_each_file_once(tmp_path, monkeypatch):
    for part in ("train", "held_out"):
        for label in range(2):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / f"class{label}" / "0.png")
    folders = {"train": str(tmp_path / "train"), "held_out": str(tmp_path / "held_out")}
    data = open_data(DataSection("folder", **folders), 8, 3, 0)
    asked, stat = [], Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **how: (asked.append(path), stat(path, **how))[1]
    )
    data.digest()
    data.class_digests()
    data.file_stamps()
    images = [path for path in asked if path.suffix == ".png"]
    assert len(images) == len(set(images)) == 4
    assert "_stats" not in vars(pickle.loads(pickle.dumps(data)))  # workers need none
