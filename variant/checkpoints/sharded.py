"""The weights of a folder: one .safetensors file, several with an index, or a pickle.

The index of Hugging Face, ``model.safetensors.index.json``, maps every key to the file (shard) of
the same folder that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from variant.errors import UserError
from variant.files import is_mmapped, open_safetensors, read_pickle

WEIGHTS_NAME = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_ENDING
PICKLE_NAME = "pytorch_model.bin"
WEIGHTS_NAMES = (WEIGHTS_NAME, INDEX_NAME, PICKLE_NAME)


class Tensors(Protocol):
    """The tensors of a file by key, each read when it is asked for."""

    def keys(self) -> Collection[str]: ...

    def get_tensor(self, key: str) -> Tensor: ...


@dataclass(frozen=True)
class _Pickled:
    state: Mapping[str, Tensor]

    def keys(self) -> Collection[str]:
        return self.state.keys()

    def get_tensor(self, key: str) -> Tensor:
        return self.state[key]


@dataclass(frozen=True)
class _Sharded:
    shard_of: Mapping[str, str]
    shards: Mapping[str, Any]

    def keys(self) -> Collection[str]:
        return self.shard_of.keys()

    def get_tensor(self, key: str) -> Tensor:
        return self.shards[self.shard_of[key]].get_tensor(key)


def find_weights(folder: Path) -> Path | None:
    """The file of a folder's weights, or the index of its shards; None where there is neither."""
    paths = (folder / name for name in WEIGHTS_NAMES)
    return next((path for path in paths if path.is_file()), None)


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[Tensors, bool]]:
    """The tensors of a .safetensors file, of an index's shards or of a pickle, within the block.

    Yields:
        the tensors, and whether they are views of memory-mapped files.
    Raises:
        UserError: missing or damaged, not a state dict, or an index that does not fit its shards.
    """
    if path.name.endswith(INDEX_ENDING):
        with _open_shards(path) as tensors:
            yield tensors, True
    elif path.suffix == ".safetensors":
        with open_safetensors(path) as tensors:
            yield tensors, True
    else:
        state = read_pickle(path)
        wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
        if wrong or not all(isinstance(key, str) for key in state):
            raise UserError(f"{path}: must hold a state dict of tensors; got keys {wrong[:5]}")
        yield _Pickled(state), is_mmapped(path)


def read_sharded(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards of an index.  Raises: UserError, see :func:`open_weights`."""
    with _open_shards(index) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


@contextmanager
def _open_shards(index: Path) -> Iterator[_Sharded]:
    shard_of = _weight_map(index)
    with ExitStack() as stack:
        shards: dict[str, Any] = {}
        for name in dict.fromkeys(shard_of.values()):
            path = index.parent / name
            if not path.is_file():
                raise UserError(f"{index}: the shard {name} is missing; it should lie beside it")
            shards[name] = stack.enter_context(open_safetensors(path))
            keys = set(shards[name].keys())
            for key in keys:
                if shard_of.get(key) != name:
                    other = f"assigns it to {shard_of[key]}" if key in shard_of else "lacks it"
                    raise UserError(f"{index}: {name} holds {key!r}, but the index {other}")
            missing = next(
                (k for k, shard in shard_of.items() if shard == name and k not in keys), None
            )
            if missing is not None:
                raise UserError(f"{index}: {name} lacks {missing!r}, which the index assigns to it")
        yield _Sharded(shard_of, shards)


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each key.

    Raises:
        UserError: no readable index, a key twice, or a shard that is no file name of this folder.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise UserError(f"{index}: has {key!r} twice")
            result[key] = value
        return result

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read as JSON: {error}") from error
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f'{index}: must map keys to files under "weight_map"; it does not')
    for name in shard_of.values():
        # A path could lead out of the folder, to files that the user did not mean to load.
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: a shard must be the name of a .safetensors file in the same folder; "
                f"got {name!r}"
            )
    return shard_of
