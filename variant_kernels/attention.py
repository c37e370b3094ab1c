"""``VARiantAttention``: the original VAR's ``SelfAttention`` on this package's kernels.

Axes: B batch, T tokens of this call, S tokens of all calls so far, C width, H heads, D width of one
head, 3 queries, keys and values, P pages, N tokens in a page, M page-table entries, 1 broadcast.
"""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variant_kernels.arguments import instance, integer, real
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.kv_cache import GrowingPages, KVStep, KVStore
from variant_kernels.masks import block_causal_layout
from variant_kernels.ops import contract
from variant_kernels.ops.append_paged_kv import append_paged_kv
from variant_kernels.ops.block_causal_attention import block_causal_attention
from variant_kernels.ops.paged_attention import paged_attention
from variant_kernels.ops.qk_norm import MAX_LOG_SCALE, qk_norm
from variant_kernels.ops.qk_norm_append_paged_kv import qk_norm_append_paged_kv
from variant_kernels.wording import counted


class AttentionForward(nn.Module):
    """The computation of :class:`VARiantAttention`, for any module with these attributes."""

    num_heads: int
    head_dim: int
    attn_l2_norm: bool
    scale: float
    attn_drop: float
    caching: bool
    mat_qkv: nn.Linear
    q_bias: nn.Parameter
    v_bias: nn.Parameter
    zero_k_bias: Tensor
    proj: nn.Linear
    proj_drop: nn.Module
    scale_mul_1H11: nn.Parameter
    max_scale_mul: float
    _pages: GrowingPages | None

    @property
    def _prefix(self) -> str:
        """Begins messages about an attribute."""
        return "VARiantAttention: "

    def kv_caching(self, enable: bool) -> None:
        """Start caching with an empty cache, or stop caching and free the cache."""
        self.caching, self._pages = enable, None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        """Self-attention; while caching, also to the tokens of all earlier calls.

        Args:
            x: (B, T, C).
            attn_bias: added to the scores, or boolean (True: visible); broadcasts to (B, H, T, S).
                The block-causal mask of a layout is detected and runs ``block_causal_attention``.
                None is full attention without a mask: every token attends to all S tokens, as in
                the original code. For causal training pass the mask.
        Returns:
            (B, T, C).
        Raises:
            RuntimeError: x requires a gradient while caching.
            ValueError: a wrong shape or device, or the batch size changed while caching.
            TypeError: a wrong dtype, or no tensor.
        """
        qkv_BT3HD = self._project(x)
        if self.caching:
            out_BTHD = self._attend_cached(qkv_BT3HD, attn_bias)
        else:
            q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
            out_BTHD = self._attend(q_BTHD, k_BTHD, v_BTHD, attn_bias, self._scale_mul())
        return self.proj_drop(self.proj(out_BTHD.flatten(2)))

    # --- parts ----------------------------------------------------------------------------------

    def _project(self, x_BTC: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        return self._heads(F.linear(x_BTC, self.mat_qkv.weight, bias))

    def _heads(self, qkv_BTC: Tensor) -> Tensor:
        return qkv_BTC.view(*qkv_BTC.shape[:2], 3, self.num_heads, self.head_dim)

    def _scale_mul(self) -> Tensor | None:
        if not self.attn_l2_norm:
            return None
        self._check_bound()
        return self.scale_mul_1H11

    def _check_bound(self) -> None:
        """Raises: ValueError if max_scale_mul was changed: the kernels know log 100 alone."""
        if not is_scale_bound(self.max_scale_mul):
            raise ValueError(
                f"{self._prefix}max_scale_mul must be log 100, the bound of the kernels; got "
                f"{self.max_scale_mul}"
            )

    def _normed(self, qkv_BT3HD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTHD, v_BTHD = qkv_BT3HD.unbind(2)
        scale_mul = self._scale_mul()
        if scale_mul is not None:
            q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, scale_mul)
        return q_BTHD, k_BTHD, v_BTHD

    @property
    def _dropout(self) -> float:
        return self.attn_drop if self.training else 0.0

    def _attend(
        self,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        attn_bias: Tensor | None,
        scale_mul_1H11: Tensor | None = None,
    ) -> Tensor:
        """Attention of T queries to T keys of this call, with qk_norm if scale_mul is given."""
        if attn_bias is not None and self._dropout == 0:
            layout = block_causal_layout(attn_bias)
            if layout is not None and layout.total == q_BTHD.shape[1]:
                return block_causal_attention(
                    q_BTHD,
                    k_BTHD,
                    v_BTHD,
                    layout,
                    scale_mul_1H11=scale_mul_1H11,
                    softmax_scale=self.scale,
                )
        if scale_mul_1H11 is not None:
            q_BTHD, k_BTHD = qk_norm(q_BTHD, k_BTHD, scale_mul_1H11)
        return self._torch_attention(q_BTHD, k_BTHD, v_BTHD, attn_bias)

    def _torch_attention(
        self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, attn_bias: Tensor | None
    ) -> Tensor:
        if attn_bias is not None:
            if attn_bias.ndim < 2:  # torch's attention takes none of these
                attn_bias = attn_bias[(None,) * (2 - attn_bias.ndim)]
            if attn_bias.is_floating_point():  # torch refuses integers by name
                attn_bias = attn_bias.to(q_BTHD.dtype)
        out_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSHD.transpose(1, 2),
            v_BSHD.transpose(1, 2),
            attn_mask=attn_bias,
            dropout_p=self._dropout,
            scale=self.scale,
        )
        return out_BHTD.transpose(1, 2)

    def _kv_store(self, qkv_BT3HD: Tensor) -> KVStore:
        if self._pages is None or not self._pages.stored:  # what a failed first call left
            self._pages = GrowingPages(qkv_BT3HD)
        if self._pages.batch != qkv_BT3HD.shape[0]:
            raise ValueError(
                f"VARiantAttention: x must have {counted(self._pages.batch, 'row')} to match the "
                f"cache; got {qkv_BT3HD.shape[0]}. kv_caching(True) empties the cache"
            )
        if self._pages.k_pages.dtype != qkv_BT3HD.dtype:
            raise TypeError(
                f"VARiantAttention: x must give keys of {dtype_name(self._pages.k_pages.dtype)}, "
                f"the dtype of the cache; got {dtype_name(qkv_BT3HD.dtype)} (weights or autocast "
                "changed). kv_caching(True) empties the cache"
            )
        return self._pages

    def _read_pages(self, q_BTHD: Tensor, store: KVStore, step: KVStep) -> Tensor:
        return paged_attention(
            q_BTHD,
            store.k_pages,
            store.v_pages,
            step.page_table_BM,
            step.kv_lens_B,
            softmax_scale=self.scale,
            consecutive=step.consecutive,
        )

    def _attend_cached(self, qkv_BT3HD: Tensor, attn_bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and qkv_BT3HD.requires_grad:
            raise RuntimeError(
                "VARiantAttention: cached attention has no gradient; call it under torch.no_grad() "
                "or torch.inference_mode(), or stop caching with kv_caching(False)"
            )
        store, tokens = self._kv_store(qkv_BT3HD), qkv_BT3HD.shape[1]
        step = store.open(tokens)
        if attn_bias is None and self._dropout == 0:
            q_BTHD = qk_norm_append_paged_kv(
                qkv_BT3HD, self._scale_mul(), store.k_pages, store.v_pages, step.slots_BT
            )
            out_BTHD = self._read_pages(q_BTHD, store, step)
        else:
            q_BTHD, k_BTHD, v_BTHD = self._normed(qkv_BT3HD)
            append_paged_kv(k_BTHD, v_BTHD, store.k_pages, store.v_pages, step.slots_BT)
            total = store.tokens
            if total == tokens:  # the cache was empty
                out_BTHD = self._attend(q_BTHD, k_BTHD, v_BTHD, attn_bias)
            else:
                k_BSHD, v_BSHD = (
                    pages[step.page_table_BM.long()].flatten(1, 2)[:, :total]
                    for pages in (store.k_pages, store.v_pages)
                )
                out_BTHD = self._torch_attention(q_BTHD, k_BSHD, v_BSHD, attn_bias)
        store.close()
        return out_BTHD


class VARiantAttention(AttentionForward):
    """The original VAR's ``SelfAttention``: same constructor, parameters and methods.

    The original's weights load with ``strict=True``. A block-causal ``attn_bias`` is detected and
    runs ``block_causal_attention``; other biases and dropout run torch's attention. ``attn_bias``
    None is full attention without a mask, as in the original. While caching, K and V are appended
    to pages, without concatenation. A mask may be changed in place; on a GPU not through ``.data``,
    which torch does not count as a change.
    Source: VAR (arXiv 2404.02905).

    Args:
        block_idx: stored for the original codebase, not used here.
        embed_dim: C; ``embed_dim / num_heads`` is a multiple of 8 from 16 to 256.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        attn_l2_norm: normalise q and k to unit length, multiply q by
            ``exp(min(scale_mul, log 100))`` and use a softmax scale of 1; otherwise the softmax
            scale is ``0.25 / sqrt(D)``, as in the original.
        flash_if_available: accepted for compatibility, without effect;
            ``variant_kernels.explain`` returns the kernel that runs.
    Raises:
        ValueError: embed_dim / num_heads is not a supported head width, a dropout is not in [0, 1].
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        block_idx: int,
        embed_dim: int = 768,
        num_heads: int = 12,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_l2_norm: bool = False,
        flash_if_available: bool = True,
    ) -> None:
        super().__init__()
        op = "VARiantAttention"
        embed_dim = integer(op, "embed_dim", embed_dim, 1)
        num_heads = integer(op, "num_heads", num_heads, 1)
        attn_drop = real(op, "attn_drop", attn_drop, 0, 1)
        proj_drop = real(op, "proj_drop", proj_drop, 0, 1)
        instance(op, "attn_l2_norm", attn_l2_norm, bool)
        if embed_dim % num_heads or not can_attend(embed_dim // num_heads):
            raise ValueError(
                "VARiantAttention: embed_dim / num_heads must be a multiple of 8 from 16 to 256; "
                f"got {embed_dim} / {num_heads}"
            )
        self.block_idx, self.num_heads = block_idx, num_heads
        self.head_dim = embed_dim // num_heads
        self.attn_l2_norm = attn_l2_norm
        if attn_l2_norm:
            self.scale = 1
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = MAX_LOG_SCALE
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop, inplace=True) if proj_drop > 0 else nn.Identity()
        self.attn_drop = attn_drop
        # The original model's constructor reads these attributes.
        self.using_flash = self.using_xform = False
        self.caching, self._pages = False, None

    def __copy__(self) -> Self:
        """Shares the weights, as every module's; not the pages, to which both would append."""
        twin = object.__new__(type(self))
        twin.__setstate__(self.__getstate__() | {"_pages": copy.deepcopy(self._pages)})
        return twin

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        self._check(x, attn_bias)
        return super().forward(x, attn_bias)

    forward.__doc__ = AttentionForward.forward.__doc__

    def _check(self, x: Tensor, attn_bias: Tensor | None) -> None:
        op, weight = "VARiantAttention", self.mat_qkv.weight
        contract.check_tensor(op, "x", x)
        contract.check_ndim(op, "x", x, "(B, T, C)")
        batch, tokens, _ = x.shape
        width = self.num_heads * self.head_dim
        contract.check_shape(op, "x", x, (batch, tokens, width), "to match embed_dim")
        contract.check_device(op, "x", x, "the weights", weight)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            contract.check_same(op, "x", x, "the weights", weight)
        if attn_bias is None:
            return
        contract.check_tensor(op, "attn_bias", attn_bias)
        if attn_bias.dtype != torch.bool and not attn_bias.is_floating_point():
            raise TypeError(
                f"{op}: attn_bias must be floating-point or bool; got {dtype_name(attn_bias.dtype)}"
            )
        contract.check_device(op, "attn_bias", attn_bias, "x", x)
        earlier = self._pages.stored if self.caching and self._pages is not None else 0
        scores = (batch, self.num_heads, tokens, earlier + tokens)
        shape = tuple(attn_bias.shape)
        pairs = zip(reversed(shape), reversed(scores), strict=False)
        if len(shape) > len(scores) or any(own not in (1, size) for own, size in pairs):
            raise ValueError(
                f"{op}: attn_bias must broadcast to (B, H, T, S) = {scores}; got {shape}"
            )

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, attn_l2_norm={self.attn_l2_norm}"


def is_scale_bound(value: object) -> bool:
    """Whether this is log 100, the kernels' bound of ``scale_mul``."""
    return value == MAX_LOG_SCALE or (
        isinstance(value, float) and math.isclose(value, MAX_LOG_SCALE, rel_tol=1e-5)
    )


def can_attend(head_dim: int) -> bool:
    """Whether the kernels support heads of this width."""
    return head_dim % 8 == 0 and 16 <= head_dim <= 256
