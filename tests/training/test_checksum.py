"""The checksum of a checkpoint finds every changed byte."""

import os
import random
import zipfile

import pytest
import torch

from variant.errors import UserError
from variant.training.checksum import TAIL_SIZE, append_checksum, check_checksum


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"step": 3, "weight": torch.arange(3000.0)}, path)
    append_checksum(path)
    return path


def test_a_file_with_a_checksum_is_read_as_before(path):
    check_checksum(path)
    for mmap in (False, True):
        saved = torch.load(path, weights_only=True, mmap=mmap)
        assert saved["step"] == 3
        assert torch.equal(saved["weight"], torch.arange(3000.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_every_flipped_bit_is_found(path):
    whole = path.read_bytes()
    draw = random.Random(0)
    size = len(whole)
    places = [draw.randrange(size) for _ in range(300)]
    places += range(200)  # the header of the first member, and its padding
    places += range(size - TAIL_SIZE - 300, size)  # the directory, its end and the checksum
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last.pt: is damaged") as caught:
            check_checksum(path)
        assert "\n" not in str(caught.value)


def test_cut_lengthened_and_foreign_files_are_found(path):
    whole = path.read_bytes()
    for content in (
        b"",
        b"PK",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:-TAIL_SIZE],
        whole + b"\0",
        whole[TAIL_SIZE:],
        whole[-TAIL_SIZE:],
        b"x" * 1000,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"last.pt: is damaged"):
            check_checksum(path)
    path.unlink()
    with pytest.raises(UserError, match=r"last.pt: no such file"):
        check_checksum(path)
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"last.pt: must be a regular file; it is a named pipe"):
        check_checksum(path)


def test_one_file_has_one_checksum(path):
    with pytest.raises(ValueError, match="must be a zip archive without a comment"):
        append_checksum(path)
