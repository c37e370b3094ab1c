"""The files of the original VAR repository.

The sizes of a model are inferred from the shapes in its state dict. Three forms can be read:
a state dict (``var_d16.pth``); a checkpoint of any trainer, with the state dict under some name
(:mod:`variant.checkpoints.state_dict_forms`); the folder that ``save_pretrained`` of the original's
Hub class writes, with config.json and model.safetensors.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variant.checkpoints.config_file import CONFIG_NAME, FORMAT
from variant.checkpoints.locate import check_path
from variant.checkpoints.model_folder import build
from variant.checkpoints.settings import VAE_SETTINGS, VAR_SETTINGS, Settings, settings_of_training
from variant.checkpoints.sharded import WEIGHTS_NAMES, find_weights, read_weights_file
from variant.checkpoints.state_dict_forms import VAR_KEYS, find_state_dict
from variant.errors import UserError
from variant.files import save_pickle, save_safetensors
from variant.folder_lock import saving
from variant.models.config import VARConfig, VQVAEConfig, check_pair_of_configs
from variant.models.parts import check_saved
from variant.models.var import VAR, derived_buffers
from variant.models.vqvae import VQVAE
from variant.models.zones import is_zone_key
from variant.paths import path_kind, read_json
from variant.tensor_files import read_all, read_values
from variant_kernels.arguments import instance
from variant_kernels.wording import counted

# Token-map sides of the published models, by (scales, tokens); for files without `lvl_1L`.
KNOWN_PATCH_NUMS = {
    (10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
# Arguments of the two constructors that shapes tell.
VAR_SIZES = ("depth", "embed_dim", "num_classes", "shared_aln", "attn_l2_norm", "mlp_ratio")
VAE_SIZES = ("vocab_size", "z_channels", "ch", "share_quant_resi", "quant_conv_ks")
PICKLE_ENDINGS = (".pth", ".pt")


@dataclass(frozen=True)
class OriginalFile:
    """One model's state dict, as found in a file; its values are read later.

    config: the arguments of the model's constructor if the Hub form records them, else empty.
    training: the settings in a trainer checkpoint that no tensor tells, by place.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    training: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def told(self, names: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
        """Those of ``names`` that the trainer checkpoint holds, by place."""
        return [
            (place, {n: v for n, v in values.items() if n in names})
            for place, values in self.training
        ]


def read_original(
    path: str | os.PathLike[str], part: str, weights: str | None = None
) -> dict[str, Tensor]:
    """The state dict of one model with its values; see :func:`open_original`."""
    return read_all(open_original(path, part, weights).state)


def open_original(
    path: str | os.PathLike[str], part: str, weights: str | None = None
) -> OriginalFile:
    """One model from a .pth or .safetensors file, a trainer checkpoint or a Hub folder.

    Args:
        part: "var_wo_ddp" or "vae_local", the keys of a trainer checkpoint.
        weights: which of several state dicts; see
            :func:`variant.checkpoints.state_dict_forms.find_state_dict`.
    Raises:
        UserError: missing, damaged, not a file of the original, or a pickle that would run code.
    """
    path, config = Path(path), {}
    if path_kind(path) == "folder":
        path, config = _hub_files(path)
    if path.suffix == ".distcp":
        raise _distributed(path.parent)
    content = read_weights_file(path)
    state = find_state_dict(content, part, str(path), weights)
    return OriginalFile(path, state, config, settings_of_training(content))


def _distributed(folder: Path) -> UserError:
    return UserError(
        f"{folder}: is a folder of torch.distributed.checkpoint; `python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pth` makes a file "
        "of it (of one that `variant train` wrote: `variant convert --checkpoint`)"
    )


def _hub_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and the constructor arguments in a folder of the original's Hub class."""
    weights = find_weights(folder)
    if weights is None and (folder / ".metadata").is_file():
        raise _distributed(folder)
    if weights is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(WEIGHTS_NAMES)}")
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


# --- sizes ---------------------------------------------------------------------------------------


def infer_var_config(
    state: Mapping[str, Tensor],
    where: str = "VAR checkpoint",
    num_heads: int | None = None,
    patch_nums: Sequence[int] | None = None,
    *,
    settings: Settings | None = None,
    **given: Any,
) -> VARConfig:
    """Infer the configuration of an original VAR model from the shapes in its state dict.

    Args:
        where: names the state in errors.
        num_heads, patch_nums, given: what the caller knows of VAR_SETTINGS
            (:mod:`variant.checkpoints.settings`); what nothing tells is assumed with a warning.
        settings: in their place; the caller then gives the warning.
    Raises:
        UserError: naming the key that is missing or does not fit, or a setting that contradicts
            the tensors.
    """
    own = settings or Settings(
        where, {"num_heads": num_heads, "patch_nums": patch_nums, **given}, op=where
    )
    missing = [key for key in VAR_KEYS if key not in state]
    if missing:
        raise UserError(f"{where}: is not a VAR transformer: it has no {', '.join(missing)}")
    try:
        depth = _count(state, "blocks.")
        width = state["word_embed.weight"].shape[0]
        scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
        config = VARConfig(
            depth=depth,
            embed_dim=width,
            num_heads=own.value(
                "num_heads",
                width // 64,
                shown=None if scale_mul is None else scale_mul.shape[1],
                note="one per 64 channels",
            ),
            num_classes=state["class_emb.weight"].shape[0] - 1,
            patch_nums=_patch_nums(state, where, own),
            vocab_size=state["head.weight"].shape[0],
            vae_channels=state["word_embed.weight"].shape[1],
            mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
            norm_eps=own.value("norm_eps", 1e-6),
            shared_aln="shared_ada_lin.1.weight" in state,
            attn_l2_norm=scale_mul is not None,
            cond_drop_rate=own.value("cond_drop_rate", 0.1),
            drop_path_rate=own.value("drop_path_rate", 0.0),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a VAR transformer: {error}") from error
    if settings is None:
        own.warn(stacklevel=2)
    return config


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


def _patch_nums(state: Mapping[str, Tensor], where: str, settings: Settings) -> tuple[int, ...]:
    scales, length = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1]
    shown = None
    if "lvl_1L" in state:
        # Averages of all entries (EMA) hold it in the weights' dtype; a damaged file other values.
        scale_L = read_values(state["lvl_1L"]).flatten().to(torch.float64).clamp(0, scales)
        counts = [int((scale_L == scale).sum()) for scale in range(scales)]
        sides = tuple(math.isqrt(count) for count in counts)
        if [side * side for side in sides] == counts:
            shown = sides
    found = settings.value("patch_nums", KNOWN_PATCH_NUMS.get((scales, length)), shown)
    if found is None:
        raise UserError(
            f"{where}: cannot infer the token maps of {counted(scales, 'scale')} and "
            f"{counted(length, 'token')}: it has "
            "no lvl_1L and is none of the published layouts; give patch_nums (convert: "
            "--patch-nums), the sides of the token maps"
        )
    tokens = sum(side * side for side in found)
    if (len(found), tokens) != (scales, length):
        raise UserError(
            f"{where}: patch_nums {found} have {counted(len(found), 'scale')} and "
            f"{counted(tokens, 'token')}, but the "
            f"weights have {counted(scales, 'scale')} and {counted(length, 'token')}"
        )
    return found


def infer_vqvae_config(
    state: Mapping[str, Tensor],
    patch_nums: tuple[int, ...],
    where: str = "VQ-VAE checkpoint",
    *,
    settings: Settings | None = None,
    **given: Any,
) -> VQVAEConfig:
    """Infer the configuration of an original VQ-VAE from the shapes in its state dict.

    Args:
        patch_nums: sides of the token maps, which no shape contains.
        where: names the state in errors.
        given: what the caller knows of VAE_SETTINGS (:mod:`variant.checkpoints.settings`); what
            nothing tells is assumed with a warning.
        settings: in place of ``given``; the caller then gives the warning.
    Raises:
        UserError: naming the key that is missing, or a setting that contradicts the tensors.
    """
    own = settings or Settings(where, given, op=where)
    try:
        levels = _count(state, "encoder.down.")
        blocks = _count(state, "encoder.down.0.block.")
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        # Where the transformer's file tells them for the VQ-VAE, they must be its own.
        own.value("patch_nums", None, shown=patch_nums)
        shared, has_convs = _residual_convs(state, len(patch_nums), where)
        quant_resi = own.value("quant_resi", 0.5, shown=None if has_convs else 0.0)
        if has_convs and quant_resi == 0:
            raise UserError(f"{where}: quant_resi is 0, but the weights have residual convolutions")
        config = VQVAEConfig(
            vocab_size=state["quantize.embedding.weight"].shape[0],
            z_channels=state["quantize.embedding.weight"].shape[1],
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=blocks,
            patch_nums=patch_nums,
            share_quant_resi=shared,
            quant_resi=quant_resi,
            quant_conv_ks=state["quant_conv.weight"].shape[-1],
            using_znorm=own.value("using_znorm", False),
            beta=own.value("beta", 0.25),
            in_channels=in_channels,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a VAR VQ-VAE: {error}") from error
    if settings is None:
        own.warn(stacklevel=2)
    return config


def _residual_convs(state: Mapping[str, Tensor], num_scales: int, where: str) -> tuple[int, bool]:
    """``share_quant_resi``, and whether the quantiser has residual convolutions at all."""
    if "quantize.quant_resi.qresi.weight" in state:
        return 1, True
    names = [k for k in state if k.startswith("quantize.quant_resi.") and k.endswith("weight")]
    partly = sum(name.startswith("quantize.quant_resi.qresi_ls.") for name in names)
    if not partly and names and len(names) != num_scales:
        raise UserError(
            f"{where}: has {len(names)} residual convolutions for {counted(num_scales, 'scale')}; "
            "expected one per scale (default_qresi_counts is not supported)"
        )
    return partly, bool(names)


def _check_sizes(
    config: VARConfig | VQVAEConfig, told: Mapping[str, Any], names: Sequence[str], where: str
) -> None:
    """Raises: UserError, if config.json contradicts what the shapes tell."""
    wrong = []
    for name in names:
        # Without convolutions nothing is shared, whatever the number.
        free = name == "share_quant_resi" and getattr(config, "quant_resi", 1) == 0
        if name in told and told[name] != getattr(config, name) and not free:
            wrong.append(f"{name} {told[name]!r}, but the weights have {getattr(config, name)!r}")
    if wrong:
        raise UserError(f"{where}: {CONFIG_NAME} has {'; '.join(wrong)}")


# --- whole models --------------------------------------------------------------------------------


def load_original(
    var_path: str | os.PathLike[str],
    vae_path: str | os.PathLike[str],
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    weights: str | None = None,
    strict: bool = True,
    op: str = "from_var_checkpoint",
    **given: Any,
) -> tuple[VAR, VQVAE]:
    """Both models from the original repository's files, in eval mode.

    Args:
        num_heads, given: settings that no tensor tells, by the names of VAR_SETTINGS and
            VAE_SETTINGS (:mod:`variant.checkpoints.settings`). What neither the files nor these
            tell is assumed, with one warning.
        dtype: of the transformer's weights; None keeps the file's, of several the widest.
        device: of both models; None is the CPU.
        weights: "model", "ema" or the name of an entry: which of several state dicts in the
            transformer's file; in that of the VQ-VAE too, where it has such an entry.
        strict: False lets keys be missing (these weights are initialised) and unexpected, with a
            warning that names them; those that tell the sizes must be there.
        op: the caller's function, for messages about settings.
    Raises:
        TypeError, ValueError: a setting of a wrong type or out of range.
        UserError: a file is missing, damaged or not of the original repository, or contradicts a
            setting.
    """
    given |= {"num_heads": num_heads}
    # Unknown and wrong settings are refused before a large file is read.
    Settings(str(var_path), given, op=op)
    var_file = open_original(var_path, "var_wo_ddp", weights)
    vae_file = open_original(vae_path, "vae_local", weights)
    hub, where, vae_where = var_file.config, str(var_path), str(vae_path)
    kwargs = hub.get("vae_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise UserError(f"{where}: {CONFIG_NAME}: vae_kwargs must be a mapping; got {kwargs!r}")
    sides = {"patch_nums": kwargs["v_patch_nums"]} if "v_patch_nums" in kwargs else {}
    var_settings = Settings(
        where,
        {name: value for name, value in given.items() if name not in VAE_SETTINGS},
        [(CONFIG_NAME, hub), *var_file.told(VAR_SETTINGS)],
        op,
    )
    vae_settings = Settings(
        vae_where,
        {name: value for name, value in given.items() if name not in VAR_SETTINGS},
        [
            (f"vae_kwargs in {CONFIG_NAME}", {**kwargs, **sides}),
            (CONFIG_NAME, vae_file.config),
            *vae_file.told(VAE_SETTINGS),
        ],
        op,
    )
    var_config = infer_var_config(var_file.state, where, settings=var_settings)
    _check_sizes(var_config, hub, VAR_SIZES, where)
    vae_config = infer_vqvae_config(
        vae_file.state, var_config.patch_nums, vae_where, settings=vae_settings
    )
    for values in (kwargs, vae_file.config):
        _check_sizes(vae_config, values, VAE_SIZES, where)
    try:
        check_pair_of_configs(var_config, vae_config)
    except ValueError as error:
        raise UserError(f"{where}, {vae_where}: {error}") from None
    var_settings.warn(vae_settings, stacklevel=3)
    var = build(VAR, var_config, var_file.state, where, device, dtype, strict=strict)
    vae = build(VQVAE, vae_config, vae_file.state, vae_where, device, strict=strict)
    return var.eval(), vae.eval()


def save_original(
    var: VAR, vae: VQVAE, var_path: str | os.PathLike[str], vae_path: str | os.PathLike[str]
) -> None:
    """Write both models as the original repository reads them, derived buffers included.

    Zone weights are left out, with a warning: the file then has the full network, unchanged. Of
    several saves into the same folders at once, each waits for the one before.

    Args:
        var_path, vae_path: names ending in .safetensors are written in that format, names ending in
            .pth or .pt by ``torch.save``.
    Raises:
        TypeError: var or vae is of another class, or a part of it was removed or replaced.
        ValueError: layers were removed or added, or a part has other tensors than the config says.
        UserError: another ending, one path for both, or a file that cannot be written.
    """
    op = "save_original"
    check_saved(op, "var", instance(op, "var", var, VAR))
    check_saved(op, "vae", instance(op, "vae", vae, VQVAE))
    paths = [Path(check_path(op, "path", path)) for path in (var_path, vae_path)]
    for path in paths:
        check_ending(op, path)
    if os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
        raise UserError(f"{op}: the two models need two files; got {paths[0]} twice")
    var_state = {key: value for key, value in var.state_dict().items() if not is_zone_key(key)}
    if var.config.zone_weights != "shared":
        warnings.warn(
            f'{op}: left out the zone weights ("{var.config.zone_weights}") of the depths '
            f"{', '.join(map(str, var.config.subnets))}, which the original format cannot hold; "
            f"{paths[0]} has the full network",
            stacklevel=2,
        )
    with saving(*(path.parent for path in paths)):
        for path, state in (
            (paths[0], {**var_state, **derived_buffers(var.layout)}),
            (paths[1], vae.state_dict()),
        ):
            if path.suffix in PICKLE_ENDINGS:
                save_pickle(path, state)
            else:
                contiguous = torch.contiguous_format
                tensors = {
                    k: v.detach().cpu().resolve_neg().clone(memory_format=contiguous)
                    for k, v in state.items()
                }
                save_safetensors(path, tensors)


def check_ending(op: str, path: Path) -> None:
    """Raises: UserError, if a file of weights is not written under names of this ending."""
    endings = (*PICKLE_ENDINGS, ".safetensors")
    if path.suffix not in endings:
        raise UserError(
            f"{op}: {path} must end in {', '.join(endings)}, by which its format is chosen"
        )
