"""CPU launcher of append_paged_kv. B batch, T tokens, H heads, D head width, P pages, N slots."""

from __future__ import annotations

import torch

from variant_kernels.cpu_ops.common import KERNELS, rows


def launch_append_paged_kv(
    *,
    k_BTHD: torch.Tensor,
    v_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    slots_BT: torch.Tensor,
) -> None:
    """Write the keys and values of token (b, t) into slot slots_BT[b, t]; -1 skips the token.

    A slot is page * page_size + offset, checked by the caller; two tokens with one slot are the
    caller's mistake.
    """
    slots_BT = slots_BT.contiguous()
    KERNELS.append_paged_kv(
        tuple(k_BTHD.shape),
        k_pages_PNHD.shape[1],
        rows(k_BTHD),
        rows(v_BTHD),
        rows(k_pages_PNHD),
        rows(v_pages_PNHD),
        slots_BT.data_ptr(),
        k_BTHD.element_size(),
        torch.get_num_threads(),
    )
