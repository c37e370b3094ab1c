"""Atomic writes."""

import os

import pytest

from variant.errors import UserError
from variant.files import atomic_write


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


def test_what_is_no_plain_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no plain file"), atomic_write(tmp_path / "pipe"):
        pytest.fail("was not refused")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
