"""Cross-entropy of a linear head without the logits of all tokens: ``linear_cross_entropy``.

Axes: B images, L tokens of an image, N tokens (B times L), C width, V codebook entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from variant.models.autocast import no_autocast
from variant_kernels.linear import product

# Logits at once: 8 MB in float32.
CHUNK_LOGITS = 2**21


class TokenLoss(NamedTuple):
    """mean: over all tokens, a scalar with a gradient.  losses_BL: of each token, without one."""

    mean: Tensor
    losses_BL: Tensor


def losses_of(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, given log-probabilities (..., V) and targets (...).

    ``F.cross_entropy`` leaves out targets of -100, and a mean over all tokens would count them as
    certain. No token is left out here: other targets than those of the codebook are errors.
    """
    if log_probs.shape[:-1] != targets.shape:  # gather takes less
        raise ValueError(
            f"token_loss: logits must be (*{tuple(targets.shape)}, V), as the targets are; got "
            f"{tuple(log_probs.shape)}"
        )
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class _LinearCrossEntropy(Function):
    """Loss and gradients chunk by chunk in the forward pass, as both need the same logits.

    The gradients are kept without the factor 1 / N and without that of loss scaling, so that those
    of likely tokens do not underflow in float16.
    """

    @staticmethod
    def forward(
        ctx: Any, h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(h_NC.dtype, torch.float32)
        cast_weight_VC, cast_bias_V = weight_VC.to(h_NC.dtype), bias_V.to(h_NC.dtype)
        losses_N = h_NC.new_empty(len(h_NC), dtype=wide)
        with_gradient = any(ctx.needs_input_grad)
        end = None if with_gradient else 0
        grad_h_NC = torch.empty_like(h_NC[:end])
        grad_weight_VC = torch.zeros_like(weight_VC[:end], dtype=wide)
        grad_bias_V = torch.zeros_like(bias_V[:end], dtype=wide)
        rows = max(1, CHUNK_LOGITS // len(weight_VC))
        for start in range(0, len(h_NC), rows):
            part = slice(start, start + rows)
            part_NC, target_N1 = h_NC[part], targets_N[part].unsqueeze(1)
            logits_NV = product(part_NC, cast_weight_VC, cast_bias_V).to(wide)
            losses_N[part] = losses_of(logits_NV.log_softmax(1), targets_N[part])
            if not with_gradient:
                del logits_NV  # before the next chunk makes its own
                continue
            # The gradient of a token's loss: softmax(logits) - onehot(target). Not the exponential
            # of the above: torch.exp took 3.3 ms for a chunk, softmax 1.5 (one thread of an EPYC).
            grad_NV = logits_NV.softmax(1)
            grad_NV.scatter_add_(1, target_N1, grad_NV.new_full(target_N1.shape, -1))
            grad_bias_V += grad_NV.sum(0)
            del logits_NV
            grad_NV = grad_NV.to(h_NC.dtype)
            grad_h_NC[part] = product(grad_NV, cast_weight_VC.t())
            if wide == h_NC.dtype:
                grad_weight_VC.addmm_(grad_NV.T, part_NC)
            else:
                grad_weight_VC += grad_NV.T @ part_NC
            del grad_NV
        if with_gradient:
            ctx.save_for_backward(grad_h_NC, grad_weight_VC, grad_bias_V)
            ctx.dtypes = h_NC.dtype, weight_VC.dtype, bias_V.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.mean(), losses_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_mean: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        factor = grad_mean / len(ctx.saved_tensors[0])
        # In the wide dtype: a factor in 16 bits would be off by the same share everywhere.
        grads = (
            (grad.to(factor.dtype) * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None


def linear_cross_entropy(
    h_BLC: Tensor, weight_VC: Tensor, bias_V: Tensor, targets_BL: Tensor
) -> TokenLoss:
    """``F.cross_entropy(F.linear(h, weight, bias).float(), targets)`` in chunks of tokens.

    No tensor of all logits is made or kept: the logits of one chunk have 8 MB in float32. Losses
    and sums of gradients are float32 (float64 for float64 input). torch 2.13 has
    ``F.linear_cross_entropy``; this one also returns the loss of each token, takes weights of
    another dtype than ``h``, and scales gradients after they are summed.

    Args:
        h_BLC: hidden states; the products are computed in their dtype.
        weight_VC, bias_V: of the linear head, of any float dtype.
        targets_BL: int64 in [0, V).
    Gradient of the mean: h_BLC, weight_VC, bias_V; no second derivative. Under torch.func's
    transforms and in forward mode all logits are kept, and every derivative is torch's.
    """
    with no_autocast(h_BLC):
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return _from_all_logits(h_BLC, weight_VC, bias_V, targets_BL)
        mean, losses_N = _LinearCrossEntropy.apply(
            h_BLC.flatten(0, 1), weight_VC, bias_V, targets_BL.flatten()
        )
    return TokenLoss(mean, losses_N.view(targets_BL.shape))


def _from_all_logits(
    h_BLC: Tensor, weight_VC: Tensor, bias_V: Tensor, targets_BL: Tensor
) -> TokenLoss:
    logits_BLV = F.linear(h_BLC, weight_VC.to(h_BLC.dtype), bias_V.to(h_BLC.dtype))
    logits_BLV = logits_BLV.to(torch.promote_types(h_BLC.dtype, torch.float32))
    losses_BL = losses_of(logits_BLV.log_softmax(2), targets_BL)
    return TokenLoss(losses_BL.mean(), losses_BL.detach())
