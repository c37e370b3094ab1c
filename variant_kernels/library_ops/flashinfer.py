"""paged_attention by FlashInfer: its page lists are derived from our table once, then kept.

FlashInfer plans a batch on the host, from lengths that it copies there: that waits for the device.
So a plan is made at the first call with a table. It depends on the lengths, not on the pages: the
tables of all layers at one scale share it, and their lists of pages are copied in turn into the
buffer that it reads. It lives as long as one of these tables, so a recorded CUDA graph, which keeps
its tables, keeps its plans; inside a capture only a table that was planned before is served.
B batch, T queries, H heads, D head width, P pages, N slots of a page, M table entries, U used
pages of all sequences.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils.weak import WeakTensorKeyDictionary

WORKSPACE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class _Plan:
    """A planned wrapper (8 MiB on the device), and the list of pages that its next run reads."""

    wrapper: Any
    pages_U: torch.Tensor


@dataclass(frozen=True)
class _Planned:
    """What one table was planned to: its plan and its own list of pages.

    state: of table and lengths when they were read; kv_lens_B: held so that its address is not
    used again.
    """

    plan: _Plan
    pages_U: torch.Tensor
    state: tuple[Any, ...]
    kv_lens_B: torch.Tensor


_lock = Lock()
# By table, then by all else that a call is planned for.
_planned: Any = WeakTensorKeyDictionary()
# By all that a plan depends on.
_plans: WeakValueDictionary[tuple[Any, ...], _Plan] = WeakValueDictionary()
# One for each stream: runs of two streams may overlap.
_workspaces: WeakValueDictionary[tuple[Any, ...], torch.Tensor] = WeakValueDictionary()


def page_lists(
    page_table_BM: torch.Tensor, kv_lens_B: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table in compressed rows, as FlashInfer reads it; on the CPU, int32.

    Returns:
        (first entry of each sequence (B + 1,), page of each entry, tokens in each last page (B,)).
        An empty sequence has no entry.
    """
    table_BM, lens_B = page_table_BM.cpu(), kv_lens_B.cpu()
    used_B = (lens_B + page_size - 1) // page_size
    starts = torch.zeros(len(lens_B) + 1, dtype=torch.int32, device="cpu")
    starts[1:] = used_B.cumsum(0)
    held_BM = torch.arange(table_BM.shape[1], device="cpu") < used_B[:, None]
    last_B = torch.where(lens_B > 0, (lens_B - 1) % page_size + 1, 0).to(torch.int32)
    return starts, table_BM[held_BM].contiguous(), last_B


def _state(table_BM: torch.Tensor, kv_lens_B: torch.Tensor) -> tuple[Any, ...]:
    """Differs after a change in place; the table itself is the key."""
    # Inference tensors have no version counter: a table in use must not be written to.
    versions = [0 if t.is_inference() else t._version for t in (table_BM, kv_lens_B)]
    return *versions, kv_lens_B.data_ptr(), tuple(kv_lens_B.shape), kv_lens_B.stride()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _planned_for(
    q_BTHD: torch.Tensor,
    page_size: int,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
) -> _Planned:
    place = q_BTHD.device, _stream(q_BTHD.device)
    call = (*place, q_BTHD.shape, q_BTHD.dtype, page_size, softmax_scale)
    state = _state(page_table_BM, kv_lens_B)
    with _lock:
        known = _planned.setdefault(page_table_BM, {})
        planned = known.get(call)
        if planned is not None and planned.state == state:
            return planned
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'paged_attention: backend "flashinfer" cannot plan inside a graph capture; run '
                "the same call once before"
            )
        lists = page_lists(page_table_BM, kv_lens_B, page_size)
        key = (*call, tuple(kv_lens_B.tolist()))
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = _plan(place, q_BTHD, page_size, lists, softmax_scale)
        known[call] = _Planned(plan, lists[1].to(q_BTHD.device), state, kv_lens_B)
        return known[call]


def _plan(
    place: tuple[Any, ...],
    q_BTHD: torch.Tensor,
    page_size: int,
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    softmax_scale: float,
) -> _Plan:
    flashinfer = importlib.import_module("flashinfer")
    batch, tokens, heads, head_dim = q_BTHD.shape
    workspace = _workspaces.get(place)
    if workspace is None:
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q_BTHD.device)
        _workspaces[place] = workspace
    queries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device="cpu")
    # Buffers of its own: in this mode FlashInfer promises that a run reads them again.
    buffers = [x.to(q_BTHD.device, copy=True) for x in (queries, *lists)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=buffers[0],
        paged_kv_indptr_buf=buffers[1],
        paged_kv_indices_buf=buffers[2],
        paged_kv_last_page_len_buf=buffers[3],
    )
    wrapper.plan(
        *buffers,
        heads,
        heads,
        head_dim,
        page_size,
        causal=False,
        sm_scale=softmax_scale,
        q_data_type=q_BTHD.dtype,
        kv_data_type=q_BTHD.dtype,
    )
    return _Plan(wrapper, buffers[2])


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
    consecutive: bool = False,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    consecutive changes nothing here: pages are always found in the table.

    Returns:
        out_BTHD, q's dtype.
    Raises:
        ImportError: FlashInfer is not installed.
        RuntimeError: a table seen for the first time inside a graph capture.
    """
    if q_BTHD.numel() == 0:
        return torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    page_size = k_pages_PNHD.shape[1]
    planned = _planned_for(q_BTHD, page_size, page_table_BM, kv_lens_B, softmax_scale)
    planned.plan.pages_U.copy_(planned.pages_U)
    out_NHD = planned.plan.wrapper.run(q_BTHD.flatten(0, 1), (k_pages_PNHD, v_pages_PNHD))
    out_BTHD = out_NHD.view(q_BTHD.shape)
    # A sequence without keys: FlashInfer's rows are then not defined by its documentation.
    return torch.where((kv_lens_B > 0).view(-1, 1, 1, 1), out_BTHD, 0)
