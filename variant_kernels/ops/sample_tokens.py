"""Guidance, top-k, top-p and the draw in one op: ``sample_tokens``.

Axes: B images (their conditional rows come first, then their unconditional rows), T tokens of this
call, V codebook entries, R = B * T rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from variant_kernels.arguments import instance, integer, real
from variant_kernels.cpu_ops.values import raise_bad_row
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend, Launcher
from variant_kernels.dispatch.support import (
    always,
    cpu_unsupported,
    cuda_unsupported,
    triton_unsupported,
)
from variant_kernels.ops import contract
from variant_kernels.ops.derivatives import refuse_derivatives
from variant_kernels.ops.registry import Op

MAX_SEED = 2**63 - 1  # of int64

# --- the definition -----------------------------------------------------------------------------


def guide(logits_2BTV: Tensor, guidance: float) -> Tensor:
    """(1 + t) * cond - t * uncond in float32, each product rounded (no fused multiply-add)."""
    cond_BTV, uncond_BTV = logits_2BTV.to(torch.float32).chunk(2)
    if guidance == 0:
        return cond_BTV.clone()
    return cond_BTV * (1 + guidance) - uncond_BTV * guidance


def filter_logits(logits_BTV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k and then top-p drop."""
    if 0 < top_k < logits_BTV.shape[-1]:
        kth_BT1 = logits_BTV.topk(top_k, dim=-1).values[..., -1:]
        logits_BTV = logits_BTV.masked_fill(logits_BTV < kth_BT1, -torch.inf)
    if top_p > 0:
        ascending_BTV, order_BTV = logits_BTV.sort(dim=-1, stable=True)
        drop_BTV = ascending_BTV.softmax(-1).cumsum(-1) <= 1 - top_p
        drop_BTV[..., -1] = False
        drop_BTV = torch.zeros_like(drop_BTV).scatter(-1, order_BTV, drop_BTV)
        logits_BTV = logits_BTV.masked_fill(drop_BTV, -torch.inf)
    return logits_BTV


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; masking the arithmetic shift gives the high word.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & mask) ^ c1 ^ k0,
            product1 & mask,
            ((product0 >> 32) & mask) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def uniform(seed: int, image_ids_B: Tensor, position: int, tokens: int) -> Tensor:
    """(B, T) float64 in [0, 1), 53 random bits keyed by (seed, image, position)."""
    mask = 0xFFFFFFFF
    position_T = position + torch.arange(tokens, device=image_ids_B.device)
    image_B1 = image_ids_B.unsqueeze(1)
    counter = torch.broadcast_tensors(
        position_T, torch.zeros_like(position_T), image_B1 & mask, (image_B1 >> 32) & mask
    )
    w0, w1, _, _ = philox_4x32(counter, (seed & mask, (seed >> 32) & mask))
    bits_BT = ((w0 >> 5) << 26) + (w1 >> 6)
    return bits_BT.to(torch.float64) * 2.0**-53


def reference_sample_tokens(
    *,
    logits_2BTV: Tensor,
    guidance: float | Tensor,
    top_k: int,
    top_p: float,
    seed: int | Tensor,
    image_ids_B: Tensor,
    position: int,
    exponential_RV: Tensor | None,
) -> Tensor:
    kept_BTV = filter_logits(guide(logits_2BTV, float(guidance)), top_k, top_p)
    batch, tokens, entries = kept_BTV.shape
    check_rows("sample_tokens", kept_BTV)
    largest_BT1 = kept_BTV.amax(-1, keepdim=True)
    # Rows are not checked on a GPU: one without a finite logit gives token 0.
    good_BT = torch.isfinite(largest_BT1).squeeze(-1)
    if exponential_RV is not None:
        probs_RV = kept_BTV.softmax(-1).view(-1, entries)
        return (probs_RV / exponential_RV).argmax(-1).view(batch, tokens) * good_BT
    # Inverse transform in float64, so that backends agree but for about 1 draw in a million.
    wide_BTV = kept_BTV.to(torch.float64)
    weights_BTV = (wide_BTV - largest_BT1).exp()
    mass_BTV = weights_BTV.cumsum(-1)
    draw_BT = uniform(int(seed), image_ids_B, position, tokens)
    target_BT1 = draw_BT.unsqueeze(-1) * mass_BTV[..., -1:]
    token_BT = torch.searchsorted(mass_BTV, target_BT1, right=True).squeeze(-1)
    # u * total may round up to the total: then the last kept entry is meant.
    last_BT = entries - 1 - (weights_BTV > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(token_BT, last_BT) * good_BT


def check_rows(op: str, logits_BTV: Tensor) -> None:
    """Every row has a finite largest logit; checked on the CPU only: a GPU would synchronise."""
    if logits_BTV.device.type != "cpu":
        return
    # A NaN anywhere makes the maximum NaN.
    bad = (~torch.isfinite(logits_BTV.amax(-1))).nonzero()
    if len(bad):
        image, token = (int(i) for i in bad[0])
        raise_bad_row(op, image, token)


# --- the declaration ----------------------------------------------------------------------------


def _check(
    logits_2BTV: Tensor, image_ids_B: Tensor | None, exponential_RV: Tensor | None = None
) -> None:
    op = "sample_tokens"
    contract.check_float(op, "logits_2BTV", logits_2BTV, contract.FLOAT_DTYPES)
    contract.check_ndim(op, "logits_2BTV", logits_2BTV, "(2B, T, V)")
    if logits_2BTV.shape[0] % 2 or logits_2BTV.shape[-1] < 1:
        raise ValueError(
            f"{op}: logits_2BTV must have an even number of rows (conditional, then "
            f"unconditional) and V >= 1; got {tuple(logits_2BTV.shape)}"
        )
    if image_ids_B is not None:
        batch = logits_2BTV.shape[0] // 2
        contract.check_tensor(op, "image_ids", image_ids_B)
        contract.check_shape(op, "image_ids", image_ids_B, (batch,), "to match logits_2BTV")
        if image_ids_B.dtype != torch.int64:
            raise TypeError(f"{op}: image_ids must be int64; got {image_ids_B.dtype}")
        contract.check_device(op, "image_ids", image_ids_B, "logits_2BTV", logits_2BTV)


def _request(logits: Tensor, *_: Tensor | None) -> Request:
    return Request(logits.device.type, (logits.dtype,), row_width=logits.shape[-1])


def _launch(launcher: Launcher, arguments: dict[str, Any]) -> Tensor:
    logits_2BTV = arguments["logits_2BTV"]
    if arguments["seed"] is None:
        arguments["seed"] = int(torch.randint(MAX_SEED, (), device="cpu"))
    image_ids_B = arguments.pop("image_ids")
    if image_ids_B is None:
        image_ids_B = torch.arange(logits_2BTV.shape[0] // 2, device=logits_2BTV.device)
    return launcher(**arguments, image_ids_B=image_ids_B)


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((logits.shape[0] // 2, logits.shape[1]), dtype=torch.int64)


sample_tokens_op = Op(
    "sample_tokens(Tensor logits_2BTV, float guidance, int top_k, float top_p, int? seed,"
    " Tensor? image_ids, int position, Tensor? exponential_RV, str backend) -> Tensor",
    check=_check,
    request=_request,
    fake=_fake,
    launch=_launch,
    backends={
        "triton": Backend(triton_unsupported, "triton_ops.sample_tokens.launch_sample_tokens"),
        "cuda": Backend(cuda_unsupported, "cuda_ops.sample_tokens.launch_sample_tokens"),
        "cpu": Backend(cpu_unsupported, "cpu_ops.sample_tokens.launch_sample_tokens"),
        "reference": Backend(always, reference_sample_tokens),
    },
    tags=(torch.Tag.nondeterministic_seeded,),
)


# --- public function ----------------------------------------------------------------------------


def draw_exponential(logits_2BTV: Tensor, generator: torch.Generator) -> Tensor:
    """(R, V) float32 from Exponential(1), as ``torch.multinomial`` draws them for one sample.

    One draw of multinomial is argmax(p / e), so guidance and filters can still be fused.
    """
    num_sequences, tokens, entries = logits_2BTV.shape
    shape = (num_sequences // 2 * tokens, entries)
    empty_RV = torch.empty(shape, dtype=torch.float32, device=logits_2BTV.device)
    return empty_RV.exponential_(1, generator=generator)


def sample_tokens(
    logits_2BTV: Tensor,
    *,
    guidance: float,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | None = None,
    image_ids: Tensor | None = None,
    position: int = 0,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draw one token per position from guided, filtered logits.

        logits = (1 + guidance) * cond - guidance * uncond            (float32)
        top_k keeps every logit >= the k-th largest (ties stay); then top_p sorts ascending and
        drops those whose cumulative probability is <= 1 - top_p, never the largest.

    The draw inverts the distribution function at a Philox4x32-10 number keyed by
    (seed, image id, position): for equal logits the same seed and id give the same token whatever
    the batch, its order or the thread count. With ``generator`` it is the draw of
    ``torch.multinomial``, as the original VAR code makes it.
    Sources: VAR (arXiv 2404.02905); classifier-free guidance (arXiv 2207.12598); Philox (Salmon et
    al., SC 2011).

    Args:
        logits_2BTV: (2B, T, V), conditional rows first; float32, float16 or bfloat16.
        guidance: t >= 0, the weight at this scale; at 0 unconditional rows are not read.
        top_k: entries to keep; 0 keeps all.
        top_p: probability mass to keep, in [0, 1]; 0 keeps all.
        seed: 0 <= seed < 2^63; None draws one from torch's default generator.
        image_ids: (B,) int64, which image each row is; None is 0..B-1.
        position: of the first token in the whole sequence.
        generator: draw as ``torch.multinomial`` does; excludes ``seed``. Not under
            ``torch.compile(fullgraph=True)``: Dynamo takes no generator.
    Returns:
        tokens (B, T) int64.
    Raises:
        ValueError: a shape or value out of range; seed and generator together; (CPU) a row
            without a finite logit or with NaN or +inf: on a GPU, where values are not checked, it
            gives token 0.  TypeError: dtype not listed, or an argument of another type.
        NotImplementedError: a derivative or a vmap is wanted.
    Gradient: none.
    """
    op = "sample_tokens"
    guidance = real(op, "guidance", guidance, 0)
    top_k = integer(op, "top_k", top_k, 0, 2**31 - 1, "(0 keeps all)")
    top_p = real(op, "top_p", top_p, 0, 1, "(0 keeps all)")
    # Logits of another rank, and nested ones, which have no shape, fail the op's check.
    is_BTV = isinstance(logits_2BTV, Tensor) and not logits_2BTV.is_nested
    is_BTV = is_BTV and logits_2BTV.ndim == 3
    last = 2**32 - (logits_2BTV.shape[1] if is_BTV else 0)
    position = integer(op, "position", position, 0, last, "(position + T is at most 2^32)")
    if seed is not None and generator is not None:
        raise ValueError(f"{op}: seed and generator exclude each other; got both")
    if seed is not None:
        seed = integer(op, "seed", seed, 0, MAX_SEED)
    exponential_RV = None
    if generator is not None:
        instance(op, "generator", generator, torch.Generator)
        sample_tokens_op.check(logits_2BTV, image_ids)
        if generator.device.type != logits_2BTV.device.type:
            raise ValueError(
                f"{op}: generator must be on the device of logits_2BTV ({logits_2BTV.device}); "
                f"got {generator.device}"
            )
        refuse_derivatives(op, logits_2BTV)
        exponential_RV = draw_exponential(logits_2BTV, generator)
    return sample_tokens_op(
        logits_2BTV,
        guidance,
        top_k,
        top_p,
        seed,
        image_ids,
        position,
        exponential_RV,
        backend,
    )


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, dict]]:
    """One token, ragged vocabularies, ties, every filter, strided rows."""
    cases = []
    for batch, tokens, entries, filters in (
        (1, 1, 1, {"top_k": 1}),
        (2, 3, 37, {"top_k": 5}),
        (3, 4, 100, {"top_p": 0.9}),
        (2, 9, 515, {"top_k": 40, "top_p": 0.96}),
        (2, 2, 4096, {"top_k": 900, "top_p": 0.96}),
        (1, 5, 64, {}),
        (1, 5, 64, {"top_k": 200, "top_p": 1.0}),
    ):
        logits = 3 * torch.randn(2 * batch, tokens, entries + 3, generator=generator, device="cpu")
        logits = logits.to(dtype)
        logits[..., 1::5] = logits[..., :1]
        cases.append((logits[..., :entries], filters))
    return cases
