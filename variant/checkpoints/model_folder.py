"""The model folder: ``config.json``, ``model.safetensors`` and a model card.

The keys of the weights start with ``var.`` or ``vae.``. Each file is written under a temporary name
and then renamed. A loaded model does not depend on its files: weights are copied, one by one.
original_var.py reads and writes the original repository's files.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from variant.checkpoints.config_file import CONFIG_NAME, FORMAT, configs_in, read_config
from variant.checkpoints.model_card import CARD_NAME, model_card, was_generated
from variant.checkpoints.sharded import WEIGHTS_NAME, find_weights, read_weights_file
from variant.engine.memory import check_fits
from variant.errors import UserError
from variant.files import atomic_write, save_safetensors
from variant.folder_lock import clear_leftovers, saving
from variant.models.parts import SkipInit, check_saved, shown_text
from variant.models.placement import WEIGHT_DTYPES
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import is_zone_key, reset_zone_weights
from variant.paths import MAX_TEXT_BYTES, unique_keys
from variant.tensor_files import StoredTensor, read_all
from variant_kernels.arguments import instance
from variant_kernels.dispatch.request import dtype_name

Model = TypeVar("Model", bound=nn.Module)

READS = 5  # of a folder that is saved into meanwhile
RESERVED = ("format", "var", "vae")  # keys of config.json that save_model writes
PARTS = ("var", "vae")
SIZES = "config"  # in the header of the weights: these two entries of config.json, as JSON
MAX_LISTED = 10  # keys in a warning
MAX_NESTING = 100  # of extra; also ends at a list that holds itself


# --- writing ------------------------------------------------------------------------------------


def save_model(
    folder: str | os.PathLike[str],
    var: VAR,
    vae: VQVAE,
    extra: Mapping[str, Any] | None = None,
    model_id: str | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the model card ``README.md``.

    A README.md that save_model did not generate is not overwritten. Of several saves into one
    folder at once, by threads or processes, each waits for the one before.

    Args:
        folder: created where it is missing.
        extra: further keys of config.json, e.g. how the model was trained; plain values, and
            numbers of numpy and torch.
        model_id: name of the model in the card; None is the folder's name.
    Raises:
        UserError: the folder cannot be written.
        TypeError: ``extra`` holds a value that JSON cannot represent, or a part of a model was
            removed or replaced.
        ValueError: layers of ``var`` were removed or added, a part has other tensors than the
            config asks for, or ``extra`` has a key that save_model writes itself, or could not be
            read again.
    """
    folder = Path(folder)
    check_extra("save_pretrained", extra or {})
    check_saved("save_pretrained", "var", instance("save_pretrained", "var", var, VAR))
    check_saved("save_pretrained", "vae", instance("save_pretrained", "vae", vae, VQVAE))
    tensors = {
        f"{part}.{key}": value.detach().cpu().resolve_neg().contiguous()
        for part, module in (("var", var), ("vae", vae))
        for key, value in module.state_dict().items()
    }
    config = {
        **(extra or {}),
        "format": FORMAT,
        "var": var.config.to_dict(),
        "vae": vae.config.to_dict(),
    }
    text = _as_json("save_pretrained", config)
    with saving(folder) as is_locked:
        if is_locked:
            clear_leftovers(folder, (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME))
        # The config is written first and renamed last: until both files are complete, the folder
        # keeps the old pair.
        with atomic_write(folder / CONFIG_NAME) as path:
            path.write_text(text, encoding="utf-8")
            sizes = {part: config[part] for part in PARTS}
            save_safetensors(folder / WEIGHTS_NAME, tensors, metadata={SIZES: json.dumps(sizes)})
        card_path = folder / CARD_NAME
        if was_generated(card_path):
            card = model_card(
                var.config,
                vae.config,
                model_id or folder.resolve().name,
                dtype_name(var.head.weight.dtype),
                config.get("training"),
            )
            with atomic_write(card_path) as path:
                # A folder's name need not be text.
                path.write_text(card, encoding="utf-8", errors="replace")


def check_extra(op: str, extra: Mapping[str, Any]) -> None:
    """Raises: TypeError or ValueError for what cannot be an entry of config.json, naming it."""
    instance(op, "extra", extra, Mapping)
    for key, value in extra.items():
        if key in RESERVED:
            raise ValueError(f"{op}: extra must not have the key {key!r}, which config.json uses")
        where, wrong = _not_json(f"extra[{key!r}]", value) or (None, None)
        if where is not None and isinstance(wrong, float):
            raise ValueError(
                f"{op}: {where} must be finite, as JSON has no other numbers; got {wrong}. The "
                'text "NaN" and None can be written'
            )
        if where is not None:
            raise TypeError(
                f"{op}: {where} must be text, a number, a boolean, None, a list or a dictionary "
                f"with text as keys; got {wrong!r} ({type(wrong).__name__})"
            )
        if not isinstance(key, str):
            raise TypeError(f"{op}: the keys of extra must be text; got {key!r}")


def _as_json(op: str, config: Mapping[str, Any]) -> str:
    """The text of config.json.  Raises: ValueError, if it could not be read again."""
    try:
        text = json.dumps(config, indent=1, default=_number, allow_nan=False) + "\n"
        json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:  # keys that are one text, a number of too many digits
        raise ValueError(
            f"{op}: extra must be readable again as JSON, where keys are text: {error}"
        ) from None
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{op}: {CONFIG_NAME} may have {MAX_TEXT_BYTES:,} bytes; "
            f"with extra it has {len(text):,}"
        )
    return text


def _not_json(where: str, value: Any, depth: int = 0) -> tuple[str, Any] | None:
    """The place and value of what JSON cannot represent; None if all of it is plain."""
    if depth > MAX_NESTING:
        return where, "nesting deeper than that"
    if isinstance(value, dict):
        for key, item in value.items():
            if key is not None and not isinstance(key, str | int | float):
                return f"a key of {where}", key
            if found := _not_json(f"{where}[{key!r}]", item, depth + 1):
                return found
        return None
    if isinstance(value, list | tuple):
        places = (_not_json(f"{where}[{i}]", item, depth + 1) for i, item in enumerate(value))
        return next(filter(None, places), None)
    number = value if isinstance(value, int | float) else _number(value)
    if isinstance(number, float) and not math.isfinite(number):
        return where, number
    return None if value is None or isinstance(value, str) or number is not None else (where, value)


def _number(value: object) -> bool | int | float | None:
    """A number of numpy or torch as Python's; None of anything else."""
    if not isinstance(value, np.generic | np.ndarray | Tensor) or value.ndim:
        return None
    try:
        number = value.item()
    except (RuntimeError, ValueError):  # on the meta device
        return None
    return number if isinstance(number, bool | int | float) else None


# --- reading our folder -------------------------------------------------------------------------


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    strict: bool = True,
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The two models of a folder, in eval mode, and its config.json.

    The weights are model.safetensors, or shards with their model.safetensors.index.json, or
    pytorch_model.bin; all with the same keys. They are compared with the config before they are
    read, and then copied one by one: memory never holds the whole file beside the result.

    Args:
        dtype: of the transformer's weights; None keeps the file's, of several the widest.
        device: of both models; None is the CPU.
        strict: False lets keys be missing (these weights are initialised) and unexpected, with a
            warning that names them.

    A save into the folder meanwhile does not mix config and weights: both are read again.

    Raises:
        UserError: a file is missing, damaged or of another format, or the weights do not fit the
            config; or the folder is saved into again and again meanwhile.
    """
    folder = Path(folder)
    for _ in range(READS):
        before = _versions(folder)
        try:
            result = _load_model(folder, dtype, device, strict=strict)
        except UserError:
            if _versions(folder) == before:
                raise
        else:
            if _versions(folder) == before:
                return result
    raise UserError(f"{folder}: was saved into while it was read, {READS} times; load it later")


def _versions(folder: Path) -> list[tuple[int, int, int] | None]:
    """What changes when config or weights are replaced."""
    states = []
    for path in (folder / CONFIG_NAME, find_weights(folder)):
        try:
            status = os.stat(path) if path is not None else None
        except OSError:
            status = None
        states.append(status and (status.st_ino, status.st_mtime_ns, status.st_size))
    return states


def _load_model(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str | None, *, strict: bool
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    config = read_config(folder)
    var_config, vae_config = configs_in(folder)
    path = find_weights(folder) or folder / WEIGHTS_NAME
    stored = read_weights_file(path)
    if not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(f"{path}: must hold tensors alone, under the keys of both models")
    foreign = sorted(str(key) for key in stored if not str(key).startswith(("var.", "vae.")))
    report_keys(str(path), "model folder", (), foreign, strict=strict)
    parts = {
        part: {k.removeprefix(part): v for k, v in stored.items() if str(k).startswith(part)}
        for part in ("var.", "vae.")
    }
    var = build(VAR, var_config, parts["var."], str(path), device, dtype, strict=strict)
    vae = build(VQVAE, vae_config, parts["vae."], str(path), device, strict=strict)
    _compare_sizes(folder, config, stored)
    return var.eval(), vae.eval(), config


def _compare_sizes(folder: Path, config: Mapping[str, Any], stored: Mapping[Any, Any]) -> None:
    """A warning that names settings that config.json had otherwise when the weights were saved.

    config.json has no checksum, and may be edited; a damaged digit would go unnoticed.
    """
    text = getattr(stored, "metadata", {}).get(SIZES)
    try:
        saved = None if text is None else json.loads(text)
    except (TypeError, ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        return
    changes = [
        f"{part}.{name} is {config[part].get(name)!r}, and was {saved[part].get(name)!r}"
        for part in PARTS
        if isinstance(saved.get(part), dict)
        for name in sorted(config[part].keys() | saved[part].keys())
        if config[part].get(name) != saved[part].get(name)
    ]
    if changes:
        warnings.warn(
            f"{folder / CONFIG_NAME}: {shown_text('; '.join(changes))} when the weights were "
            "saved: it was edited since, or is damaged",
            stacklevel=4,
        )


def build(
    kind: Callable[[Any], Model],
    config: Any,
    state: Mapping[str, Tensor],
    where: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool = True,
) -> Model:
    """A model that uses the tensors of a state dict, without initialising weights first.

    Args:
        state: tensors, which the model then shares, or stored tensors, which are read here, after
            their names and shapes were found to be those of the model.
        where: names the state in errors.
        device, dtype: of the model; None keeps that of the state, of several dtypes the one that
            holds the values of all parameters. Tensors that are on that device and in that dtype
            already are not copied.
        strict: False initialises weights that the state does not hold, leaves out keys that the
            model does not have, and warns.
    Raises:
        UserError: the state's keys or shapes are not exactly those of this model, or without
            ``dtype`` a parameter has one that no model is loaded in.
    """
    with torch.device("meta"), SkipInit():
        module = kind(config)
    needed = module.state_dict()
    load_state(module, state, where, assign=True, strict=strict)
    stored = any(isinstance(value, StoredTensor) for value in state.values())
    missing = needed.keys() - state.keys()
    dtype = dtype or _kept_dtype(module, state, where)
    if missing:  # not strict, else load_state raised
        num_bytes = sum(value.numel() * value.itemsize for value in needed.values())
        what = f"the weights of the {type(module).__name__}"
        check_fits(where, what, num_bytes, torch.device("cpu"))
        with torch.device("cpu"):  # also where the caller's default is another one
            module = kind(config)
        module.to(dtype or next((v.dtype for v in state.values() if v.is_floating_point()), None))
    if stored or missing or dtype or device:
        wanted = {key: value for key, value in state.items() if key in needed}
        values = read_all(wanted, dtype, device)
        module.load_state_dict(values, strict=not missing, assign=True)
        if isinstance(module, VAR) and any(is_zone_key(key) for key in missing):
            # They start as the full network, which has just been loaded.
            reset_zone_weights(module)
            module.load_state_dict(values, strict=False, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # usage statistics, which other checkpoints lack: start at zero
            owner, _, leaf = name.rpartition(".")
            zeros = torch.zeros(buffer.shape, dtype=torch.float32, device="cpu")
            module.get_submodule(owner).register_buffer(leaf, zeros)
    return module if device is None else module.to(device)


def _kept_dtype(module: nn.Module, state: Mapping[str, Tensor], where: str) -> torch.dtype | None:
    """The dtype that holds the values of all parameters of a state; None needs no cast.

    A model runs in one dtype. Each of several would lose values in the narrower one, without a way
    back.
    """
    found = {state[name].dtype: name for name, _ in module.named_parameters() if name in state}
    for dtype, name in found.items():
        if dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{where}: {name} is {dtype_name(dtype)}; a model is loaded in "
                f"{', '.join(map(dtype_name, WEIGHT_DTYPES))}. Give one of them as dtype"
            )
    # The statistics of a VQ-VAE may be wider than its weights; of a VAR the buffers are biases.
    if not found or (len(found) == 1 and not isinstance(module, VAR)):
        return None
    return reduce(torch.promote_types, found)


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    assign: bool = False,
    strict: bool = True,
) -> None:
    """``load_state_dict`` with an error of one line.

    Args:
        strict: False allows missing and unexpected keys, with a warning that names them.
    Raises:
        UserError: naming missing and unexpected keys, and shapes and dtypes that differ.
    """
    for key, weight in module.state_dict().items():
        value = state.get(key)
        # torch takes complex numbers here, and drops their imaginary part.
        if value is not None and weight.is_floating_point() and not value.is_floating_point():
            raise UserError(
                f"{where}: does not hold the weights of this {type(module).__name__}: {key} must "
                f"be of a floating-point dtype; got {dtype_name(value.dtype)}"
            )
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=strict, assign=assign)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        text = "; ".join(problems)
        raise UserError(
            f"{where}: does not hold the weights of this {type(module).__name__}: "
            f"{text[:300]}{'...' if len(text) > 300 else ''}"
        ) from None
    report_keys(where, type(module).__name__, missing, unexpected, strict=False)


def report_keys(
    where: str, kind: str, missing: Sequence[str], unexpected: Sequence[str], *, strict: bool
) -> None:
    """A warning that names keys that are missing or unexpected, if there are any.

    Raises:
        UserError: in place of the warning, if ``strict``.
    """
    lists = (("missing (initialised)", missing), ("unexpected (left out)", unexpected))
    text = "; ".join(f"{what} keys: {_listed(keys)}" for what, keys in lists if keys)
    if text and strict:
        raise UserError(
            f"{where}: does not hold the weights of a {kind}: unexpected keys: "
            f"{', '.join(unexpected)[:300]}; strict=False leaves them out"
        )
    if text:
        warnings.warn(f"{where}: not all weights fit this {kind}: {text}", stacklevel=4)


def _listed(keys: Sequence[str]) -> str:
    """The first of the keys, and how many follow."""
    more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
    return ", ".join(keys[:MAX_LISTED]) + more
