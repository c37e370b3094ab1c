"""Attention of one scale's queries over paged keys and values: ``paged_attention``.

Axes: B batch, T queries of this call, H heads, D width of one head, P pages, N tokens in a page,
M page-table entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from variant_kernels.arguments import boolean
from variant_kernels.cpu_ops.values import fits_page_table
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend, Launcher
from variant_kernels.dispatch.support import (
    always,
    cuda_unsupported,
    flash_unsupported,
    flashinfer_unsupported,
    triton_unsupported,
)
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv
from variant_kernels.ops import contract
from variant_kernels.ops.pages import check_pages, cpu_unsupported
from variant_kernels.ops.registry import Op
from variant_kernels.wording import counted


def check_table(op: str, page_table_BM: Tensor, kv_lens_B: Tensor, pages_shape: torch.Size) -> None:
    """Every length fits the table and every page in use exists; for CPU tensors.

    Raises:
        ValueError: naming the first entry that is wrong.
    """
    if kv_lens_B.numel() == 0:
        return
    num_pages, page_size = pages_shape[0], pages_shape[1]
    entries = page_table_BM.shape[1]
    # One pass of C++, 1 us; numpy, 11 us, only names the entry that is wrong.
    if fits_page_table(page_table_BM, kv_lens_B, num_pages, page_size):
        return
    table_BM, lens_B = page_table_BM.numpy(), kv_lens_B.numpy()
    capacity = entries * page_size
    if lens_B.min() < 0 or lens_B.max() > capacity:
        row = int(((lens_B < 0) | (lens_B > capacity)).argmax())
        raise ValueError(
            f"{op}: kv_lens_B[{row}] must be in [0, {capacity}] ({entries} page-table entries of "
            f"{counted(page_size, 'token')}); got {lens_B[row]}"
        )
    used_B1 = -(-lens_B[:, None] // page_size)
    used_BM = np.arange(entries) < used_B1
    wrong_BM = used_BM & ((table_BM < 0) | (table_BM >= num_pages))
    if wrong_BM.any():
        row, entry = divmod(int(wrong_BM.argmax()), entries)
        raise ValueError(
            f"{op}: page_table_BM[{row}, {entry}] must be in [0, {num_pages}); got "
            f"{table_BM[row, entry]}. kv_lens_B[{row}] = {lens_B[row]} makes "
            f"{counted(int(used_B1[row, 0]), 'page')} of {counted(page_size, 'token')} visible"
        )
    raise AssertionError(f"{op}: the page table was refused, but every entry is valid")


def check_consecutive(op: str, page_table_BM: Tensor, kv_lens_B: Tensor, page_size: int) -> None:
    """The pages of every sequence follow one another; for CPU tensors.

    Raises:
        ValueError: naming the first page that does not.
    """
    table_BM, lens_B = page_table_BM.numpy(), kv_lens_B.numpy()
    used_BM = np.arange(table_BM.shape[1]) * page_size < lens_B[:, None]
    wrong_BM = used_BM[:, 1:] & (np.diff(table_BM) != 1)
    if wrong_BM.any():
        row, entry = divmod(int(wrong_BM.argmax()), wrong_BM.shape[1])
        pair = table_BM[row, entry : entry + 2].tolist()
        raise ValueError(
            f"{op}: page_table_BM[{row}, {entry + 1}] must be the page after {pair[0]} with "
            f"consecutive=True; got {pair[1]}. Pass consecutive=False"
        )


def reference_paged_attention(
    *,
    q_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    page_table_BM: Tensor,
    kv_lens_B: Tensor,
    softmax_scale: float,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
    consecutive: bool = False,
) -> Tensor:
    batch, _, heads, head_dim = q_BTHD.shape
    page_size, entries = k_pages_PNHD.shape[1], page_table_BM.shape[1]
    if batch == 0 or entries == 0 or k_pages_PNHD.shape[0] == 0:
        return torch.zeros(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    position_S = torch.arange(entries * page_size, device=q_BTHD.device)
    visible_BS = position_S < kv_lens_B.unsqueeze(1)
    # Entries beyond a length may hold anything: point them at page 0 and mask what they give.
    used_BM = visible_BS.view(batch, entries, page_size)[:, :, 0]
    safe_BM = torch.where(used_BM, page_table_BM, 0).long()
    hidden_BS11 = ~visible_BS.view(batch, entries * page_size, 1, 1)

    def gather(pages_PNHD: Tensor, scales_PNH: Tensor | None) -> Tensor:
        if scales_PNH is None:
            rows_BMNHD = pages_PNHD[safe_BM].to(wide)
        else:
            # torch has no indexing of 8-bit floats on every device.
            values_BMNHD = pages_PNHD.view(torch.uint8)[safe_BM].view(KV8_DTYPE)
            rows_BMNHD = dequantize_kv(values_BMNHD, scales_PNH[safe_BM], wide)
        rows_BSHD = rows_BMNHD.reshape(batch, entries * page_size, heads, head_dim)
        # Unwritten slots may hold NaN, and 0 * NaN is NaN.
        return rows_BSHD.masked_fill(hidden_BS11, 0).transpose(1, 2)

    k_BHSD, v_BHSD = gather(k_pages_PNHD, k_scales_PNH), gather(v_pages_PNHD, v_scales_PNH)
    scores_BHTS = (q_BTHD.transpose(1, 2).to(wide) @ k_BHSD.transpose(-1, -2)) * softmax_scale
    scores_BHTS = scores_BHTS.masked_fill(
        ~visible_BS.view(batch, 1, 1, entries * page_size), -torch.inf
    )
    probs_BHTS = torch.softmax(scores_BHTS, dim=-1)
    probs_BHTS = probs_BHTS.masked_fill((kv_lens_B == 0).view(batch, 1, 1, 1), 0)
    return (probs_BHTS @ v_BHSD).transpose(1, 2).to(q_BTHD.dtype).contiguous()


def _check(
    q_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    page_table_BM: Tensor,
    kv_lens_B: Tensor,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
) -> None:
    op = "paged_attention"
    contract.check_float(op, "q_BTHD", q_BTHD)
    contract.check_ndim(op, "q_BTHD", q_BTHD, "(B, T, H, D)")
    contract.check_head_dim(op, "q_BTHD", q_BTHD.shape[-1])
    check_pages(op, k_pages_PNHD, v_pages_PNHD, "q_BTHD", q_BTHD, k_scales_PNH, v_scales_PNH)
    batch = q_BTHD.shape[0]
    for name, tensor in (("page_table_BM", page_table_BM), ("kv_lens_B", kv_lens_B)):
        contract.check_tensor(op, name, tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32; got {tensor.dtype}")
        contract.check_device(op, name, tensor, "q_BTHD", q_BTHD)
    contract.check_last_contiguous(op, "page_table_BM", page_table_BM)
    contract.check_ndim(op, "page_table_BM", page_table_BM, "(B, M)")
    if page_table_BM.shape[0] != batch:
        raise ValueError(
            f"{op}: page_table_BM must have {counted(batch, 'row')} to match q_BTHD; "
            f"got {tuple(page_table_BM.shape)}"
        )
    contract.check_shape(op, "kv_lens_B", kv_lens_B, (batch,), "to match q_BTHD")


def _check_values(arguments: dict[str, Tensor]) -> None:
    op, pool = "paged_attention", arguments["k_pages_PNHD"].shape
    table_and_lens = arguments["page_table_BM"], arguments["kv_lens_B"]
    check_table(op, *table_and_lens, pool)
    if arguments.get("consecutive"):
        check_consecutive(op, *table_and_lens, pool[1])


def _request(q: Tensor, k_pages: Tensor, *_: Tensor | None) -> Request:
    kv_dtype = KV8_DTYPE if k_pages.dtype == KV8_DTYPE else None
    page_size = k_pages.shape[1]
    return Request(q.device.type, (q.dtype,), q.shape[-1], page_size=page_size, kv_dtype=kv_dtype)


def _launch(launcher: Launcher, arguments: dict[str, Any]) -> Tensor:
    if arguments["softmax_scale"] is None:
        arguments["softmax_scale"] = contract.default_softmax_scale(arguments["q_BTHD"])
    return launcher(**arguments)


_LAUNCHER = "launch_paged_attention_forward"
paged_attention_op = Op(
    "paged_attention(Tensor q_BTHD, Tensor k_pages_PNHD, Tensor v_pages_PNHD,"
    " Tensor page_table_BM, Tensor kv_lens_B, float? softmax_scale, str backend,"
    " Tensor? k_scales_PNH=None, Tensor? v_scales_PNH=None, bool consecutive=False) -> Tensor",
    check=_check,
    check_values=_check_values,
    request=_request,
    fake=lambda q, *_: q.new_empty(q.shape),
    launch=_launch,
    backends={
        "triton": Backend(triton_unsupported, f"triton_ops.paged_attention.{_LAUNCHER}"),
        "cuda": Backend(cuda_unsupported, f"cuda_ops.paged_attention.{_LAUNCHER}"),
        "flash": Backend(flash_unsupported, f"library_ops.flash.{_LAUNCHER}"),
        "flashinfer": Backend(flashinfer_unsupported, f"library_ops.flashinfer.{_LAUNCHER}"),
        "cpu": Backend(cpu_unsupported, f"cpu_ops.paged_attention.{_LAUNCHER}"),
        "reference": Backend(always, reference_paged_attention),
    },
)


def paged_attention(
    q_BTHD: Tensor,
    k_pages_PNHD: Tensor,
    v_pages_PNHD: Tensor,
    page_table_BM: Tensor,
    kv_lens_B: Tensor,
    *,
    softmax_scale: float | None = None,
    k_scales_PNH: Tensor | None = None,
    v_scales_PNH: Tensor | None = None,
    consecutive: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Every query of a sequence attends to all of that sequence's visible tokens.

        out[b] = softmax(softmax_scale * q[b] K[b]^T) V[b]

    Token s of sequence b lies in page ``page_table[b, s // page_size]`` at ``s % page_size``;
    the first ``kv_lens[b]`` tokens are visible, this call's included (append them first). No mask
    is needed: the queries of a scale see their own scale whole. Softmax statistics are float32.
    Sources: VAR (arXiv 2404.02905); pages: vLLM (arXiv 2309.06180).

    Args:
        q_BTHD: queries; float32, float16 or bfloat16; strided views are taken as they are.
            D: a multiple of 8 from 16 to 256.
        k_pages_PNHD, v_pages_PNHD: the pool, (P, page_size, H, D), dtype and device of q; with
            scales float8_e4m3fn, as ``append_paged_kv`` writes it: K and V are then page * scale.
        page_table_BM: int32, (B, M); entries beyond a sequence's length are never read.
        kv_lens_B: int32, (B,), visible tokens; 0 gives zeros.
        softmax_scale: factor on the scores, at most 2^20 in magnitude; None is 1/sqrt(D). Scores
            of 2^24 and more have no digits left for exp in float32; backends then differ.
        k_scales_PNH, v_scales_PNH: the pool's scales, (P, page_size, H) uint8 (E8M0: a byte e is
            2^(e - 127)); both or neither.
        consecutive: True promises page_table[b, i + 1] = page_table[b, i] + 1 for the pages in
            use, as ``KVStep.consecutive`` tells. The result is the same; Triton's kernel then reads
            no page number per token. A wrong promise is an error on the CPU and gives a wrong
            result on a GPU.
    Returns:
        (B, T, H, D), a new contiguous tensor of q's dtype.
    Raises:
        ValueError: shapes or devices disagree, or (CPU) a length or page out of range or not
            consecutive as promised.
        TypeError: dtype not listed, or consecutive is no bool.
        NotImplementedError: a derivative is wanted.
    Gradient: none.
    """
    softmax_scale = contract.softmax_scale("paged_attention", softmax_scale)
    consecutive = boolean("paged_attention", "consecutive", consecutive)
    return paged_attention_op(
        q_BTHD,
        k_pages_PNHD,
        v_pages_PNHD,
        page_table_BM,
        kv_lens_B,
        softmax_scale,
        backend,
        k_scales_PNH,
        v_scales_PNH,
        consecutive,
    )


def sample_inputs(dtype: torch.dtype, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
    """Shuffled pages, ragged lengths, an empty sequence; free pages and tail slots are NaN."""
    cases = []
    # 16 queries of the widest head: the sums of fewer ones torch computes in parts, with a smaller
    # error than a kernel's.
    for tokens, heads, head_dim, page_size, lengths in (
        (1, 1, 16, 1, (1,)),
        (5, 3, 24, 4, (5, 0, 13)),
        (7, 2, 64, 16, (33, 7)),
        (70, 1, 40, 16, (155,)),
        (16, 1, 256, 3, (10, 9)),
    ):
        batch, entries = len(lengths), -(-max(lengths) // page_size) + 1
        num_pages = batch * entries + 2
        pages = torch.full((2, num_pages, page_size, heads, head_dim), torch.nan, device="cpu")
        table = torch.full((batch, entries), 10**6, dtype=torch.int32, device="cpu")
        order = iter(torch.randperm(num_pages, generator=generator, device="cpu").tolist())
        for row, length in enumerate(lengths):
            for entry in range(-(-length // page_size)):
                page = next(order)
                table[row, entry] = page
                here = min(page_size, length - entry * page_size)
                pages[:, page, :here] = torch.randn(
                    2, here, heads, head_dim, generator=generator, device="cpu"
                )
        q = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, device="cpu").to(
            dtype
        )[:, :, 0]
        k_pages, v_pages = pages.to(dtype).unbind(0)
        cases.append(
            (q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32, device="cpu"))
        )
    return cases
