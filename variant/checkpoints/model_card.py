"""The model card: the README.md of a model folder, as the Hugging Face Hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variant.engine.planning import depths_of, plan_row
from variant.errors import UserError
from variant.models.class_names import listed
from variant.models.config import VARConfig, VQVAEConfig
from variant.paths import open_regular, path_kind
from variant_kernels.wording import counted

CARD_NAME = "README.md"
# save_model overwrites a README.md that contains this line, and leaves any other alone.
MARK = "<!-- Written and renewed with the weights. Remove this line to keep your own text. -->"
TAGS = ("image-generation", "visual-autoregressive", "depth-supernet", "pytorch_model_hub_mixin")


def was_generated(path: Path) -> bool:
    """Whether save_model may write this README.md: it does not exist, or was generated."""
    if path_kind(path) is None:
        return True
    try:
        with open_regular(path) as file:
            return MARK in file.read().decode("utf-8", errors="replace")
    except (OSError, UserError):  # a folder, a named pipe, a file of somebody else
        return False


def model_card(
    var: VARConfig,
    vae: VQVAEConfig,
    model_id: str,
    dtype: str,
    training: object = None,
) -> str:
    """The text of a model card: Markdown below the Hub's metadata.

    Args:
        model_id: the argument of ``from_pretrained``: a Hub id or a folder.
        dtype: name of the dtype of the transformer's weights, e.g. "bfloat16".
        training: the entry "training" of config.json; one that is no dictionary is left out.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(library_name="variant", tags=list(TAGS)).to_yaml()
    layout, side = var.layout, vae.image_size
    sides = ", ".join(map(str, var.patch_nums))
    shared = ", one class projection shared by all layers" if var.shared_aln else ""
    parts = [
        f"---\n{metadata}\n---",
        MARK,
        f"# {model_id}",
        "A visual autoregressive (VAR) transformer and its VQ-VAE: class labels in, images out, "
        "scale by scale.",
        f"- {counted(var.depth, 'layer')}, width {var.embed_dim}, "
        f"{counted(var.num_heads, 'head')}{shared}; "
        f"{counted(var.num_classes, 'class')}; weights in {dtype}\n"
        f"- {side}x{side} pixels; {counted(layout.num_scales, 'scale')} with sides {sides}; "
        f"{counted(layout.total, 'token')}; codebook {var.vocab_size} x {var.vae_channels}",
        *([f"Classes: {listed(var.class_names)}."] if var.class_names else ()),
        "## Depths",
        _depths(var, dtype),
        "## How to run",
        _how_to_run(var, vae, model_id),
    ]
    if isinstance(training, Mapping) and training:
        lines = [f"- {key}: {facts(value)}" for key, value in training.items() if key != "settings"]
        parts += ["## Training", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _depths(var: VARConfig, dtype: str) -> str:
    """A table of the depths that were trained: their layers and the size of their K/V cache."""
    if var.subnets and var.bridge is not None:  # together, or neither
        text = (
            f"Every layer runs at the first {counted(var.bridge, 'scale')}, the listed ones at "
            f"the others. {_whose_weights(var)}"
        )
        depths = depths_of(var)
    else:
        text = (
            "No subnets are recorded: these weights were trained at full depth only. A list of "
            "layers runs any other depth, untrained."
        )
        depths = (var.depth,)
    rows = [
        "| depth | layers | K/V cache of one image with guidance | of caching everything |",
        "|---|---|---|---|",
    ]
    for depth in depths:
        row = plan_row(var, depth, var.bridge or 0, 1, dtype)
        layers = "all" if depth == var.depth else ", ".join(map(str, var.subnets[depth]))
        rows.append(f"| {depth} | {layers} | {row.ours / 2**20:,.2f} MiB | {row.share:.1%} |")
    plan = (
        f"Cache sizes are computed, not measured: K and V in {dtype}, pages of 16 tokens, each "
        "kept only until its last use (`variant plan` prints them for other batches and dtypes)."
    )
    return "\n\n".join((text, "\n".join(rows), plan))


def _whose_weights(var: VARConfig) -> str:
    own = {
        "adaln": "an adaLN projection of its own",
        "lora": f"low-rank additions (LoRA, rank {var.lora_rank})",
        "copies": "copies of its layers",
    }
    if var.zone_weights == "shared":
        return "The same weights serve every depth."
    return (
        f"There each smaller depth uses {own[var.zone_weights]}, which the full network does not "
        "use."
    )


def _how_to_run(var: VARConfig, vae: VQVAEConfig, model_id: str) -> str:
    depth = f", depth={min(var.subnets)}" if var.subnets else ""
    flag = f" --depth {min(var.subnets)}" if var.subnets else ""
    label = min(1, var.num_classes - 1)
    return f"""`pip install variant-kernels`, then

```python
from variant import VARiant

model = VARiant.from_pretrained("{model_id}")
result = model.generate([{label}]{depth}, cfg=1.5, top_p=0.96, seed=0)
result.images  # (1, {vae.in_channels}, {vae.image_size}, {vae.image_size}) in [0, 1]
```

or `variant generate --model {model_id} --labels {label}{flag} --out image.png`."""


def facts(value: Any) -> str:
    """A value of the entry "training" as text: ``full 3.8842, depth_2 3.8861``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {facts(item)}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
