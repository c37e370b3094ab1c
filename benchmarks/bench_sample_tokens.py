"""sample_tokens: guidance, top-k, top-p and the draw, and the same by a sequence of torch calls."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.harness import Case, Comparison, backends, replay
from variant_kernels import sample_tokens
from variant_kernels.dispatch.request import Request
from variant_kernels.ops.sample_tokens import (
    draw_exponential,
    filter_logits,
    guide,
    sample_tokens_op,
)

OP = "sample_tokens"
VOCAB, GUIDANCE, TOP_K, TOP_P, SEED = 4096, 1.5, 900, 0.96, 11
IMPLEMENTATIONS = ("triton", "cuda", "cpu", "op", "reference", "torch-calls")
CASES = [
    Case(
        f"batch{batch}-tokens{tokens}-{dtype}-{draw}",
        dtype,
        {"batch": batch, "tokens": tokens, "generator": draw == "generator"},
        quick=tokens == 16,
    )
    for batch, tokens in ((1, 16), (1, 256), (8, 256))
    for dtype in ("float32", "bfloat16")
    for draw in ("seed", "generator")
]
# The last scale of 64 images comes first: the time may end before the cases do.
CASES[:0] = [
    Case(
        f"batch64-tokens256-{dtype}-seed",
        dtype,
        {"batch": 64, "tokens": 256, "generator": False},
        devices=("cuda",),
    )
    for dtype in ("bfloat16", "float32")
]


def torch_calls(logits_2BTV, generator):
    """Sampling as the original VAR code composes it, in float32."""
    cond_BTV, uncond_BTV = logits_2BTV.float().chunk(2)
    guided_BTV = (1 + GUIDANCE) * cond_BTV - GUIDANCE * uncond_BTV
    lowest_BT1 = guided_BTV.topk(TOP_K, sorted=False).values.min(-1, keepdim=True).values
    guided_BTV.masked_fill_(guided_BTV < lowest_BT1, -torch.inf)
    ascending_BTV, order_BTV = guided_BTV.sort(-1)
    drop_BTV = ascending_BTV.softmax(-1).cumsum_(-1) <= 1 - TOP_P
    drop_BTV[..., -1] = False
    guided_BTV.masked_fill_(drop_BTV.scatter(-1, order_BTV, drop_BTV), -torch.inf)
    probs_NV = guided_BTV.softmax(-1).flatten(0, 1)
    drawn_N1 = torch.multinomial(probs_NV, 1, replacement=True, generator=generator)
    return drawn_N1.view(guided_BTV.shape[:2])


def build(case: Case, device: str, quick: bool) -> Comparison:
    """Logits with a standard deviation of three, about that of a trained model."""
    batch, tokens = case.settings["batch"], case.settings["tokens"]
    dtype = getattr(torch, case.dtype)
    logits = (3 * torch.randn(2 * batch, tokens, VOCAB, device=device)).to(dtype)
    generator = torch.Generator(device) if case.settings["generator"] else None
    image_ids_B = torch.arange(batch, device=device)

    def launch(impl):
        exponential_RV = None if generator is None else draw_exponential(logits, generator)
        return impl.forward(
            logits_2BTV=logits,
            guidance=GUIDANCE,
            top_k=TOP_K,
            top_p=TOP_P,
            seed=SEED,
            image_ids_B=image_ids_B,
            position=0,
            exponential_RV=exponential_RV,
        )

    calls, missing = {}, {}
    for name, impl, reason in backends(sample_tokens_op.backends, Request(device, (dtype,))):
        if reason is None:
            calls[name] = functools.partial(launch, impl)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op")
    source = {"seed": SEED} if generator is None else {"generator": generator}
    calls["op"] = lambda: sample_tokens(
        logits, guidance=GUIDANCE, top_k=TOP_K, top_p=TOP_P, **source
    )
    own = torch.Generator(device) if generator is None else generator
    calls["torch-calls"] = lambda: torch_calls(logits, own)

    # The entries kept in each row, and the reference's draw from the same random numbers.
    kept_BTV = filter_logits(guide(logits, GUIDANCE).double(), TOP_K, TOP_P) > -torch.inf
    drawn_BT = _reseeded(
        generator, functools.partial(launch, sample_tokens_op.backends["reference"])
    )

    def check(name, drawn):
        # In float32 an entry at the boundary may be kept or dropped.
        outside = (~kept_BTV.gather(-1, drawn.unsqueeze(-1))).sum()
        assert outside <= 1 + drawn.numel() // 1000, f"{name}: {int(outside)} were filtered out"
        if name in ours:
            own_BT = _reseeded(generator, calls[name])
            different = int((own_BT != drawn_BT).sum())
            assert different <= 1, (
                f"{name}: {different} of {drawn.numel()} tokens differ from the reference"
            )

    return Comparison(
        shape={"batch": batch, "tokens": tokens, "vocab": VOCAB, "top_k": TOP_K, "top_p": TOP_P},
        flop=0,
        moved=logits.nbytes + 8 * batch * tokens,
        calls=calls,
        missing=missing,
        peer="torch-calls",
        ours=ours,
        check=check,
    )


def _reseeded(generator, call):
    """The result of a call with the generator at its seed."""
    if generator is not None:
        generator.manual_seed(SEED)
    return call()


@pytest.mark.benchmark(timer=replay)
def test_sample_tokens(report_timing, device, case, implementation):
    report_timing(OP, case, device, implementation, build)
