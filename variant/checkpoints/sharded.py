"""The weights of a folder: one .safetensors file, several with an index, or a pickle.

An index of Hugging Face, ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, maps
every key to the file (shard) of the same folder that holds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variant.errors import UserError
from variant.paths import path_kind, read_json, shown
from variant.tensor_files import stored_pickle, stored_safetensors

WEIGHTS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
INDEX_ENDING = ".index.json"
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    WEIGHTS_NAME + INDEX_ENDING,
    PICKLE_NAME,
    PICKLE_NAME + INDEX_ENDING,
)


def shards_beside(index: Path) -> list[Path]:
    """The files in the folder of an index that may be its shards, in order."""
    return sorted(path for path in index.parent.iterdir() if path.suffix == _ending(index))


def _ending(index: Path) -> str:
    """That of the shards."""
    return ".bin" if index.name.endswith(f".bin{INDEX_ENDING}") else ".safetensors"


def find_weights(folder: Path) -> Path | None:
    """The file of a folder's weights, or the index of its shards; None where there is neither."""
    paths = (folder / name for name in WEIGHTS_NAMES)
    return next((path for path in paths if path.is_file()), None)


def read_weights_file(path: Path) -> dict[Any, Any]:
    """The content of a .safetensors file, of all shards of an index, or of a pickle.

    Returns:
        the dictionary, of tensors by key except in a pickle, which may hold anything. The values of
        tensors are read later (:class:`variant.tensor_files.StoredTensor`).
    Raises:
        UserError: missing or damaged, or an index that does not fit its shards.
    """
    if path.name.endswith(INDEX_ENDING):
        return _read_shards(path)
    return _read_file(path)


def _read_file(path: Path) -> dict[Any, Any]:
    return stored_safetensors(path) if path.suffix == ".safetensors" else stored_pickle(path)


def _read_shards(index: Path) -> dict[Any, Any]:
    shard_of = _weight_map(index)
    tensors: dict[Any, Any] = {}
    for name in dict.fromkeys(shard_of.values()):
        path = index.parent / name
        if path_kind(path) is None:
            raise UserError(
                f"{shown(index)}: the shard {shown(name)} is missing; it should lie beside it"
            )
        shard = _read_file(path)
        for key in shard:
            if shard_of.get(key) != name:
                other = f"has it in {shown(shard_of[key])}" if key in shard_of else "lacks it"
                raise UserError(
                    f"{shown(index)}: {shown(name)} holds {shown(str(key))}, but the index {other}"
                )
        tensors |= shard
    missing = sorted(shard_of.keys() - tensors.keys())
    if missing:
        name = shard_of[missing[0]]
        raise UserError(
            f"{shown(index)}: {shown(name)} lacks {shown(missing[0])}, which it has by the index"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each key.

    Raises:
        UserError: no readable index, a key twice, or a shard that is no file name of this folder.
    """
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f'{shown(index)}: must map keys to files under "weight_map"; it does not')
    for name in shard_of.values():
        # A path could lead out of the folder, to files that the user did not mean to load.
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(_ending(index)):
            raise UserError(
                f"{shown(index)}: a shard must be the name of a {_ending(index)} file in the same "
                f"folder; got {name!r:.200}"
            )
    return shard_of
