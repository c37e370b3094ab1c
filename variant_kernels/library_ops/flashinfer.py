"""paged_attention by FlashInfer: its page lists are derived from our table once, then kept.

FlashInfer plans a batch on the host, from lengths that it copies there: that waits for the device.
A table is planned at its first call and identified by its memory and version, so that a step loop
with constant tables waits once for each of them; inside a graph capture only a planned table is
served. B batch, T queries, H heads, D head width, P pages, N slots of a page, M table entries.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

WORKSPACE_BYTES = 128 * 2**20
# Plans hold 8 MiB of device memory each: enough for two schedules of ten scales.
MAX_PLANS = 24


@dataclass(frozen=True)
class _Plan:
    """A planned wrapper, and the tensors whose addresses are its key: they must not be reused."""

    wrapper: Any
    keeps: tuple[torch.Tensor, torch.Tensor]


_plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
_workspaces: dict[torch.device, torch.Tensor] = {}


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
    starts = torch.zeros(len(lens_B) + 1, dtype=torch.int32)
    starts[1:] = used_B.cumsum(0)
    held_BM = torch.arange(table_BM.shape[1]) < used_B[:, None]
    last_B = torch.where(lens_B > 0, (lens_B - 1) % page_size + 1, 0).to(torch.int32)
    return starts, table_BM[held_BM].contiguous(), last_B


def _planned(
    q_BTHD: torch.Tensor,
    page_size: int,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
) -> Any:
    tensors = (page_table_BM, kv_lens_B)
    # Inference tensors have no version counter: a table in use must not be written to.
    versions = tuple(0 if t.is_inference() else t._version for t in tensors)
    addresses = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
    key = (q_BTHD.shape, q_BTHD.dtype, q_BTHD.device, page_size, softmax_scale, addresses, versions)
    plan = _plans.get(key)
    if plan is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'paged_attention: backend "flashinfer" cannot plan inside a graph capture; run '
                "the same call once before"
            )
        plan = _Plan(_plan(q_BTHD, page_size, page_table_BM, kv_lens_B, softmax_scale), tensors)
        _plans[key] = plan
        while len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return plan.wrapper


def _plan(q_BTHD, page_size, page_table_BM, kv_lens_B, softmax_scale):
    flashinfer = importlib.import_module("flashinfer")
    device = q_BTHD.device
    batch, tokens, heads, head_dim = q_BTHD.shape
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspaces[device], "NHD")
    starts, pages, last_B = page_lists(page_table_BM, kv_lens_B, page_size)
    queries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32)
    wrapper.plan(
        queries.to(device),
        starts.to(device),
        pages.to(device),
        last_B.to(device),
        heads,
        heads,
        head_dim,
        page_size,
        causal=False,
        sm_scale=softmax_scale,
        q_data_type=q_BTHD.dtype,
        kv_data_type=q_BTHD.dtype,
    )
    return wrapper


def launch_paged_attention_forward(
    *,
    q_BTHD: torch.Tensor,
    k_pages_PNHD: torch.Tensor,
    v_pages_PNHD: torch.Tensor,
    page_table_BM: torch.Tensor,
    kv_lens_B: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T) v over the first kv_lens_B[b] tokens of sequence b.

    Returns:
        out_BTHD, q's dtype.
    Raises:
        ImportError: FlashInfer is not installed.
        RuntimeError: a table seen for the first time inside a graph capture.
    """
    if q_BTHD.numel() == 0:
        return torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    page_size = k_pages_PNHD.shape[1]
    wrapper = _planned(q_BTHD, page_size, page_table_BM, kv_lens_B, softmax_scale)
    out_NHD = wrapper.run(q_BTHD.flatten(0, 1), (k_pages_PNHD, v_pages_PNHD))
    out_BTHD = out_NHD.view(q_BTHD.shape)
    # A sequence without keys: FlashInfer's rows are then not defined by its documentation.
    return torch.where((kv_lens_B > 0).view(-1, 1, 1, 1), out_BTHD, 0)
