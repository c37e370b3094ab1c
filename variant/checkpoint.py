"""Weight files: our folder, and the original VAR repository's two ``.pth`` files.

A model folder holds ``config.json`` and ``model.safetensors`` with keys ``var.*`` and ``vae.*``.
Files are never half written: each goes to a temporary name first. Pickles are read with
``weights_only=True``, so that none can run code.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from variant.config import VARConfig, VQVAEConfig
from variant.errors import UserError
from variant.transformer import VAR, derived_buffers
from variant.vqvae import VQVAE

Model = TypeVar("Model", bound=nn.Module)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "variant-1"

# Sides of the published models' token maps, by (scales, tokens); a checkpoint with `lvl_1L` says.
KNOWN_PATCH_NUMS = {
    (10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


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
) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        folder: created where it is missing.
        extra: further keys of config.json, e.g. how the model was trained; plain values.
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
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The two models of a folder, in eval mode, and its config.json.

    Args:
        dtype: of the transformer's weights; None keeps the file's.
    Raises:
        UserError: a missing, damaged or foreign file, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = read_config(folder)
    var_config, vae_config = configs_in(folder)
    path = folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is missing or damaged: {error}") from error
    var = build(VAR, var_config, _part(tensors, "var."), str(path))
    vae = build(VQVAE, vae_config, _part(tensors, "vae."), str(path))
    stored = tensors.get("var.head.weight")
    wanted = dtype or (stored.dtype if stored is not None else torch.float32)
    return var.to(wanted).eval(), vae.eval(), config


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
    kind: Callable[[Any], Model], config: Any, state: Mapping[str, Tensor], where: str
) -> Model:
    """A model that takes its tensors from a state dict, without drawing weights first.

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
    return module


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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


ORIGINAL_KEYS = (
    "word_embed.weight",
    "lvl_embed.weight",
    "pos_1LC",
    "class_emb.weight",
    "head.weight",
    "blocks.0.ffn.fc1.weight",
)


# --- the original repository's files ------------------------------------------------------------


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``.pth`` file's dictionary, without running code from it.

    Raises:
        UserError: missing, damaged, not a dictionary, or a pickle that wants to run code.
    """
    try:
        # Only the zip format can be mapped; older files and raw pickles are read whole.
        mapped = zipfile.is_zipfile(path)
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


def read_original(path: str | os.PathLike[str], part: str) -> dict[str, Tensor]:
    """The state dict of one model; also from a trainer checkpoint of the original repository.

    Args:
        part: "var_wo_ddp" or "vae_local", the keys of a trainer checkpoint.
    """
    state = read_pickle(path)
    trainer = state.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get(part), dict):
        state = trainer[part]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"{path}: must hold a state dict of tensors, or a trainer checkpoint with "
            f'"trainer/{part}"; got keys {sorted(map(str, state))[:5]}'
        )
    return state


def infer_var_config(
    state: Mapping[str, Tensor], where: str = "VAR checkpoint", num_heads: int | None = None
) -> VARConfig:
    """Sizes of an original VAR model, from the shapes of its state dict.

    Args:
        num_heads: needed only where no tensor tells it (no ``attn_l2_norm``); None then assumes
            one head per 64 channels, as the original repository builds them, and warns.
    Raises:
        UserError: naming the key that is missing or does not fit.
    """
    missing = [key for key in ORIGINAL_KEYS if key not in state]
    if missing:
        raise UserError(f"{where}: is not a VAR transformer: it has no {', '.join(missing)}")
    try:
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        width = state["word_embed.weight"].shape[0]
        scales, length = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1]
        scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
        if scale_mul is not None:
            num_heads = scale_mul.shape[1]
        elif num_heads is None:
            num_heads = width // 64
            warnings.warn(
                f"{where}: no tensor tells the number of attention heads; assuming {num_heads}, "
                "one per 64 channels. Give num_heads (convert: --num-heads) if that is wrong",
                stacklevel=2,
            )
        return VARConfig(
            depth=depth,
            embed_dim=width,
            num_heads=num_heads,
            num_classes=state["class_emb.weight"].shape[0] - 1,
            patch_nums=_patch_nums(state, scales, length, where),
            vocab_size=state["head.weight"].shape[0],
            vae_channels=state["word_embed.weight"].shape[1],
            mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
            shared_aln="shared_ada_lin.1.weight" in state,
            attn_l2_norm=scale_mul is not None,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: is not a VAR transformer: {error}") from error


def _patch_nums(
    state: Mapping[str, Tensor], scales: int, length: int, where: str
) -> tuple[int, ...]:
    if "lvl_1L" in state:
        scale_L = state["lvl_1L"].flatten().clamp(0, scales)  # a foreign file may hold anything
        counts = torch.bincount(scale_L, minlength=scales).tolist()
        sides = tuple(math.isqrt(count) for count in counts)
        if [side * side for side in sides] == counts:
            return sides
    if (scales, length) in KNOWN_PATCH_NUMS:
        return KNOWN_PATCH_NUMS[scales, length]
    raise UserError(
        f"{where}: cannot tell the token maps of {scales} scales and {length} tokens: it has no "
        "lvl_1L and is none of the published layouts"
    )


def infer_vqvae_config(
    state: Mapping[str, Tensor], patch_nums: tuple[int, ...], where: str = "VQ-VAE checkpoint"
) -> VQVAEConfig:
    """Sizes of an original VQ-VAE, from the shapes of its state dict.

    Raises: UserError, naming the key that is missing.
    """
    try:
        levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
        blocks = 1 + max(
            int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block.")
        )
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


def load_original(
    var_path: str | os.PathLike[str],
    vae_path: str | os.PathLike[str],
    num_heads: int | None = None,
) -> tuple[VAR, VQVAE]:
    """Both models from the original repository's files, in eval mode."""
    var_state = read_original(var_path, "var_wo_ddp")
    vae_state = read_original(vae_path, "vae_local")
    var_config = infer_var_config(var_state, str(var_path), num_heads)
    vae_config = infer_vqvae_config(vae_state, var_config.patch_nums, str(vae_path))
    var = build(VAR, var_config, var_state, str(var_path))
    vae = build(VQVAE, vae_config, vae_state, str(vae_path))
    return var.eval(), vae.eval()


def save_original(
    var: VAR, vae: VQVAE, var_path: str | os.PathLike[str], vae_path: str | os.PathLike[str]
) -> None:
    """Write both models as the original repository reads them, derived buffers included."""
    save_pickle(var_path, {**var.state_dict(), **derived_buffers(var.layout)})
    save_pickle(vae_path, vae.state_dict())
