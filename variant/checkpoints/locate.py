"""The folder of a model by name: a path, a model of the package, or a snapshot from the Hub."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from variant.errors import UserError
from variant.models.presets import VAR_PRESETS
from variant.paths import path_kind, shown
from variant_kernels.arguments import typed

# Files that are downloaded from a Hub repository: the model folder's, shards with their index, and
# the pickle of older repositories.
HUB_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*.bin",
]
# A missing file of such a name is not taken for a Hub id.
FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json")
ASSETS = Path(__file__).parents[1] / "assets"


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether the name has the form owner/name and no suffix of a weights file."""
    text = os.fspath(name)
    named = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return named and not text.endswith(FILE_ENDINGS)


def packaged_models() -> list[str]:
    """Names of the models in this package."""
    return sorted(f.name for f in ASSETS.iterdir() if (f / "config.json").is_file())


def check_path(op: str, name: str, value: object) -> str | os.PathLike[str]:
    """The value, a path or the name of a model.

    Raises:
        TypeError: it is neither.  ValueError: it is empty: a variable that was not set would be the
            current folder.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{op}: {name} must be a path or a name; got {typed(value)}")
    if not os.fspath(value):
        raise ValueError(f'{op}: {name} must not be empty; "." is the current folder')
    return value


def locate(name: str | os.PathLike[str], subfolder: str | None = None, **hub_options: Any) -> Path:
    """The folder of a model: a path, a model of this package, or a snapshot from the Hub.

    Args:
        subfolder: of the folder or repository, in which the model lies.
        hub_options: of ``huggingface_hub.snapshot_download``: revision, token and so on.
    Raises:
        ValueError: the subfolder is not within the folder.
        UserError: the name is none of the three.
    """
    inner = _inner(subfolder)
    path = Path(name)
    if path_kind(path / inner / "config.json") is not None:
        return path / inner  # the reader of the folder looks at the files
    packaged = packaged_models()
    if str(name) in packaged:
        return ASSETS / str(name) / inner
    text = os.fspath(name)
    if path_kind(path) is not None:
        return path / inner  # the reader of the folder reports what is missing
    if text in VAR_PRESETS:
        raise UserError(
            f"{shown(text)}: is a preset of `variant plan` and `variant bench`, without weights; "
            "VARiant.from_var_checkpoint and `variant convert` read published weights"
        )
    if not is_hub_id(name):
        raise UserError(
            f"{shown(text)}: no such model: neither a folder nor one of this package "
            f"({', '.join(packaged) or 'none'}) nor a Hub id (owner/name)"
        )
    # Imported here: it takes a second, and most calls do not use the Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [(inner / file).as_posix() for file in HUB_FILES]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, **hub_options)) / inner
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{shown(text)}: not a folder, and the Hub cannot provide it: {first}"
        ) from error


def fetched(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path itself, or the downloaded folder if it is a Hub id."""
    return locate(path) if is_hub_id(path) and path_kind(path) is None else path


def _inner(subfolder: str | None) -> PurePosixPath:
    if subfolder is not None and not isinstance(subfolder, str):
        raise TypeError(f"subfolder must be the name of a folder; got {typed(subfolder)}")
    inner = PurePosixPath(subfolder or "")
    if inner.is_absolute() or ".." in inner.parts or "\\" in (subfolder or ""):
        raise ValueError(f"subfolder must lie within the model's folder; got {typed(subfolder)}")
    return inner
