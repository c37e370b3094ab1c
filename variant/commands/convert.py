"""``variant convert``: the original repository's files and ours, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from variant.checkpoint import load_model, load_original, save_model, save_original
from variant.commands.common import console
from variant.errors import UserError
from variant.supernet import locate

if TYPE_CHECKING:
    from variant.cli import Convert


def convert(command: Convert) -> None:
    """Read one form, write the other, say what was written."""
    if (command.model is None) == (command.out is None):
        raise UserError(
            "convert: give --out FOLDER to read the .pth files, or --model FOLDER to write them"
        )
    out = console()
    if command.out is not None:
        var, vae = load_original(command.var, command.vae)
        save_model(command.out, var, vae)
        out.print(
            f"{command.out}: {var.config.depth} layers, width {var.config.embed_dim}, "
            f"{var.config.num_classes} classes, scales {var.config.patch_nums}"
        )
    else:
        var, vae, _ = load_model(locate(str(command.model)))
        save_original(var, vae, command.var, command.vae)
        out.print(f"{command.var} and {command.vae}: as the original VAR code loads them")
