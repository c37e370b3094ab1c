"""Shared by several commands: sizes as text, tables, configs of a model. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from variant.checkpoints.config_file import configs_in
from variant.checkpoints.locate import locate
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.presets import VAR_PRESETS, vqvae_of


def console() -> Console:
    """Standard output; plain and 120 columns wide where it is not a terminal."""
    # No markup: file names may hold brackets.
    out = Console(highlight=False, soft_wrap=True, markup=False)
    if not out.is_terminal:
        out.width = 120
    return out


def table(title: str, *columns: str) -> Table:
    """A table whose columns are right-aligned numbers."""
    result = Table(title=Text(title), title_justify="left", header_style="bold")
    for column in columns:
        result.add_column(column, justify="right")
    return result


def mebibytes(count: float) -> str:
    """``1,860 MiB``; small sizes in KiB."""
    if count < 2**20:
        return f"{count / 2**10:,.0f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def configs_of(model: str) -> tuple[VARConfig, VQVAEConfig]:
    """Configs of a preset or of a model folder, without reading weights."""
    if model in VAR_PRESETS and not Path(model).exists():
        config = VAR_PRESETS[model]
        return config, vqvae_of(config)
    return configs_in(locate(model))
