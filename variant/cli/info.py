"""``variant info``: a description of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from variant.checkpoints.config_file import read_config
from variant.checkpoints.locate import locate
from variant.checkpoints.model_card import facts
from variant.checkpoints.model_folder import load_model
from variant.cli.dtypes import DTYPES
from variant.cli.kv_error_table import kv_error_table, measure_with_progress
from variant.cli.messages import plain
from variant.cli.options import Info
from variant.cli.output import check_json, console, mebibytes, table, write_json
from variant.cli.words import refuse_given
from variant.engine.engine import Engine
from variant.engine.planning import depths_of, plan_row
from variant.models.class_names import listed
from variant.models.config import VARConfig
from variant.models.parameter_count import zone_parameters
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant_kernels import select_layers
from variant_kernels.arguments import integer
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.wording import counted

# Logits of every image are compared at once; a few images have thousands of tokens.
MAX_IMAGES = 1024


def info(command: Info) -> None:
    """Print sizes, subnets with their layers and cache, and the record of the training."""
    integer("info", "--images", command.images, 1, MAX_IMAGES)
    if command.kv_dtype is None:
        refuse_given("info", command, ("dtype", "images"), "for --kv-dtype fp8")
    check_json("info", command.json)
    folder = locate(command.model)
    var, vae, _ = load_model(folder)
    training = read_config(folder).get("training")
    described = _described(command.model, var, vae, training)
    out = console(command.json)
    _print(out, described, var.config)
    if command.kv_dtype is not None:
        dtype = DTYPES[command.dtype] if command.dtype else None
        engine = Engine(var.eval(), vae.eval(), dtype=dtype)
        errors = measure_with_progress(engine, command.images, command.json)
        out.print(kv_error_table(command.model, errors))
        described["kv_error"] = [asdict(error) for error in errors]
    write_json(command.json, described)


def zone_text(config: VARConfig) -> str:
    """One line: the zone weights of a model and their number of parameters."""
    counts = [f"depth {d}: {zone_parameters(config, d):,}" for d in config.subnets]
    rank = f" of rank {config.lora_rank}" if config.lora_rank else ""
    adaln = " and adaLN" if config.zone_weights == "lora" and config.zone_adaln else ""
    return f"zone weights: {config.zone_weights}{rank}{adaln}; parameters: {', '.join(counts)}"


def _described(model: str, var: VAR, vae: VQVAE, training: object) -> dict[str, Any]:
    """The model as plain values; K/V bytes are those of one image with guidance."""
    config, layout = var.config, var.config.layout
    dtype = var.head.weight.dtype
    parameters = [sum(p.numel() for p in module.parameters()) for module in (var, vae)]
    flexible = 0 if config.bridge is None else layout.total - sum(layout.tokens[: config.bridge])
    return {
        "format": "variant-info-1",
        "model": model,
        "image_size": vae.config.image_size,
        "tokens": layout.total,
        "flexible_tokens": flexible,
        "dtype": dtype_name(dtype),
        "var_parameters": parameters[0],
        "vae_parameters": parameters[1],
        "var": config.to_dict(),
        "vae": vae.config.to_dict(),
        "depths": [] if config.bridge is None else _depths(config, dtype),
        "training": training if isinstance(training, dict) else None,
    }


def _depths(config: VARConfig, dtype: object) -> list[dict[str, Any]]:
    assert config.bridge is not None
    depths = []
    for depth in depths_of(config):
        row = plan_row(config, depth, config.bridge, 1, dtype)
        trained = depth == config.depth or depth in config.subnets
        layers = config.subnets.get(depth, select_layers(config.depth, depth))
        depths.append(
            {
                "depth": depth,
                "layers": list(layers),
                "trained": trained,
                "kv_bytes": row.ours,
                "paper_scheme_bytes": row.paper_same,
            }
        )
    return depths


def _print(out: Console, described: dict[str, Any], config: VARConfig) -> None:
    layout, side = config.layout, described["image_size"]
    out.print(
        f"{described['model']}: {counted(config.depth, 'layer')}, width {config.embed_dim}, "
        f"{counted(config.num_heads, 'head')}, {counted(config.num_classes, 'class')}; "
        f"{counted(layout.num_scales, 'scale')} "
        f"{config.patch_nums}, {counted(layout.total, 'token')}, {side}x{side} pixels"
    )
    out.print(
        f"transformer {counted(described['var_parameters'], 'parameter')} ({described['dtype']}), "
        f"VQ-VAE {counted(described['vae_parameters'], 'parameter')}, codebook "
        f"{config.vocab_size} x {config.vae_channels}"
    )
    if config.zone_weights != "shared":
        out.print(zone_text(config))
    if config.class_names:
        out.print(f"classes {listed(config.class_names)}", markup=False)
    if config.bridge is None:
        out.print("no subnets are recorded: the model was trained at full depth only")
    else:
        depths = table(
            f"depths (bridge {config.bridge}: every layer runs at the first "
            f"{counted(config.bridge, 'scale')}; {described['flexible_tokens']} of "
            f"{counted(layout.total, 'token')} in the flexible zone)",
            "depth",
            "layers",
            "K/V of one image",
            "of the paper's scheme",
        )
        for row in described["depths"]:
            layers = "all" if row["depth"] == config.depth else str(row["layers"])
            depths.add_row(
                str(row["depth"]),
                layers if row["trained"] else f"{layers} (not trained)",
                mebibytes(row["kv_bytes"]),
                f"{row['kv_bytes'] / row['paper_scheme_bytes']:.1%}",
            )
        out.print(depths)
    for key, value in (described["training"] or {}).items():
        if key == "settings":
            continue  # too long to print; config.json holds them
        # Of the file, which may hold any values.
        out.print(f"training {key}: {plain(facts(value))}")
