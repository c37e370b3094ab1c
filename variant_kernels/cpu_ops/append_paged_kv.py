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

    A slot is page * page_size + offset. Two tokens with one slot are the caller's mistake.

    Raises:
        ValueError: a slot lies outside [-1, P * page_size); nothing has been written.
    """
    num_pages, page_size = k_pages_PNHD.shape[:2]
    if slots_BT.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(slots_BT))
    if lowest < -1 or highest >= num_pages * page_size:
        wrong_BT = (slots_BT < -1) | (slots_BT >= num_pages * page_size)
        b, t = (int(i) for i in wrong_BT.nonzero()[0])
        raise ValueError(
            f"append_paged_kv: slots_BT[{b}, {t}] must be -1 or in [0, {num_pages * page_size}); "
            f"got {int(slots_BT[b, t])}. A slot is page * page_size + offset; -1 skips the token"
        )
    slots_BT = slots_BT.contiguous()
    KERNELS.append_paged_kv(
        tuple(k_BTHD.shape),
        page_size,
        rows(k_BTHD),
        rows(v_BTHD),
        rows(k_pages_PNHD),
        rows(v_pages_PNHD),
        slots_BT.data_ptr(),
        k_BTHD.element_size(),
        torch.get_num_threads(),
    )
