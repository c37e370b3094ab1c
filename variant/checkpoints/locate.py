"""The folder of a model by name: a path, a model of the package, or a snapshot from the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from variant.errors import UserError

# Files that are downloaded from a Hub repository; the last is for older ones of the original.
HUB_FILES = ["config.json", "model.safetensors", "pytorch_model.bin"]
ASSETS = Path(__file__).parents[1] / "assets"


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether the name has the form owner/name and no suffix of a weights file."""
    text = os.fspath(name)
    named = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return named and not text.endswith((".pth", ".pt", ".bin", ".safetensors"))


def locate(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The folder of a model: a path, a model of this package, or a snapshot from the Hub.

    Args:
        hub_options: of ``huggingface_hub.snapshot_download``: revision, token and so on.
    Raises:
        UserError: the name is none of the three.
    """
    path = Path(name)
    # os.path and not Path: a name that is too long for a path is no error there.
    if os.path.isfile(path / "config.json"):
        return path
    packaged = sorted(
        folder.name for folder in ASSETS.iterdir() if (folder / "config.json").is_file()
    )
    if str(name) in packaged:
        return ASSETS / str(name)
    text = os.fspath(name)
    if os.path.exists(path):
        return path  # the reader of the folder reports what is missing
    if not is_hub_id(name):
        text = text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"
        raise UserError(
            f"{text}: no such model: neither a folder nor one of this package "
            f"({', '.join(packaged) or 'none'}) nor a Hub id (owner/name)"
        )
    # Imported here: it takes a second, and most calls do not use the Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=HUB_FILES, **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{text}: not a folder, and the Hub cannot provide it: {first}") from error
