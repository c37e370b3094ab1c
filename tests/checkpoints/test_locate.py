"""Where a named model lies."""

import os
from pathlib import Path

import pytest

from variant import UserError
from variant.checkpoints.locate import (
    ASSETS,
    HUB_FILES,
    check_path,
    fetched,
    is_hub_id,
    locate,
    packaged_models,
)


@pytest.mark.parametrize("name", packaged_models())
def test_a_model_of_the_package_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(name) == ASSETS / name
    assert (locate(name) / "model.safetensors").is_file()
    assert locate(name, subfolder="inner") == ASSETS / name / "inner"
    # A folder of that name in the working folder comes first.
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    assert str(locate(name)) == name


def test_a_preset_is_no_model():
    with pytest.raises(UserError, match=r"^var-d16: is a preset of `variant plan` .* without wei"):
        locate("var-d16")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        (Path("owner/name"), True),
        ("owner", False),
        ("a/b/c", False),
        ("./name", False),
        ("/name", False),
        ("~/name", False),
        *((f"owner/name{ending}", False)
          for ending in (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json")),
        ("owner/name.v2", True),
    ],
)  # fmt: skip
def test_what_counts_as_the_id_of_a_repository(name, is_one):
    assert is_hub_id(name) is is_one


def test_what_counts_as_a_path():
    for path in ("a", Path("a")):
        assert check_path("op", "model", path) is path
    for other in (None, 3, b"a", Bytes()):
        with pytest.raises(TypeError, match=r"^op: model must be a path or a name; got "):
            check_path("op", "model", other)
    with pytest.raises(ValueError, match=r'^op: model must not be empty; "." is the current fold'):
        check_path("op", "model", "")


class Bytes(os.PathLike):
    def __fspath__(self):
        return b"a"


def test_a_folder_is_where_its_path_says(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path
    assert locate(tmp_path, "inner") == tmp_path / "inner"
    assert locate(str(tmp_path), "none") == tmp_path / "none"  # its reader says what is missing
    for name in ("no such model", str(tmp_path / "none"), "owner/name.pth"):
        with pytest.raises(UserError, match="no such model: neither a folder nor one of this pack"):
            locate(name)


def test_a_subfolder_lies_within_the_folder(tmp_path):
    for inner in ("/a", "..", "a/../b", "a\\b"):
        with pytest.raises(ValueError, match="subfolder must lie within the model's folder; got "):
            locate(tmp_path, inner)
    with pytest.raises(TypeError, match="subfolder must be the name of a folder; got 3"):
        locate(tmp_path, 3)


def test_a_snapshot_of_a_repository_has_the_files_of_a_model(tmp_path, monkeypatch):
    calls = []

    def snapshot(name, **options):
        calls.append((name, options))
        if "error" in options:
            raise options["error"]
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name", "inner", revision="main") == tmp_path / "inner"
    [(name, options)] = calls
    assert (name, options["revision"]) == ("owner/name", "main")
    patterns = [f"inner/{file}" for file in HUB_FILES]
    assert options["allow_patterns"] == patterns
    assert fetched("owner/name") == tmp_path
    assert calls[1][1]["allow_patterns"] == HUB_FILES
    text = "owner/name: not a folder, and the Hub cannot provide it: "
    for error, reason in ((OSError("first\nsecond"), "first$"), (ValueError(), "ValueError$")):
        with pytest.raises(UserError, match=text + reason):
            locate("owner/name", error=error)
    # What is there is not fetched.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    del calls[:]
    assert fetched("owner/name") == "owner/name"
    assert fetched("name.pth") == "name.pth"
    assert calls == []
