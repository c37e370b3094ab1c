"""Atomic writes."""

import os

import pytest

from variant.errors import UserError
from variant.files import atomic_write
from variant.paths import read_json


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
    path.write_text('{"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {}}')
    assert read_json(path) == {"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {}}
