"""``variant train`` and ``variant train-vae``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from variant.cli.messages import memory_for
from variant.cli.options import Train, TrainVae
from variant.cli.output import console, table
from variant.cli.words import option_words
from variant.training.overrides import override_words
from variant.training.recipe import load_recipe, starting_from
from variant.training.task import Summary
from variant.training.vae_task import train_vae as train_vae_recipe
from variant.training.var_task import train_var
from variant_kernels.tuning_switch import timing_allowed
from variant_kernels.wording import counted

LESS_MEMORY = "raise optim.accumulate, or lower optim.batch_size or the sizes of [model]"
LESS_MEMORY_OF_VAE = (
    "raise vae.optim.accumulate, or lower vae.optim.batch_size, vae.vocab_size or vae.ch"
)


def train(command: Train) -> None:
    """Train the recipe's transformer and print where the model is."""
    recipe = load_recipe(command.recipe, seed=command.seed, overrides=command.overrides)
    if command.start_from is not None:
        recipe = starting_from(recipe, command.start_from)
    out = folder_of(command)
    # A run has many steps of each shape.
    with memory_for(f"training of {command.recipe}", LESS_MEMORY), timing_allowed():
        summary = train_var(
            recipe, out, resume=command.resume, resume_command=resume_command("train", command)
        )
    _report(summary)
    generate = shlex.join(["variant", "generate", *option_words("--model", out)])
    console(command="train").print(f"wrote {out}: {generate}")


def train_vae(command: TrainVae) -> None:
    """Train the recipe's VQ-VAE and print the next command."""
    recipe = load_recipe(command.recipe, seed=command.seed, overrides=command.overrides)
    with memory_for(f"training of {command.recipe}", LESS_MEMORY_OF_VAE):
        summary = train_vae_recipe(
            recipe,
            folder_of(command),
            resume=command.resume,
            resume_command=resume_command("train-vae", command),
        )
    _report(summary)
    next_command = resume_command("train", command).removesuffix(" --resume")
    console(command="train-vae").print(f"next: {next_command}")


def folder_of(command: Train | TrainVae) -> Path:
    """The folder of the run's files."""
    return command.out or Path("runs") / Path(command.recipe).stem


def resume_command(name: str, command: Train | TrainVae) -> str:
    """The shell command that resumes this run, with as many processes."""
    words = [name, *option_words("--recipe", command.recipe)]
    words += option_words("--out", folder_of(command))
    if command.seed is not None:
        words += ["--seed", str(command.seed)]
    if isinstance(command, Train) and command.start_from is not None:
        words += option_words("--start-from", command.start_from)
    words += override_words(command.overrides)
    return f"{_program()} {shlex.join([*words, '--resume'])}"


def _program() -> str:
    """What starts this program, on as many processes as torchrun's variables say."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return "variant"
    # Of several machines each has its own options: their number, where they meet.
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE", size) == size
    options = f"--nproc-per-node {shlex.quote(size)}" if on_one_machine else "..."
    return f"torchrun {options} -m variant.cli"


def _report(summary: Summary) -> None:
    losses = table(
        f"{counted(summary.steps, 'step')}, {counted(summary.epochs, 'epoch')}, "
        f"{summary.seconds:.0f} s; best held-out "
        f"loss at epoch {summary.best_epoch}, whose weights are kept",
        "configuration",
        "training loss",
        "held-out loss",
    )
    for name, loss in summary.held_out_loss.items():
        train_loss = summary.train_loss.get(name)
        train_text = "-" if train_loss is None else f"{train_loss:.4f}"
        losses.add_row(name, train_text, f"{loss:.4f}")
    console(command="train").print(losses)
