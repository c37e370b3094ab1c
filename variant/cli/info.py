"""``variant info``: a description of a model."""

from __future__ import annotations

from variant.checkpoints.config_file import read_config
from variant.checkpoints.locate import locate
from variant.checkpoints.model_folder import load_model
from variant.cli.dtypes import DTYPES
from variant.cli.kv_error_table import kv_error_table, measure_with_progress
from variant.cli.options import Info
from variant.cli.output import console, mebibytes, table
from variant.engine.engine import Engine
from variant.engine.planning import depths_of, plan_row
from variant.errors import UserError
from variant_kernels import select_layers
from variant_kernels.dispatch.request import dtype_name


def info(command: Info) -> None:
    """Print sizes, subnets with their layers and cache, and the record of the training."""
    if command.images < 1:
        raise UserError(f"info: --images must be at least 1; got {command.images}")
    folder = locate(command.model)
    var, vae, _ = load_model(folder)
    config, out = var.config, console()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (var, vae)]
    dtype = var.head.weight.dtype
    layout = config.layout
    out.print(
        f"{command.model}: {config.depth} layers, width {config.embed_dim}, {config.num_heads} "
        f"heads, {config.num_classes} classes; {layout.num_scales} scales {config.patch_nums}, "
        f"{layout.total} tokens, {vae.config.image_size}x{vae.config.image_size} pixels"
    )
    out.print(
        f"transformer {sizes[0]:,} parameters ({dtype_name(dtype)}), "
        f"VQ-VAE {sizes[1]:,} parameters, codebook {config.vocab_size} x {config.vae_channels}"
    )
    if config.bridge is None:
        out.print("no subnets are recorded: the model was trained at full depth only")
    else:
        depths = table(
            f"depths (bridge {config.bridge}: every layer runs at the first {config.bridge} "
            f"scales; {layout.total - sum(layout.tokens[: config.bridge])} of {layout.total} "
            "tokens are in the flexible zone)",
            "depth",
            "layers",
            "K/V of one image",
            "of the paper's scheme",
        )
        for depth in depths_of(config):
            row = plan_row(config, depth, config.bridge, 1, dtype)
            if depth == config.depth:
                layers = "all"
            elif depth in config.subnets:
                layers = str(list(config.subnets[depth]))
            else:
                layers = f"{list(select_layers(config.depth, depth))} (not trained)"
            depths.add_row(str(depth), layers, mebibytes(row.ours), f"{row.share:.1%}")
        out.print(depths)
    training = read_config(folder).get("training")
    if isinstance(training, dict):
        for key, value in training.items():
            if key == "settings":
                continue  # too long to print; config.json holds them
            if isinstance(value, dict):
                value = ", ".join(f"{name} {loss:.4f}" for name, loss in value.items())
            out.print(f"training {key}: {value}")
    if command.kv_dtype is not None:
        dtype = DTYPES[command.dtype] if command.dtype else None
        engine = Engine(var.eval(), vae.eval(), dtype=dtype)
        out.print(kv_error_table(command.model, measure_with_progress(engine, command.images)))
