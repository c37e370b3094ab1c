"""``variant train`` and ``variant train-vae``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from variant.commands.common import console, table

if TYPE_CHECKING:
    from variant.cli import Train, TrainVae
    from variant.train import Summary


def train(command: Train) -> None:
    """Train the recipe's transformer and say where the model is."""
    from variant.recipe import load_recipe
    from variant.train_var import train_var

    recipe = load_recipe(command.recipe, seed=command.seed)
    summary = train_var(recipe, command.out, resume=command.resume)
    _report(summary)
    console().print(f"wrote {command.out}: variant generate --model {command.out}")


def train_vae(command: TrainVae) -> None:
    """Train the recipe's VQ-VAE and say what comes next."""
    from variant.recipe import load_recipe
    from variant.train_vae import train_vae as run

    recipe = load_recipe(command.recipe, seed=command.seed)
    summary = run(recipe, command.out, resume=command.resume)
    _report(summary)
    console().print(f"next: variant train --recipe {command.recipe} --out {command.out}")


def _report(summary: Summary) -> None:
    found = table(
        f"{summary.steps} steps, {summary.epochs} epochs, {summary.seconds:.0f} s; best held-out "
        f"loss at epoch {summary.best_epoch}, whose weights are kept",
        "configuration",
        "training loss",
        "held-out loss",
    )
    for name, loss in summary.held_out_loss.items():
        trained = summary.train_loss.get(name)
        found.add_row(name, "-" if trained is None else f"{trained:.4f}", f"{loss:.4f}")
    console().print(found)
