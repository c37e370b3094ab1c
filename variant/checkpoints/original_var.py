"""The files of the original VAR repository.

The sizes of a model are inferred from the shapes in its state dict. Three forms can be read:
a state dict (``var_d16.pth``); a trainer checkpoint, which holds the state dicts of both models
under ``trainer``; the folder that ``save_pretrained`` of the original's Hub class writes, with
config.json and model.safetensors.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variant.checkpoints.config_file import CONFIG_NAME, FORMAT
from variant.checkpoints.model_folder import WEIGHTS_NAME, build
from variant.errors import UserError
from variant.files import save_pickle
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.var import VAR, derived_buffers
from variant.models.vqvae import VQVAE
from variant.paths import path_kind, read_json
from variant.tensor_files import read_all, read_values, stored_pickle, stored_safetensors

# Token-map sides of the published models, by (scales, tokens); for files without `lvl_1L`.
KNOWN_PATCH_NUMS = {
    (10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
ORIGINAL_KEYS = (
    "word_embed.weight",
    "lvl_embed.weight",
    "pos_1LC",
    "class_emb.weight",
    "head.weight",
    "blocks.0.ffn.fc1.weight",
)
PICKLE_NAME = "pytorch_model.bin"  # of older Hub folders
# Prefixes that DistributedDataParallel and torch.compile add to every key.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class OriginalFile:
    """One model's state dict, as found in a file; its values are read later.

    config: the arguments of the model's constructor if the Hub form records them, else empty.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def read_original(path: str | os.PathLike[str], part: str) -> dict[str, Tensor]:
    """The state dict of one model with its values; see :func:`open_original`."""
    return read_all(open_original(path, part).state)


def open_original(path: str | os.PathLike[str], part: str) -> OriginalFile:
    """One model from a .pth or .safetensors file, a trainer checkpoint or a Hub folder.

    Args:
        part: "var_wo_ddp" or "vae_local", the keys of a trainer checkpoint.
    Raises:
        UserError: missing, damaged, not a file of the original, or a pickle that would run code.
    """
    path, config = Path(path), {}
    if path_kind(path) == "folder":
        path, config = _hub_files(path)
    if path.suffix == ".safetensors":
        state: dict[str, Any] = dict(stored_safetensors(path))
    else:
        state = stored_pickle(path)
    trainer = state.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get(part), dict):
        state = trainer[part]
    if not state or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
        keys = [key if isinstance(key, str) else f"a {type(key).__name__}" for key in state]
        raise UserError(
            f"{path}: must hold a state dict of tensors, or a trainer checkpoint with "
            f'"trainer/{part}"; got keys {sorted(keys)[:5]}'
        )
    return OriginalFile(path, _unwrapped(state), config)


def _hub_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and the constructor arguments in a folder of the original's Hub class."""
    weights = next(
        (folder / name for name in (WEIGHTS_NAME, PICKLE_NAME) if path_kind(folder / name)), None
    )
    if weights is None:
        raise UserError(f"{folder}: holds neither {WEIGHTS_NAME} nor {PICKLE_NAME}")
    path = folder / CONFIG_NAME
    if path_kind(path) is None:
        return weights, {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold the model's arguments; got {type(config).__name__}")
    if config.get("format") == FORMAT:
        raise UserError(
            f"{folder}: is a model folder already; VARiant.from_pretrained and --model take it"
        )
    return weights, config


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes of wrappers around the whole model."""
    state = dict(state)
    while prefix := next((w for w in WRAPPERS if all(k.startswith(w) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


# --- sizes ---------------------------------------------------------------------------------------


def infer_var_config(
    state: Mapping[str, Tensor],
    where: str = "VAR checkpoint",
    num_heads: int | None = None,
    patch_nums: Sequence[int] | None = None,
) -> VARConfig:
    """Infer the configuration of an original VAR model from the shapes in its state dict.

    Args:
        where: names the state in errors.
        num_heads: needed only without ``attn_l2_norm``, when no shape contains it; None then
            assumes one head per 64 channels, as in the original repository, and warns.
        patch_nums: needed only if the state has no ``lvl_1L`` and the layout is not that of a
            published model.
    Raises:
        UserError: naming the key that is missing or does not fit.
    """
    missing = [key for key in ORIGINAL_KEYS if key not in state]
    if missing:
        raise UserError(f"{where}: is not a VAR transformer: it has no {', '.join(missing)}")
    try:
        depth = _count(state, "blocks.")
        width = state["word_embed.weight"].shape[0]
        scales, length = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1]
        scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
        if scale_mul is not None:
            if num_heads not in (None, scale_mul.shape[1]):
                raise ValueError(
                    f"num_heads is {num_heads}, but the weights have {scale_mul.shape[1]} heads"
                )
            num_heads = scale_mul.shape[1]
        elif num_heads is None:
            num_heads = width // 64
            warnings.warn(
                f"{where}: no tensor contains the number of attention heads; assuming {num_heads}, "
                "one per 64 channels. Give num_heads (convert: --num-heads) if that is wrong",
                stacklevel=2,
            )
        return VARConfig(
            depth=depth,
            embed_dim=width,
            num_heads=num_heads,
            num_classes=state["class_emb.weight"].shape[0] - 1,
            patch_nums=_patch_nums(state, scales, length, where, patch_nums),
            vocab_size=state["head.weight"].shape[0],
            vae_channels=state["word_embed.weight"].shape[1],
            mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
            shared_aln="shared_ada_lin.1.weight" in state,
            attn_l2_norm=scale_mul is not None,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a VAR transformer: {error}") from error


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of modules of a list.  Raises: ValueError, if they are not numbered from 0 on."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    odd = numbers - {str(number) for number in range(len(numbers))}
    if odd or not numbers:
        raise ValueError(
            f"the modules {prefix}N must be numbered from 0 on without a gap; it has "
            f"{len(numbers)} of them" + (f", one of them {prefix}{min(odd)[:40]}" if odd else "")
        )
    return len(numbers)


def _patch_nums(
    state: Mapping[str, Tensor],
    scales: int,
    length: int,
    where: str,
    default: Sequence[int] | None,
) -> tuple[int, ...]:
    if "lvl_1L" in state:
        scale_L = (
            read_values(state["lvl_1L"]).flatten().clamp(0, scales)
        )  # a damaged file may hold others
        counts = torch.bincount(scale_L, minlength=scales).tolist()
        sides = tuple(math.isqrt(count) for count in counts)
        if [side * side for side in sides] == counts:
            return sides
    if default is not None:
        return tuple(default)
    if (scales, length) in KNOWN_PATCH_NUMS:
        return KNOWN_PATCH_NUMS[scales, length]
    raise UserError(
        f"{where}: cannot infer the token maps of {scales} scales and {length} tokens: it has no "
        "lvl_1L and is none of the published layouts"
    )


def infer_vqvae_config(
    state: Mapping[str, Tensor], patch_nums: tuple[int, ...], where: str = "VQ-VAE checkpoint"
) -> VQVAEConfig:
    """Infer the configuration of an original VQ-VAE from the shapes in its state dict.

    Args:
        patch_nums: sides of the token maps, which no shape contains.
        where: names the state in errors.
    Raises:
        UserError: naming the key that is missing.
    """
    try:
        levels = _count(state, "encoder.down.")
        blocks = _count(state, "encoder.down.0.block.")
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        if "quantize.quant_resi.qresi.weight" in state:
            shared, ratio = 1, 0.5
        else:
            partly = sum(
                k.startswith("quantize.quant_resi.qresi_ls.") and k.endswith("weight")
                for k in state
            )
            each = sum(k.startswith("quantize.quant_resi.") and k.endswith("weight") for k in state)
            shared, ratio = (partly, 0.5) if partly else (0, 0.5 if each else 0.0)
        return VQVAEConfig(
            vocab_size=state["quantize.embedding.weight"].shape[0],
            z_channels=state["quantize.embedding.weight"].shape[1],
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=blocks,
            patch_nums=patch_nums,
            share_quant_resi=shared,
            quant_resi=ratio,
            quant_conv_ks=state["quant_conv.weight"].shape[-1],
            in_channels=in_channels,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a VAR VQ-VAE: {error}") from error


def _with_hub_config(config: VARConfig, hub: Mapping[str, Any], where: str) -> VARConfig:
    """Add the constructor arguments that no shape contains to an inferred configuration.

    Raises:
        UserError: an argument contradicts a shape, or a value is out of range.
    """
    inferred = ("depth", "embed_dim", "num_classes", "shared_aln", "attn_l2_norm", "mlp_ratio")
    for name in inferred:
        if name in hub and hub[name] != getattr(config, name):
            raise UserError(
                f"{where}: {CONFIG_NAME} has {name} {hub[name]!r}, but the weights have "
                f"{getattr(config, name)!r}"
            )
    not_inferred = ("norm_eps", "cond_drop_rate", "drop_path_rate", "num_heads", "patch_nums")
    try:
        arguments = config.to_dict() | {name: hub[name] for name in not_inferred if name in hub}
        complete = VARConfig.from_dict(arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {CONFIG_NAME}: {error}") from error
    if config.attn_l2_norm and complete.num_heads != config.num_heads:
        raise UserError(
            f"{where}: {CONFIG_NAME} has num_heads {complete.num_heads}, but the weights have "
            f"{config.num_heads}"
        )
    if complete.layout.total != config.layout.total:
        raise UserError(
            f"{where}: {CONFIG_NAME} has patch_nums {complete.patch_nums}, but the weights have "
            f"{config.layout.total} tokens"
        )
    return complete


def _with_vae_arguments(config: VQVAEConfig, arguments: Any, where: str) -> VQVAEConfig:
    """Add the constructor arguments that the weights do not show to an inferred configuration."""
    not_inferred = ("beta", "quant_resi", "using_znorm")
    try:
        hub = dict(arguments or {})
        return VQVAEConfig.from_dict(
            config.to_dict() | {name: hub[name] for name in not_inferred if name in hub}
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {CONFIG_NAME}: vae_kwargs: {error}") from error


# --- whole models --------------------------------------------------------------------------------


def load_original(
    var_path: str | os.PathLike[str],
    vae_path: str | os.PathLike[str],
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[VAR, VQVAE]:
    """Both models from the original repository's files, in eval mode.

    Args:
        num_heads: see :func:`infer_var_config`; a Hub folder records it.
        dtype: of the transformer's weights; None keeps the file's.
        device: of both models; None is the CPU.
    Raises:
        UserError: a file is missing, damaged or not of the original repository.
    """
    var_file = open_original(var_path, "var_wo_ddp")
    vae_file = open_original(vae_path, "vae_local")
    hub, where = var_file.config, str(var_path)
    heads = hub.get("num_heads", num_heads)
    var_config = infer_var_config(var_file.state, where, heads, hub.get("patch_nums"))
    var_config = _with_hub_config(var_config, hub, where)
    vae_config = infer_vqvae_config(vae_file.state, var_config.patch_nums, str(vae_path))
    vae_config = _with_vae_arguments(vae_config, hub.get("vae_kwargs"), where)
    var = build(VAR, var_config, var_file.state, where, device, dtype)
    vae = build(VQVAE, vae_config, vae_file.state, str(vae_path), device)
    return var.eval(), vae.eval()


def save_original(
    var: VAR, vae: VQVAE, var_path: str | os.PathLike[str], vae_path: str | os.PathLike[str]
) -> None:
    """Write both models as the original repository reads them, derived buffers included.

    Raises:
        UserError: a file cannot be written.
    """
    save_pickle(var_path, {**var.state_dict(), **derived_buffers(var.layout)})
    save_pickle(vae_path, vae.state_dict())
