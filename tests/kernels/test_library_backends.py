"""Backends of installed libraries: the arguments that they get, and the calls that they refuse.

flash-attn and FlashInfer run on NVIDIA GPUs only. Here doubles with their signatures stand in: each
reads the arguments as the library documents them and answers with plain torch.
"""

import gc
import itertools
import sys
import types

import pytest
import torch
from compare import Tally

from variant_kernels import (
    CachePlan,
    DepthSchedule,
    PagedKVCache,
    ScaleLayout,
    block_causal_attention,
)
from variant_kernels.dispatch import support
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import always
from variant_kernels.library_ops import flash, flashinfer, flex
from variant_kernels.library_ops.installed import FLASH_VERSIONS
from variant_kernels.ops import block_causal_attention as block_causal
from variant_kernels.ops import paged_attention as paged

GPU = Request("cuda", (torch.float16,), 64, page_size=16)


def module(monkeypatch, name, **members):
    stub = types.ModuleType(name)
    vars(stub).update(members)
    monkeypatch.setitem(sys.modules, name, stub)


def attend(q_THD, k_SHD, v_SHD, scale):
    scores = torch.einsum("thd,shd->hts", q_THD, k_SHD) * scale
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v_SHD)


def rows(pages_PNHD, pages, length):
    return pages_PNHD[pages.long()].flatten(0, 1)[:length]


@pytest.fixture(params=FLASH_VERSIONS, ids=lambda flash_version: f"version-{flash_version.version}")
def flash_attn(request, monkeypatch):
    flash_version = request.param

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, **others
    ):
        table = others.pop(flash_version.table_argument)
        assert not others
        assert not causal
        assert table.dtype == cache_seqlens.dtype == torch.int32
        out = torch.zeros(q.shape, dtype=q.dtype)
        for row, length in enumerate(cache_seqlens.tolist()):
            if length:
                used = table[row, : -(-length // k_cache.shape[1])]
                k, v = (rows(pages, used, length) for pages in (k_cache, v_cache))
                out[row] = attend(q[row], k, v, softmax_scale)
        return out

    module(monkeypatch, flash_version.module, flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setattr(flash, "find_flash", lambda device: flash_version)
    return flash_version


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper as FlashInfer documents it."""

    planned = 0

    def __init__(
        self,
        workspace,
        layout,
        *,
        use_cuda_graph,
        qo_indptr_buf,
        paged_kv_indptr_buf,
        paged_kv_indices_buf,
        paged_kv_last_page_len_buf,
    ):
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"
        assert use_cuda_graph
        assert len(qo_indptr_buf) == len(paged_kv_indptr_buf)
        assert len(paged_kv_indptr_buf) == len(paged_kv_last_page_len_buf) + 1
        self.pages = paged_kv_indices_buf

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        Wrapper.planned += 1
        assert not causal
        assert num_qo_heads == num_kv_heads
        assert q_data_type == kv_data_type
        assert all(x.dtype == torch.int32 for x in (qo_indptr, paged_kv_indptr, paged_kv_indices))
        self.queries, self.starts = qo_indptr.tolist(), paged_kv_indptr.tolist()
        assert len(paged_kv_indices) <= len(self.pages)
        self.pages[: len(paged_kv_indices)].copy_(paged_kv_indices)
        self.last = paged_kv_last_page_len.tolist()
        self.page_size, self.scale = page_size, sm_scale

    def run(self, q_NHD, pages):
        out = torch.full_like(q_NHD, torch.nan)
        for row, last in enumerate(self.last):
            first, end = self.starts[row : row + 2]
            if end > first:
                assert 1 <= last <= self.page_size
                length = (end - first - 1) * self.page_size + last
                k, v = (rows(x, self.pages[first:end], length) for x in pages)
                mine = slice(*self.queries[row : row + 2])
                out[mine] = attend(q_NHD[mine], k, v, self.scale)
        return out


@pytest.fixture
def flashinfer_double(monkeypatch):
    module(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(Wrapper, "planned", 0)
    gc.collect()  # tables of earlier tests


def compare_with_the_definition(launch):
    tally, generator = Tally(), torch.Generator().manual_seed(3)
    for inputs in paged.sample_inputs(torch.float32, generator):
        arguments = dict(
            zip(
                ("q_BTHD", "k_pages_PNHD", "v_pages_PNHD", "page_table_BM", "kv_lens_B"),
                inputs,
                strict=True,
            )
        )
        exact, plain = (
            paged.reference_paged_attention(
                **{n: x.to(t) if x.is_floating_point() else x for n, x in arguments.items()},
                softmax_scale=0.2,
            )
            for t in (torch.float64, torch.float32)
        )
        tally.add(str(tuple(inputs[0].shape)), launch(**arguments, softmax_scale=0.2), plain, exact)
    tally.check()


def test_flash_attn_gets_the_pages_as_they_are(flash_attn):
    compare_with_the_definition(flash.launch_paged_attention_forward)


def test_flashinfer_gets_compressed_rows_of_the_table(flashinfer_double):
    compare_with_the_definition(flashinfer.launch_paged_attention_forward)


def test_flashinfer_plans_a_table_once_and_again_when_it_changes(flashinfer_double):
    q, k, v, table, lengths = paged.sample_inputs(torch.float32, torch.Generator().manual_seed(0))[
        2
    ]
    arguments = {"q_BTHD": q, "k_pages_PNHD": k, "v_pages_PNHD": v, "softmax_scale": 0.1}
    tables = {"page_table_BM": table, "kv_lens_B": lengths}
    for _ in range(3):
        flashinfer.launch_paged_attention_forward(**arguments, **tables)
    assert Wrapper.planned == 1
    lengths[0] -= 1
    shorter = flashinfer.launch_paged_attention_forward(**arguments, **tables)
    assert Wrapper.planned == 2
    expected = paged.reference_paged_attention(**arguments, **tables)
    torch.testing.assert_close(shorter, expected)


def test_flashinfer_plans_every_layer_of_a_deep_model_before_its_graph_is_captured(
    flashinfer_double, monkeypatch
):
    """300 tables, of 30 layers at 10 scales: they share 10 plans, and no table is forgotten."""
    layers, generator = 30, torch.Generator().manual_seed(0)
    plan = CachePlan(ScaleLayout.from_patch_nums(range(1, 11)), DepthSchedule.full(layers, 10), 16)
    tables = {}

    def run():
        cache = PagedKVCache(plan, 2, 1, 16, torch.float32, page_tables=tables)
        cache.k_pages.normal_(generator=generator)
        cache.v_pages.normal_(generator=generator)
        for scale, layer in itertools.product(range(10), range(layers)):
            step = cache.open(layer, scale)
            arguments = {
                "q_BTHD": torch.randn(2, 1, 1, 16, generator=generator),
                "k_pages_PNHD": cache.k_pages,
                "v_pages_PNHD": cache.v_pages,
                "page_table_BM": step.page_table_BM,
                "kv_lens_B": step.kv_lens_B,
                "softmax_scale": 0.3,
            }
            out = flashinfer.launch_paged_attention_forward(**arguments)
            cache.close(layer, scale)
            torch.testing.assert_close(out, paged.reference_paged_attention(**arguments))

    run()
    assert len(tables) == 300
    assert Wrapper.planned == len(flashinfer._plans) == 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run()
    assert Wrapper.planned == 10
    tables.clear()  # as when the recording that kept them is dropped
    gc.collect()
    assert len(flashinfer._plans) == len(flashinfer._planned) == len(flashinfer._workspaces) == 0


def test_flashinfer_does_not_plan_inside_a_capture(flashinfer_double, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot plan inside a graph capture"):
        compare_with_the_definition(flashinfer.launch_paged_attention_forward)


@pytest.mark.parametrize(
    ("request_", "capability", "installed", "reason"),
    [
        (Request("cpu", (torch.float16,), 64), (9, 0), ("flash_attn",), "needs an NVIDIA GPU"),
        (Request("cuda", (torch.float32,), 64), (9, 0), ("flash_attn",), "dtype float32"),
        (GPU, (9, 0), (), "not installed"),
        (GPU, (9, 0), ("flash_attn",), "page_size 16 is not a multiple of the 256"),
        (GPU, (8, 0), ("flash_attn_interface",), "not installed"),
        (GPU, (9, 0), ("flash_attn_interface", "flash_attn"), None),
    ],
)
def test_flash_says_why_it_cannot(monkeypatch, request_, capability, installed, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        support.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    support.find_flash.cache_clear()
    try:
        answer = support.flash_unsupported(request_)
    finally:
        support.find_flash.cache_clear()
    assert answer is None if reason is None else reason in answer


def test_flashinfer_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: name)
    assert support.flashinfer_unsupported(GPU) is None
    odd = Request("cuda", (torch.bfloat16,), 40)
    assert "head_dim 40" in support.flashinfer_unsupported(odd)


def test_flex_refuses_the_cpu_by_name():
    q, k, v, layout = block_causal.sample_inputs(torch.float32, torch.Generator())[0]
    with pytest.raises(ValueError, match=r'backend "flex" cannot run.*no backward pass on cpu'):
        block_causal_attention(q, k, v, layout, backend="flex")


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "gradient", "expected"),
    [
        (True, (9, 0), torch.bfloat16, False, "FLASH"),
        (True, (9, 0), torch.bfloat16, True, "AUTO"),
        (True, (9, 0), torch.float32, False, "AUTO"),
        (True, (8, 0), torch.bfloat16, False, "AUTO"),
        (False, (9, 0), torch.bfloat16, False, "AUTO"),
    ],
)
def test_flex_asks_for_flash_attn_4_where_it_can_run(
    monkeypatch, installed, capability, dtype, gradient, expected
):
    asked = []

    class Query:
        device, requires_grad = torch.device("cuda", 0), gradient

        def transpose(self, *axes):
            return self

    Query.dtype = dtype

    def attention(*qkv, kernel_options, **rest):
        asked.append(kernel_options["BACKEND"])
        raise KeyError("asked")

    monkeypatch.setattr(flex, "_has_flash_4", lambda: installed)
    monkeypatch.setattr(flex, "attention", lambda: attention)
    monkeypatch.setattr(flex, "block_mask", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(KeyError, match="asked"):
        flex.attend(Query(), Query(), Query(), (1, 4), 1.0)
    assert asked == [expected]


def test_flash_attn_4_may_be_absent():
    assert not flex._has_flash_4.__wrapped__()


def test_flex_attention_and_its_gradients_are_the_definitions(monkeypatch):
    """FlexAttention uncompiled, without its check that refuses gradients on the CPU."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "attention", lambda: flex_attention.flex_attention)
    allowing = Backend(always, "library_ops.flex.launch_block_causal_attention_forward")
    monkeypatch.setitem(block_causal.block_causal_attention_op.backends, "flex", allowing)
    layout = ScaleLayout.from_patch_nums((1, 2, 3))
    packed = torch.randn(2, layout.total, 3, 3, 16, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(2, layout.total, 3, 16, generator=torch.Generator().manual_seed(2))
    answers = []
    for backend, autocast in (("flex", False), ("flex", True), ("reference", False)):
        qkv = [x.detach().contiguous().requires_grad_() for x in packed.unbind(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block_causal_attention(*qkv, layout, softmax_scale=0.7, backend=backend)
        answers.append((out.detach(), *torch.autograd.grad(out, qkv, grad)))
    plain, inside_autocast, expected = answers
    for ours in (plain, inside_autocast):
        torch.testing.assert_close(ours, expected)
