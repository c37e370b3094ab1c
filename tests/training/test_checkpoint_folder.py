"""Checkpoints that several processes write: whole or absent, checked, readable by any number."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.forked_program import run_forked
from variant.errors import UserError
from variant.training import checkpoint_folder
from variant.training.checkpoint_folder import (
    check_folder,
    read_contents,
    read_into,
    remove_folder,
    stored_tensors,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which two processes wrote checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "best").write_bytes(b"best weights")
    places = folder, tmp_path_factory.mktemp("meeting")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths)}
    done = run_forked(HERE / "folder_ranks.py", *places, env=os.environ | variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def copied(written, tmp_path):
    shutil.copytree(written / "step-1", tmp_path / "step-1")
    return tmp_path / "step-1"


def test_complete_checkpoints_alone_are_left(written):
    names = sorted(path.name for path in written.iterdir())
    assert names == ["best", "step-1", "step-3", "whole.pt"]
    assert (written / "step-1" / "best.safetensors").read_bytes() == b"best weights"


def test_one_process_reads_what_two_wrote_while_they_went_on(written):
    folder, whole = written / "step-1", torch.load(written / "whole.pt", weights_only=True)
    check_folder(folder)
    assert read_contents(folder) == {"step": 1, "rank": 0}
    tensors = {name: torch.empty_like(value) for name, value in whole.items()}
    read_into(folder, tensors)
    for name, value in whole.items():
        assert torch.equal(tensors[name], value), name
    assert {name: value.shape for name, value in stored_tensors(folder).items()} == {
        name: value.shape for name, value in whole.items()
    }
    assert len(list(folder.glob("__*.distcp"))) == 2


def test_tensors_of_another_model_are_refused(copied):
    for tensors, found in (
        ({"odd": torch.zeros(5, 4)}, r"odd must be \(5, 4\); it has \(5, 3\)"),
        ({"even": torch.zeros(2)}, r"even must be \(2,\); it has none"),
    ):
        with pytest.raises(UserError, match=found):
            read_into(copied, tensors)


def test_a_flipped_bit_in_any_file_is_refused_by_name(copied):
    draw = random.Random(3)
    names = check_folder(copied)
    assert len(names) == 4
    for name in [*names, "manifest.json"]:
        path = copied / name
        whole = path.read_bytes()
        for _ in range(8):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                check_folder(copied)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole[:-2])
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            check_folder(copied)
        path.unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            check_folder(copied)
        path.write_bytes(whole)
    check_folder(copied)


def test_metadata_that_would_run_code_is_refused(copied):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(copied / "harm"),)

    (copied / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"\.metadata: is damaged: names posix.mkdir"):
        stored_tensors(copied)
    assert not (copied / "harm").exists()


def test_a_manifest_that_names_other_folders_is_refused(copied, monkeypatch):
    path = copied / "manifest.json"
    files = json.loads(path.read_text())["files"] | {"../best": "0"}
    text = json.dumps(files)
    own = checkpoint_folder.hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{{"files": {text}, "sha256": "{own}"}}')
    with pytest.raises(UserError, match=r"manifest.json: is damaged: it does not list the files"):
        check_folder(copied)


def test_a_removed_checkpoint_is_none_at_any_moment(copied, monkeypatch):
    seen = []
    monkeypatch.setattr(
        checkpoint_folder.shutil,
        "rmtree",
        lambda path, **rest: seen.append((path.name, copied.exists())),
    )
    remove_folder(copied)
    assert [re.sub(r"\d{9,}", "N", name) for name, _ in seen] == [".step-1.N.tmp"]
    assert not seen[0][1]
    remove_folder(copied)  # there is none
    shutil.copytree(copied.with_name(seen[0][0]), copied)
    remove_folder(copied)  # beside what a process left that was killed as it removed the first
    assert len({name for name, _ in seen}) == 2
