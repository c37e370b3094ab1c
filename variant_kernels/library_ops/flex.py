"""block_causal_attention by torch's FlexAttention, compiled.

B batch, L tokens, H heads, D width of one head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex


@cache
def block_mask(scale_lengths: tuple[int, ...], device: torch.device) -> flex.BlockMask:
    """A token sees its own scale and those before; created once for each layout and device."""
    scale_L = torch.repeat_interleave(
        torch.arange(len(scale_lengths), device="cpu"), torch.tensor(scale_lengths, device="cpu")
    ).to(device)
    length = sum(scale_lengths)
    return flex.create_block_mask(
        lambda b, h, q, kv: scale_L[q] >= scale_L[kv], None, None, length, length, device=device
    )


@cache
def attention() -> Callable[..., Any]:
    """FlexAttention compiled; uncompiled it would hold every score.

    ``fullgraph``: beyond torch's limit of shapes for one function (torch._dynamo.config's
    ``recompile_limit``) it raises; without it torch would continue uncompiled, silently.
    """
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)


def kernels_for(q_BLHD: torch.Tensor) -> str:
    """The kernels that FlexAttention is asked for: "FLASH" (flash-attn 4) where they can run.

    That is on Hopper and later, in 16 bits, without a gradient, with ``flash_attn.cute`` installed;
    "AUTO", torch's own choice among its Triton kernels, elsewhere. Torch raises where it cannot run
    what it is asked for, so nothing else runs silently.
    """
    usable = (
        q_BLHD.device.type == "cuda"
        and q_BLHD.dtype in (torch.float16, torch.bfloat16)
        and not (torch.is_grad_enabled() and q_BLHD.requires_grad)
        and _has_flash_4()
        and torch.cuda.get_device_capability(q_BLHD.device)[0] in (9, 10)
    )
    return "FLASH" if usable else "AUTO"


@cache
def _has_flash_4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn
        return False


def attend(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BLHD in q's dtype, lse_BHL float32: natural logarithm of the sum of exp(scores)).

    By the kernels of :func:`kernels_for`.
    Differentiable by torch's autograd, so a training step calls this and not an op around it.
    """
    # Inside autocast torch would cast q, k and v, and the result would have autocast's dtype.
    with torch.autocast(q_BLHD.device.type, enabled=False):
        out_BHLD, aux = attention()(
            *(x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD)),
            block_mask=block_mask(scale_lengths, q_BLHD.device),
            scale=softmax_scale,
            return_aux=flex.AuxRequest(lse=True),
            kernel_options={"BACKEND": kernels_for(q_BLHD)},
        )
    return out_BHLD.transpose(1, 2).contiguous(), aux.lse.float().contiguous()


def launch_block_causal_attention_forward(
    *,
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    scale_lengths: tuple[int, ...],
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BLHD, lse_BHL) as :func:`attend` gives them; no gradient is recorded here."""
    return attend(q_BLHD, k_BLHD, v_BLHD, scale_lengths, softmax_scale)


def refuse_backward(**arguments: Any) -> Any:
    """Inside a compiled graph the op runs FlexAttention without recording its gradient."""
    raise RuntimeError(
        'block_causal_attention: under torch.compile, "flex" has a gradient only where the call '
        'names it: pass backend="flex"'
    )
