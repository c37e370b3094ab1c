"""``variant tokenize``: the images of a recipe as token shards."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from pathlib import Path

import torch

from variant.cli.options import Tokenize
from variant.cli.output import console
from variant.cli.progress import Advance, progress
from variant.cli.words import option_words
from variant.training import tokenize as training
from variant.training.overrides import override_words
from variant.training.recipe import load_recipe
from variant_kernels.wording import counted


def tokenize(command: Tokenize) -> None:
    """Write the shards of this process and print how to train from them."""
    recipe = load_recipe(command.recipe, seed=command.seed, overrides=command.overrides)
    run = Path("runs") / Path(command.recipe).stem
    out = command.out or run / "tokens"
    rank, world_size = training.rank_of_environment(os.environ)
    device = None
    if torch.cuda.is_available():
        gpu = training.gpu_of_environment(os.environ, torch.cuda.device_count())
        device = torch.device("cuda", gpu)
    done = 0
    with ExitStack() as stack:
        advance: Advance | None = None

        def report(samples: int, total: int, shard: str) -> None:
            nonlocal advance, done
            if advance is None:
                advance = stack.enter_context(progress("tokenize", "encoding", total))
            done += samples
            advance(samples, shard)

        try:
            result = training.tokenize(
                recipe,
                out,
                command.passes,
                vae_folder=command.vae or run,
                rank=rank,
                world_size=world_size,
                device=device,
                report=report,
            )
        except KeyboardInterrupt as stop:
            raise type(stop)(
                f"{counted(done, 'sample')} in {out}; the same command continues"
            ) from None
    printed = console(command="tokenize")
    rate = result.samples / result.seconds if result.seconds else 0.0
    printed.print(
        f"wrote {counted(result.samples, 'sample')} in {counted(result.shards, 'shard')} to {out} "
        f"({rate:,.0f} images/s); {done - result.samples:,} were there"
    )
    if result.missing:
        printed.print(f"missing: {counted(result.missing, 'shard')} of other processes")
    else:
        printed.print(f"next: {train_command(command, out)}")


def train_command(command: Tokenize, tokens: Path) -> str:
    """The shell command that trains from the shards, with the same values of the recipe."""
    words = ["variant", "train", *option_words("--recipe", command.recipe)]
    words += [] if command.vae is None else option_words("--out", command.vae)
    words += [] if command.seed is None else ["--seed", str(command.seed)]
    words += override_words(command.overrides)
    words += override_words(("data.kind=tokens", f"data.tokens={tokens}"))
    return shlex.join(words)
