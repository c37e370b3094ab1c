"""One optimiser step: ours at each depth, and the original VAR code's with its dense mask.

    python -m benchmarks.training_step --model var-d30 --batch 64 --depths 30 16 --json FILE \
        [--device cuda] [--dtype bfloat16] [--bridge 6] [--runs 10] [--var-repo PATH]

A step is: forward under autocast, mean cross-entropy over all tokens (ours in chunks, as in
training), backward, clipping to norm 1 (ours inside AdamW, as in training), AdamW (fused). Both
models share weights, gradients and the optimiser, so that the memory holds a large model once;
their steps run interleaved. Without ``--var-repo`` only our depths are compared. Each depth stands
beside the ratio that it would have to full depth if products with weights took all the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import TRAINING
from variant.bench.environment import environment
from variant.bench.interleaved import quartiles, ratios, time_interleaved
from variant.bench.models import build, configs
from variant.bench.result_file import write_result
from variant.cli.progress import Advance, progress
from variant.errors import UserError
from variant.models.flops import ceiling
from variant.training.loss_scale import LossScaler
from variant.training.optim import clipped_step, gradient_norm

ORIGINAL = "original, dense mask"


def step_of(
    loss_of: Callable[[], Tensor],
    update: Callable[[], None],
    optimizer: torch.optim.Optimizer,
    device: str,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """A whole optimiser step around one forward pass; returns the loss before it.

    Args:
        update: clips the gradients and changes the weights.
    """

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class TrainingSteps:
    """The steps of one model, ours at each depth and the original's, ready to be timed.

    Raises:
        UserError: a depth or a bridge that the model cannot have, or no clone at --var-repo.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device, dtype = options.device, getattr(torch, options.dtype)
        config, vae_config = configs(options.model)
        var, vae = build(options.model, device)
        var.train().requires_grad_(True)
        parameters = list(var.parameters())
        # A learning rate so small that all rounds have the same weights.
        optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
        generator = torch.Generator().manual_seed(0)
        tokens_BL = torch.randint(
            config.vocab_size, (options.batch, var.layout.total), generator=generator
        ).to(device)
        labels_B = torch.randint(config.num_classes, (options.batch,), generator=generator)
        labels_B = labels_B.to(device)
        with torch.no_grad():
            x_teacher = vae.teacher_input(tokens_BL)
        scaler = LossScaler(device, enabled=False)

        def update() -> None:
            clipped_step(optimizer, scaler, gradient_norm(var), 1.0)

        def original_update() -> None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        self.calls: dict[str, Callable[[], Tensor]] = {}
        self.full = f"depth {config.depth}"
        self.ceilings: dict[str, float] = {}
        for depth in options.depths:
            full = depth == config.depth
            try:
                schedule = var.schedule(None if full else depth, options.bridge)
            except ValueError as error:
                raise UserError(f"--depths {depth}: {error}") from error
            self.ceilings[f"depth {depth}"] = ceiling(config, schedule)
            self.calls[f"depth {depth}"] = step_of(
                lambda schedule=schedule: (
                    var(labels_B, x_teacher, schedule, targets_BL=tokens_BL).mean
                ),
                update,
                optimizer,
                device,
                dtype,
            )
        self.peer = self.full
        if options.var_repo is not None:
            from variant.bench.original_var import load

            original = load(options.var_repo, config, vae_config, (var, vae), device).var.train()
            for name, parameter in var.named_parameters():
                owner, _, leaf = name.rpartition(".")
                setattr(original.get_submodule(owner), leaf, parameter)

            def original_loss() -> Tensor:
                logits_BLV = original(labels_B, x_teacher).float()
                return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())

            self.calls[ORIGINAL] = step_of(original_loss, original_update, optimizer, device, dtype)
            self.peer = ORIGINAL
        if self.peer not in self.calls:
            text = f"--depths: {config.depth} (full) must be among them without --var-repo"
            raise UserError(text)
        self.losses: dict[str, float] = {}

    def _recorded(self, name: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = self.calls[name]()
            if name not in self.losses:  # of the first step, which is not timed
                self.losses[name] = float(loss)
            return loss

        return step

    def result(self, runs: int, advance: Advance = lambda steps, what: None) -> dict[str, Any]:
        """Seconds of each implementation over ``runs`` rounds, ratios to the peer.

        Args:
            advance: called after every step or group of short ones, ``runs`` + 1 times for each
                implementation.
        """
        options = self.options
        calls = {name: self._recorded(name) for name in self.calls}
        if options.device == "cuda" and not self.losses:
            for call in calls.values():  # compiles kernels, which would make a short step look long
                call()
        samples = time_interleaved(
            calls,
            rounds=runs,
            device=options.device,
            on_sample=lambda name: advance(1, name),
        )
        rows = [
            {
                "implementation": name,
                "loss": self.losses[name],
                "rounds": len(own.seconds),
                "median": own.median,
                "quartiles": own.quartiles,
                "ratio_to_peer": statistics.median(ratios(samples[self.peer], own)),
                "ratio_quartiles": quartiles(ratios(samples[self.peer], own)),
            }
            for name, own in samples.items()
        ]
        for row in rows:
            name = row["implementation"]
            if name in self.ceilings and self.full in samples:
                speed_up = statistics.median(ratios(samples[self.full], samples[name]))
                row |= {"speed_up": speed_up, "ceiling": self.ceilings[name]}
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
        return {
            "format": TRAINING,
            "environment": environment(),
            "model": options.model,
            "batch": options.batch,
            "bridge": options.bridge,
            "dtype": options.dtype,
            "device": options.device,
            "peer": self.peer,
            "peak_device_bytes": peak,
            "steps": rows,
        }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result of ``options.runs`` rounds.

    Raises:
        UserError: as :class:`TrainingSteps`.
    """
    print(f"building {options.model} with random weights", file=sys.stderr, flush=True)
    steps = TrainingSteps(options)
    names = ", ".join(steps.calls)
    print(f"{options.runs} rounds after a first one: {names}", file=sys.stderr, flush=True)
    total = (options.runs + 1) * len(steps.calls)
    with progress("training step", "measuring", total, options.json) as advance:
        return steps.result(options.runs, advance)


def _share(row: dict[str, Any]) -> str:
    if row.get("ceiling", 1) == 1:
        return ""
    share = row["speed_up"] / row["ceiling"]
    return f"   {row['speed_up']:.2f} x full depth, {share:.0%} of {row['ceiling']:.2f} by products"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("--model", default="var-d30")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 16])
    parser.add_argument("--bridge", type=int, default=6)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--var-repo", type=Path)
    options = parser.parse_args(arguments)
    try:
        result = measure(options)
        write_result(options.json, result)
    except UserError as error:
        print(f"benchmarks.training_step: {error}", file=sys.stderr)
        return 1
    for row in result["steps"]:
        print(
            f"{row['implementation']:24} {row['median'] * 1e3:10.1f} ms   "
            f"{row['ratio_to_peer']:5.2f} x {result['peer']}   loss {row['loss']:.4f}{_share(row)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
