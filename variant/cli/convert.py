"""``variant convert``: from the original repository's files to a model folder, and back."""

from __future__ import annotations

import os

from variant.checkpoints.locate import locate
from variant.checkpoints.model_folder import load_model
from variant.checkpoints.original_var import save_original
from variant.cli.dtypes import DTYPES
from variant.cli.options import Convert
from variant.cli.output import console
from variant.errors import UserError
from variant.supernet import VARiant


def config_text(subnets: dict[int, tuple[int, ...]]) -> str:
    """``2: [0, 7]; 4: [0, 2, 5, 7]``, or ``none``."""
    return "; ".join(f"{depth}: {list(layers)}" for depth, layers in subnets.items()) or "none"


def convert(command: Convert) -> None:
    """Read one form, write the other, print what was written."""
    if (command.model is None) == (command.out is None):
        raise UserError(
            "convert: give --out FOLDER to read the .pth files, or --model FOLDER to write them"
        )
    if os.path.realpath(command.var) == os.path.realpath(command.vae) and command.out is None:
        raise UserError(f"convert: --var and --vae must be two files; got {command.var} twice")
    out = console()
    dtype = DTYPES[command.dtype] if command.dtype else None
    if command.out is not None:
        model = VARiant.from_var_checkpoint(
            command.var, command.vae, num_heads=command.num_heads, dtype=dtype
        )
        model.save_pretrained(command.out)
        var = model.var
        out.print(
            f"{command.out}: {var.config.depth} layers, width {var.config.embed_dim}, "
            f"{var.config.num_classes} classes, scales {var.config.patch_nums}"
        )
    else:
        var, vae, _ = load_model(locate(str(command.model)), dtype)
        save_original(var, vae, command.var, command.vae)
        out.print(f"wrote {command.var} and {command.vae}, which the original VAR code loads")
        out.print(
            "They hold weights only. Not included, because no shape contains it: "
            f"subnets {config_text(var.config.subnets)}, bridge {var.config.bridge}, "
            f"norm_eps {var.config.norm_eps:g}, {var.config.num_heads} heads"
        )
