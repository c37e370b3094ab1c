"""VAR and CoDe for ``benchmarks.dropin``: code of a checkout, random weights.

Axes: B images, L tokens of all scales, E codebook vector width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.dropin_case import DropinCase, foreign_modules
from variant import accelerate

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LABELS = (1, 7)


def build(family: str, repo: Path, small: bool, width: str = "d16") -> DropinCase:
    """A VAR, or CoDe's drafter and refiner.

    Args:
        small: few narrow layers, with all ten scales: CoDe's code assumes them.
        width: "d16" and so on: the number of layers; 64 channels per layer, as published.
    """
    depth = int(width.removeprefix("d"))
    layers, channels = (6, 64) if small else (depth, 64 * depth)
    vocab, ch = (64, 32) if small else (4096, 160)
    torch.manual_seed(0)
    with foreign_modules(repo, "models", "dist", "utils") as load:
        setattr(load("dist"), "__device", "cpu")
        models = load("models")

        def make(count: int) -> Any:
            var = models.VAR(
                vae_local=vae,
                num_classes=10 if small else 1000,
                depth=count,
                embed_dim=channels,
                num_heads=max(channels // 64, 2),
                attn_l2_norm=True,
                patch_nums=SIDES,
                drop_path_rate=0.1 * count / 24,
            )
            # Larger than the published initialisation, under which blocks change little.
            var.init_weights(init_adaln=0.5, init_adaln_gamma=0.1, init_head=1.0, init_std=-1)
            return var.eval()

        with contextlib.redirect_stdout(io.StringIO()):  # the constructor prints its sizes
            vae = models.VQVAE(
                vocab_size=vocab,
                z_channels=8 if small else 32,
                ch=ch,
                test_mode=True,
                v_patch_nums=SIDES,
            )
            var = make(layers)
            refiner = make(max(layers // 2, 2)) if family == "code" else None
    # Pixels are not compared, and the time is that of the transformer.
    vae.fhat_to_img = lambda f_hat: f_hat.clone()
    others = () if refiner is None else (refiner,)
    generate = _var(var, small) if refiner is None else _code(var, refiner)

    def run(seed: int, greedy: bool) -> Tensor:
        with _inputs(vae.quantize.embedding) as tokens:
            generate(seed, greedy)
        return torch.cat(tokens, dim=1)

    def logits() -> Tensor:
        with contextlib.ExitStack() as stack:
            by_model = [stack.enter_context(_outputs(m.head)) for m in (var, *others)]
            generate(0, True)
        return torch.cat([out.flatten(0, 1).float() for outs in by_model for out in outs])

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        words = torch.randn(2, var.L - 1, var.Cvae, generator=generator)
        targets = torch.randint(vocab, (2 * var.L,), generator=generator)
        torch.manual_seed(2)  # for label dropout and stochastic depth
        out_BLV = var(torch.tensor(LABELS), words)
        return F.cross_entropy(out_BLV.flatten(0, 1), targets)

    return DropinCase(
        model=var,
        run=run,
        logits=logits,
        loss=loss,
        scales=tuple(side * side for side in SIDES),
        layers=layers,
        outside=vocab / (12 * channels * layers),  # head: C x V; a layer: 12 C x C
        others=others,
        accelerate=None if others else _accelerated(var, vae, small),
    )


def _labels(small: bool) -> Tensor:
    return torch.tensor(LABELS if small else LABELS[:1])


def _var(var: Any, small: bool) -> Callable[[int, bool], Any]:
    labels_B = _labels(small)

    def generate(seed: int, greedy: bool) -> Any:
        top_k, top_p = (1, 0.0) if greedy else (900, 0.96)
        top_k = min(top_k, var.V)
        return var.autoregressive_infer_cfg(
            len(labels_B), labels_B, g_seed=seed, cfg=4.0, top_k=top_k, top_p=top_p
        )

    return generate


def _code(drafter: Any, refiner: Any) -> Callable[[int, bool], Any]:
    labels_B, steps = torch.tensor(LABELS), 7

    def generate(seed: int, greedy: bool) -> Any:
        options = {
            "B": len(labels_B),
            "label_B": labels_B,
            "cfg": 1.5,
            "top_k": [1 if greedy else min(600, drafter.V)] * len(SIDES),
            "top_p": 0.0 if greedy else 0.96,
            "g_seed": seed,
            "temp": [1.0 if greedy else 1.1] * steps + [1.0] * (len(SIDES) - steps),
        }
        f_hat, tokens = drafter.autoregressive_infer_cfg_draft(exit_num=steps, **options)
        return refiner.autoregressive_infer_cfg_refine(
            draft=tokens, f_hat=f_hat, entry_num=steps, **options
        )

    return generate


def _accelerated(var: Any, vae: Any, small: bool) -> Callable[[int, bool], Tensor]:
    labels_B, model = _labels(small), accelerate(var, vae)

    def run(seed: int, greedy: bool) -> Tensor:
        # The original's generator also draws missing labels; here labels are arguments, so it is
        # at its seed when the first token is drawn.
        top_k, top_p = (1, 0.0) if greedy else (min(900, var.V), 0.96)
        autocast = torch.is_autocast_enabled("cpu")
        engine = model.engine(torch.bfloat16 if autocast else torch.float32)
        with torch.autocast("cpu", enabled=False):
            return engine.generate(
                labels_B,
                cfg=4.0,
                top_k=top_k,
                top_p=top_p,
                generator=torch.Generator().manual_seed(seed),
                decode=False,
            ).tokens

    return run


@contextlib.contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, out: inputs.append(args[0].clone()))
    try:
        yield inputs
    finally:
        hook.remove()


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    try:
        yield outputs
    finally:
        hook.remove()
