"""Weight files: our model folder, and reading and writing files safely.

A model folder holds ``config.json``, ``model.safetensors`` with keys ``var.*`` and ``vae.*``, and
a model card. Files are never half written: each goes to a temporary name first. They are mapped,
not read: a tensor that is wanted as the file has it stays a view of the file. Pickles are read
with ``weights_only=True``, so that none can run code. The original repository's files: original.py.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from variant.config import VARConfig, VQVAEConfig
from variant.errors import UserError
from variant.mapped import place
from variant.model_card import CARD_NAME, model_card, was_generated
from variant.transformer import VAR
from variant.vqvae import VQVAE

Model = TypeVar("Model", bound=nn.Module)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "variant-1"


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except (SafetensorError, RuntimeError) as error:
            # How safetensors and torch.save report a full or failing disk.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error
        # safetensors writes files that only their owner can read; follow the umask instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_model(
    folder: str | os.PathLike[str],
    var: VAR,
    vae: VQVAE,
    extra: Mapping[str, Any] | None = None,
    model_id: str | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the model card ``README.md``.

    A README.md that somebody else wrote stays as it is.

    Args:
        folder: created where it is missing.
        extra: further keys of config.json, e.g. how the model was trained; plain values.
        model_id: how the card calls the model; None is the folder's name.
    Raises:
        UserError: the folder cannot be written.  TypeError: extra holds what JSON cannot.
    """
    folder = Path(folder)
    tensors = {
        f"{part}.{key}": value.detach().cpu().contiguous()
        for part, module in (("var", var), ("vae", vae))
        for key, value in module.state_dict().items()
    }
    config = {
        **(extra or {}),
        "format": FORMAT,
        "var": var.config.to_dict(),
        "vae": vae.config.to_dict(),
    }
    # Before anything is written: what JSON cannot hold must not leave new weights by an old config.
    text = json.dumps(config, indent=1) + "\n"
    with replacing(folder / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with replacing(folder / CONFIG_NAME) as path:
        path.write_text(text)
    card_path = folder / CARD_NAME
    if was_generated(card_path):
        card = model_card(
            var.config,
            vae.config,
            model_id or folder.resolve().name,
            str(var.head.weight.dtype).removeprefix("torch."),
            config.get("training"),
        )
        with replacing(card_path) as path:
            path.write_text(card)


def save_pickle(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """``torch.save`` under a temporary name, then rename."""
    with replacing(Path(path)) as temporary:
        torch.save(dict(state), temporary)


# --- reading our folder -------------------------------------------------------------------------


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: not a model folder, or not our format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: is not a model folder: it has no {CONFIG_NAME}. Expected a folder written "
            f'by save_pretrained or `variant train`, or the name "digits"'
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise UserError(f'{path}: "format" must be "{FORMAT}"; got {found!r}')
    return config


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The two models of a folder, in eval mode, and its config.json.

    Weights are views of the file where its dtype and the CPU are wanted, else copied one by one:
    memory never holds the file and the result together.

    Args:
        dtype: of the transformer's weights; None keeps the file's.
        device: of both models; None is the CPU.
    Raises:
        UserError: a missing, damaged or foreign file, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = read_config(folder)
    var_config, vae_config = configs_in(folder)
    path = folder / WEIGHTS_NAME
    with _opened(path) as tensors:
        keys = set(tensors.keys())
        if dtype is None and "var.head.weight" in keys:
            dtype = tensors.get_tensor("var.head.weight").dtype

        def part(prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
            return {
                key.removeprefix(prefix): place(tensors.get_tensor(key), dtype, device, mapped=True)
                for key in keys
                if key.startswith(prefix)
            }

        var = build(VAR, var_config, part("var.", dtype), str(path), device)
        vae = build(VQVAE, vae_config, part("vae.", None), str(path), device)
    return var.eval(), vae.eval(), config


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file, mapped.

    Raises:
        UserError: missing or damaged.
    """
    with _opened(Path(path)) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is missing or damaged: {error}") from error


def configs_in(folder: str | os.PathLike[str]) -> tuple[VARConfig, VQVAEConfig]:
    """Sizes of both models of a folder; weights are not read.

    Raises:
        UserError: config.json is missing, foreign, or names a bad value.
    """
    path, config = Path(folder) / CONFIG_NAME, read_config(folder)
    for key in ("var", "vae"):
        if not isinstance(config.get(key), dict):
            raise UserError(f'{path}: must hold the sizes of a model under "{key}"; it has none')
    try:
        return VARConfig.from_dict(config["var"]), VQVAEConfig.from_dict(config["vae"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def build(
    kind: Callable[[Any], Model],
    config: Any,
    state: Mapping[str, Tensor],
    where: str,
    device: torch.device | str | None = None,
) -> Model:
    """A model that takes its tensors from a state dict, without drawing weights first.

    Args:
        device: where the state's tensors are; buffers that it does not hold follow.
    Raises:
        UserError: the state does not hold exactly this model's weights.
    """
    with torch.device("meta"):
        module = kind(config)
    load_state(module, state, where, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # usage statistics of another number of scales: begin anew
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_buffer(leaf, torch.zeros(buffer.shape))
    return module if device is None else module.to(device)


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], where: str, *, assign: bool = False
) -> None:
    """``load_state_dict(strict=True)`` with an error that names what is missing or too much."""
    try:
        module.load_state_dict(dict(state), strict=True, assign=assign)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        text = "; ".join(problems)
        raise UserError(
            f"{where}: does not hold the weights of this {type(module).__name__}: "
            f"{text[:300]}{'...' if len(text) > 300 else ''}"
        ) from None


# --- pickles --------------------------------------------------------------------------------------


def is_mapped(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`read_pickle` maps the file; older files and raw pickles are read whole."""
    return zipfile.is_zipfile(path)


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``.pth`` file's dictionary, without running code from it; tensors are mapped if they can.

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that wants to run code.
    """
    try:
        mapped = is_mapped(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it is not a plain file of weights (it wants to run code, or is "
            "damaged)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # Bytes that are no pickle at all surface as bare keys and values.
        told = isinstance(error, OSError | RuntimeError) and str(error)
        first = str(error).splitlines()[0][:200] if told else "it is no file of torch.save"
        raise UserError(f"{path}: is not a readable checkpoint: {first}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors; got {type(state).__name__}")
    return state
