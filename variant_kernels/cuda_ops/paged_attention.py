"""CUDA launcher of paged_attention. B batch, T queries, H heads, D head width, P pages, N slots of
a page, M page-table entries of a sequence.
"""

from __future__ import annotations

import struct

import torch

from variant_kernels.cuda_ops import common
from variant_kernels.split_keys import num_splits
from variant_kernels.tensors import address_and_strides, empty_as

# PagedAttentionArgs
_ARGS = struct.Struct("@8q12q6qfi0q")
# PagedAttentionKv8Args: the same and two views of the scales.
_KV8_ARGS = struct.Struct("@8q12q6qfi8q")
# Queries of a block: 16 where there are no more, else 64; 16 on the path of plain products.
FEW_QUERIES, QUERIES_OF_A_BLOCK = 16, 64
# Keys of a tile and blocks of a processor, for heads up to 64 wide; half as many for wider ones.
KEYS_OF_A_TILE, BLOCKS_OF_A_PROCESSOR = 64, 4


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
    k_scales_PNH: torch.Tensor | None = None,
    v_scales_PNH: torch.Tensor | None = None,
    consecutive: bool = False,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    Token s lies at page page_table_BM[b, s // N], slot s % N. A length of 0 gives zeros. Neither
    page-table entries nor slots past the length are read. Values are not checked on a GPU: lengths
    are clamped to what the table holds, page indices to the pool. With scales the
    pages are float8_e4m3fn, and K and V are page * scale.

    consecutive changes nothing here: pages are always found in the table.

    Returns:
        out_BTHD: contiguous, q's dtype.
    Raises:
        RuntimeError: the launch failed.
    """
    batch, tokens, heads, head_dim = q_BTHD.shape
    num_pages, page_size = k_pages_PNHD.shape[:2]
    entries = page_table_BM.shape[1]
    out_BTHD = empty_as(q_BTHD, q_BTHD.dtype)
    if out_BTHD.numel() == 0:
        return out_BTHD
    if num_pages == 0 or entries == 0:
        return out_BTHD.zero_()
    few = tokens <= FEW_QUERIES or q_BTHD.dtype == torch.float32
    blocks = batch * heads * -(-tokens // (FEW_QUERIES if few else QUERIES_OF_A_BLOCK))
    halves = 1 if head_dim <= 64 else 2
    splits = num_splits(
        blocks=blocks,
        resident=common.num_processors(q_BTHD.device) * BLOCKS_OF_A_PROCESSOR // halves,
        tiles=-(-entries * page_size // (KEYS_OF_A_TILE // halves)),
        part_bytes=4 * q_BTHD.numel(),
    )
    partial_address = statistics_address = 0
    if splits > 1:
        shape = (splits, batch, tokens, heads)
        partial_SBTHD = q_BTHD.new_empty((*shape, head_dim), dtype=torch.float32)
        statistics_2SBTH = q_BTHD.new_empty((2, *shape), dtype=torch.float32)
        partial_address = partial_SBTHD.data_ptr()
        statistics_address = statistics_2SBTH.data_ptr()
    kv_lens_B = kv_lens_B.contiguous()
    common.check_rows("paged_attention", "q_BTHD", batch * tokens * heads * splits)
    if k_scales_PNH is None or v_scales_PNH is None:
        name, layout, scales = "paged_attention_forward", _ARGS, ()
    else:
        name, layout = "paged_attention_kv8_forward", _KV8_ARGS
        scales = (*address_and_strides(k_scales_PNH), 1, *address_and_strides(v_scales_PNH), 1)
    common.launch(
        "paged_attention",
        name,
        layout,
        (
            *(batch, tokens, heads, head_dim, num_pages, page_size, entries, splits),
            *address_and_strides(q_BTHD),
            *address_and_strides(k_pages_PNHD),
            *address_and_strides(v_pages_PNHD),
            *address_and_strides(page_table_BM),
            kv_lens_B.data_ptr(),
            out_BTHD.data_ptr(),
            partial_address,
            statistics_address,
            softmax_scale,
            common.DTYPE_CODES[q_BTHD.dtype],
            *scales,
        ),
        q_BTHD,
    )
    return out_BTHD
