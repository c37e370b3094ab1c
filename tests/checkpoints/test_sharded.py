"""Weights in several files: the index, its shards, and what does not fit."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from variant.checkpoints.sharded import find_weights, read_weights_file, shards_beside
from variant.errors import UserError

ONE, TWO = {"a": torch.ones(2)}, {"b": torch.zeros(3), "c": torch.ones(1)}
WHERE = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


def index_of(folder, shard_of=WHERE, name="model.safetensors.index.json", **shards):
    """Writes an index, and the shards that it needs or others."""
    for stem, tensors in ({"one": ONE, "two": TWO} | shards).items():
        if tensors is not None:
            save_file(tensors, folder / f"{stem}.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder / name


def test_all_shards_are_read_in_the_order_of_the_index(tmp_path):
    index = index_of(tmp_path)
    stored = read_weights_file(index)
    assert list(stored) == ["a", "b", "c"]
    assert torch.equal(stored["b"].read(), TWO["b"])
    assert list(read_weights_file(tmp_path / "two.safetensors")) == ["b", "c"]
    assert [path.name for path in shards_beside(index)] == ["one.safetensors", "two.safetensors"]


def test_shards_of_an_index_of_pickles(tmp_path):
    torch.save(ONE, tmp_path / "one.bin")
    torch.save(TWO, tmp_path / "two.bin")
    where = {key: name.replace(".safetensors", ".bin") for key, name in WHERE.items()}
    index = index_of(tmp_path, where, "pytorch_model.bin.index.json")
    assert list(read_weights_file(index)) == ["a", "b", "c"]
    assert [path.name for path in shards_beside(index)] == ["one.bin", "two.bin"]
    with pytest.raises(UserError, match=r"must be the name of a \.bin file in the same folder"):
        read_weights_file(index_of(tmp_path, WHERE, "pytorch_model.bin.index.json"))


def test_the_first_of_four_names_is_the_file_of_the_weights(tmp_path):
    assert find_weights(tmp_path) is None
    (tmp_path / "model.safetensors").mkdir()  # no file
    for name in ("pytorch_model.bin.index.json", "pytorch_model.bin",
                 "model.safetensors.index.json"):  # fmt: skip
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path) == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("shard_of", "shards", "message"),
    [
        (WHERE, {"two": None}, "the shard two.safetensors is missing; it should lie beside it"),
        (WHERE | {"d": "two.safetensors"}, {},
         "two.safetensors lacks d, which it has by the index"),
        (WHERE, {"one": ONE | {"d": torch.ones(1)}},
         "one.safetensors holds d, but the index lacks it"),
        (WHERE, {"one": ONE | {"b": torch.ones(1)}},
         "one.safetensors holds b, but the index has it in two.safetensors"),
        ({}, {}, 'must map keys to files under "weight_map"; it does not'),
        ([1], {}, 'must map keys to files under "weight_map"; it does not'),
        ({"a": "../one.safetensors"}, {}, "a shard must be the name of a .safetensors file in the "
         "same folder; got '../one.safetensors'"),
        ({"a": "x\\one.safetensors"}, {}, "a shard must be the name of a .safetensors file"),
        ({"a": "one.bin"}, {}, "a shard must be the name of a .safetensors file"),
        ({"a": 3}, {}, "a shard must be the name of a .safetensors file in the same folder; got 3"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_is_refused(tmp_path, shard_of, shards, message):
    index = index_of(tmp_path, shard_of, **shards)
    with pytest.raises(UserError, match=re.escape(f"{index}: {message}")):
        read_weights_file(index)


def test_an_index_that_is_no_object_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(UserError, match='must map keys to files under "weight_map"'):
        read_weights_file(index)
