"""``variant convert``: from the original repository's files to a model folder, and back.

A checkpoint of a training run is a third input.

Inputs and outputs have names of their own, and every output is checked before anything is read: an
input is never overwritten, another existing file only with ``--overwrite``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from variant.checkpoints.config_file import CONFIG_NAME
from variant.checkpoints.locate import fetched, locate
from variant.checkpoints.model_card import CARD_NAME
from variant.checkpoints.model_folder import load_model
from variant.checkpoints.original_var import check_ending, load_original, save_original
from variant.checkpoints.settings import CHECKS
from variant.checkpoints.sharded import WEIGHTS_NAME, WEIGHTS_NAMES
from variant.cli.options import Convert
from variant.cli.output import check_file, check_folder, checked_path, console
from variant.errors import UserError
from variant.models.placement import check_dtype
from variant.paths import finite
from variant.supernet import VARiant
from variant.training.export import find_checkpoint, models_of
from variant_kernels.wording import counted

# What save_pretrained writes into a folder.
FOLDER_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def config_text(subnets: dict[int, tuple[int, ...]]) -> str:
    """``2: [0, 7]; 4: [0, 2, 5, 7]``, or ``none``."""
    return "; ".join(f"{depth}: {list(layers)}" for depth, layers in subnets.items()) or "none"


def convert(command: Convert) -> None:
    """Read one form, write the other, print what was written."""
    _check_options(command)
    folder = None if command.model is None else locate(command.model)
    checkpoint = command.checkpoint and find_checkpoint(command.checkpoint)
    inputs = (folder, checkpoint, command.var, command.vae)
    _check_outputs(command, [path for path in inputs if path])
    model = _read(command, folder, checkpoint)
    var = model.var
    out = console()
    if command.out is not None:
        model.save_pretrained(command.out)
        out.print(
            f"{command.out}: {counted(var.config.depth, 'layer')}, width {var.config.embed_dim}, "
            f"{counted(var.config.num_classes, 'class')}, scales {var.config.patch_nums}"
        )
    if command.to_var is not None and command.to_vae is not None:
        save_original(var, model.vae, command.to_var, command.to_vae)
        out.print(f"wrote {command.to_var} and {command.to_vae}, which the original VAR code loads")
        vae = model.vae.config
        out.print(
            "They hold weights only. Not included, because no shape contains it: "
            f"subnets {config_text(var.config.subnets)}, bridge {var.config.bridge}, "
            f"norm_eps {var.config.norm_eps:g}, {counted(var.config.num_heads, 'head')}, "
            f"quant_resi {vae.quant_resi:g}, using_znorm {vae.using_znorm}"
        )


def _read(command: Convert, folder: Path | None, checkpoint: Path | None) -> VARiant:
    dtype = check_dtype("convert", command.dtype)
    if checkpoint is not None:
        var, vae, extra = models_of(
            checkpoint, weights=command.weights, vae=command.vae, dtype=dtype
        )
        model = VARiant(var, vae)
        model.extra = finite(extra)
        return model
    if folder is not None:
        var, vae, config = load_model(folder, dtype)
        model = VARiant(var, vae)
        model.extra = {k: finite(v) for k, v in config.items() if k not in ("format", "var", "vae")}
        return model
    assert command.var is not None
    assert command.vae is not None
    models = load_original(
        fetched(command.var),
        fetched(command.vae),
        dtype=dtype,
        weights=command.weights,
        op="convert",
        **{name: getattr(command, name) for name in CHECKS},
    )
    return VARiant(*models).eval()


def _check_options(command: Convert) -> None:
    """Raises: UserError, unless there is one kind of input, and an output."""
    files = (command.var, command.vae)
    if command.checkpoint is not None:
        if command.var is not None or command.model is not None:
            raise UserError("convert: a checkpoint is read alone, without --var and --model")
    elif (command.model is None) == (files == (None, None)) or (None in files and any(files)):
        raise UserError("convert: give --var and --vae, or --model, to read; or a checkpoint")
    if (command.to_var is None) != (command.to_vae is None):
        raise UserError("convert: --to-var and --to-vae go together; got one of them")
    if command.out is None and command.to_var is None:
        raise UserError("convert: give --out FOLDER, or --to-var and --to-vae, to write")
    if command.model is not None or command.checkpoint is not None:
        holder, others = ("--model", ("weights",)) if command.model else ("the checkpoint", ())
        for name in (*CHECKS, *others):
            if getattr(command, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UserError(f"convert: {option} is for --var and --vae; {holder} holds it")


def _check_outputs(command: Convert, inputs: list[Path]) -> None:
    """Raises: UserError, for an output that would destroy an input or another file."""
    outputs: dict[Path, str] = {}
    for name, path in (("--to-var", command.to_var), ("--to-vae", command.to_vae)):
        if path is not None:
            check_ending(f"convert {name}", path)
            outputs[path] = name
            with checked_path(path):
                if not path.is_dir():  # refused below, in other words
                    check_file(path)
    if command.to_var is not None and len({*map(os.path.realpath, outputs)}) < 2:
        raise UserError(
            f"convert: --to-var and --to-vae must be two files; got {command.to_var} twice"
        )
    if command.out is not None:
        if command.out.exists() and not command.out.is_dir():
            raise UserError(f"convert: --out must be a folder; {command.out} is a file")
        with checked_path(command.out):
            check_folder(command.out)
        for file in FOLDER_FILES:
            if os.path.realpath(command.out / file) in map(os.path.realpath, outputs):
                raise UserError(
                    f"convert: --out writes {command.out / file} too; give another name"
                )
        outputs |= {command.out / file: "--out" for file in FOLDER_FILES}
    _check_nesting(outputs)
    sources = [file for path in inputs for file in _files_of(path)]
    for path, name in outputs.items():
        if path.is_dir():
            raise UserError(f"convert: {name} must be a file; {path} is a folder")
        if not path.exists():
            continue
        source = next((file for file in sources if path.samefile(file)), None)
        if source is not None:
            raise UserError(
                f"convert: {name} would overwrite the input {source}; give another name"
            )
        # A README.md of the user is kept by save_pretrained.
        if not command.overwrite and path.name != CARD_NAME:
            raise UserError(f"convert: {name}: {path} exists; --overwrite replaces it")


def _check_nesting(outputs: Mapping[Path, str]) -> None:
    """Raises: UserError, for an output whose place another one needs as a folder."""
    folders = {parent: path for path in outputs for parent in Path(os.path.realpath(path)).parents}
    for path, name in outputs.items():
        below = folders.get(Path(os.path.realpath(path)))
        if below is not None:
            raise UserError(
                f"convert: {name} must be a file; {path} is a folder of {outputs[below]}, which "
                f"writes {below}"
            )


def _files_of(path: Path) -> list[Path]:
    """The existing files that reading an input may need: itself, or those of the folder."""
    if path.is_dir():
        names = [path / name for name in (CONFIG_NAME, *WEIGHTS_NAMES)]
        return [file for file in (*names, *path.glob("*.safetensors")) if file.exists()]
    shards = path.parent.glob("*.safetensors") if path.name.endswith(".json") else ()
    return [file for file in (path, *shards) if file.exists()]
