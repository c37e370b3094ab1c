"""paged_attention: queries of one scale over all visible tokens, each scale of two layouts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import Case, Comparison, backends, missing_module, near, replay
from variant.models.presets import PATCH_NUMS_256, PATCH_NUMS_512
from variant_kernels import ScaleLayout, paged_attention
from variant_kernels.dispatch.request import Request
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv
from variant_kernels.ops.paged_attention import paged_attention_op

OP = "paged_attention"
HEADS, HEAD_DIM, PAGE_SIZE, WIDE_PAGES = 16, 64, 16, 256
# The plain-torch reference holds all scores in float32.
MOST_SCORE_BYTES = 2**28
# exact: the op on pages in the dtype of the queries; in cases with pages of 8 bits only.
IMPLEMENTATIONS = (
    *("triton", "cuda", "flash", "flashinfer", "cpu", "op", "exact", "reference"),
    *("sdpa", "flash-attn", "flashinfer-planned"),
)
LAYOUTS = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512}
# Guidance takes two sequences ("rows") for each image.
CASES = [
    Case(
        f"layout{layout}-scale{scale}-rows{rows}-{dtype}",
        dtype,
        {"patch_nums": patch_nums, "scale": scale, "rows": rows, "kv8": False},
        quick=(layout, scale, rows) in {("256", 0, 2), ("256", 4, 2)},
    )
    for layout, patch_nums in LAYOUTS.items()
    for rows in (2, 16)
    for dtype in ("float32", "bfloat16")
    for scale in range(len(patch_nums))
] + [
    Case(
        f"layout{layout}-kv8-scale{len(patch_nums) - 1}-rows{rows}-{dtype}",
        dtype,
        {"patch_nums": patch_nums, "scale": len(patch_nums) - 1, "rows": rows, "kv8": True},
    )
    for layout, patch_nums in LAYOUTS.items()
    for rows in (2, 16)
    for dtype in ("float32", "bfloat16")
]


# Sizes that fill a GPU come first: the time may end before the cases do. 64 images of VAR-d30 with
# guidance, then pages wide enough for flash-attn 2.
CASES[:0] = [
    Case(
        f"layout256-{kind}scale9-rows128-heads30-bfloat16",
        "bfloat16",
        {
            "patch_nums": PATCH_NUMS_256,
            "scale": 9,
            "rows": 128,
            "heads": 30,
            "kv8": bool(kind),
        },
        devices=("cuda",),
    )
    for kind in ("", "kv8-")
] + [
    Case(
        f"layout256-scale{scale}-rows16-pages{WIDE_PAGES}-bfloat16",
        "bfloat16",
        {"patch_nums": PATCH_NUMS_256, "scale": scale, "rows": 16, "page_size": WIDE_PAGES},
        devices=("cuda",),
    )
    for scale in (5, 9)
]


def build(case: Case, device: str, quick: bool) -> Comparison:
    """Shuffled pages whose unused slots are NaN; SDPA reads the same K and V contiguously.

    With 8 bits all implementations read the same values; the others have them in the dtype of the
    queries.
    """
    layout = ScaleLayout.from_patch_nums(case.settings["patch_nums"])
    rows, dtype = case.settings["rows"], getattr(torch, case.dtype)
    heads = case.settings.get("heads", HEADS)
    tokens, visible = layout.tokens[case.settings["scale"]], layout.visible(case.settings["scale"])
    page_size = case.settings.get("page_size", PAGE_SIZE)
    entries = -(-visible // page_size)
    q_BTHD = torch.randn(rows, tokens, heads, HEAD_DIM, device=device).to(dtype)
    kv_2BSHD = torch.randn(2, rows, visible, heads, HEAD_DIM, device=device).to(dtype)
    shape = (2, rows * entries, page_size, heads, HEAD_DIM)
    pages = torch.full(shape, torch.nan, dtype=dtype, device=device)
    table_BM = torch.randperm(rows * entries).view(rows, entries).to(torch.int32).to(device)
    for row in range(rows):
        slots = pages[:, table_BM[row].long()].flatten(1, 2)
        slots[:, :visible] = kv_2BSHD[:, row]
        pages[:, table_BM[row].long()] = slots.view(2, entries, *pages.shape[2:])
    kv8 = case.settings.get("kv8", False)
    moved = kv_2BSHD.nbytes
    scales = {}
    if kv8:
        codes, bytes_2PNH = quantize_kv(pages)
        pages = dequantize_kv(codes, bytes_2PNH, dtype)
        kv_2BSHD = dequantize_kv(*quantize_kv(kv_2BSHD), dtype)
        scales = {"k_scales_PNH": bytes_2PNH[0], "v_scales_PNH": bytes_2PNH[1]}
        moved = 2 * rows * visible * heads * (HEAD_DIM + 1)
    k_pages, v_pages = (codes if kv8 else pages).unbind(0)
    lens_B = torch.full((rows,), visible, dtype=torch.int32, device=device)
    q_BHTD = q_BTHD.transpose(1, 2).contiguous()
    k_BHSD, v_BHSD = (x.transpose(1, 2).contiguous() for x in kv_2BSHD)
    scale = HEAD_DIM**-0.5
    arguments = {
        "q_BTHD": q_BTHD,
        "k_pages_PNHD": k_pages,
        "v_pages_PNHD": v_pages,
        "page_table_BM": table_BM,
        "kv_lens_B": lens_B,
        "softmax_scale": scale,
        **scales,
    }
    calls, missing = {}, {}
    score_bytes = 4 * rows * heads * tokens * visible
    kv_dtype = KV8_DTYPE if kv8 else None
    request = Request(device, (dtype,), HEAD_DIM, page_size=page_size, kv_dtype=kv_dtype)
    for name, impl, reason in backends(paged_attention_op.backends, request):
        if name == "reference" and score_bytes > MOST_SCORE_BYTES:
            reason = f"plain torch would hold {score_bytes / 2**20:.0f} MiB of scores"
        if reason is None:
            calls[name] = lambda impl=impl: impl.forward(**arguments)
        else:
            missing[name] = reason
    ours = (*(name for name in calls if name != "reference"), "op", "exact")
    calls["op"] = lambda: paged_attention(q_BTHD, k_pages, v_pages, table_BM, lens_B, **scales)
    if kv8:
        calls["exact"] = lambda: paged_attention(q_BTHD, *pages.unbind(0), table_BM, lens_B)
    calls["sdpa"] = lambda: F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD)
    _gpu_peers(device, dtype, calls, missing, q_BTHD, kv_2BSHD, pages, table_BM, visible)

    # Only the first and the last sequence are checked, to save time.
    some = [0, -1]
    exact = F.scaled_dot_product_attention(*(x[some].double() for x in (q_BHTD, k_BHSD, v_BHSD)))
    plain = F.scaled_dot_product_attention(*(x[some] for x in (q_BHTD, k_BHSD, v_BHSD)))

    def pick(name, result):
        return (result[some] if name == "sdpa" else result[some].transpose(1, 2),)

    return Comparison(
        shape={"rows": rows, "queries": tokens, "keys": visible, "heads": heads, "head_dim": 64,
               "page_size": page_size},
        flop=4 * rows * heads * HEAD_DIM * tokens * visible,
        moved=2 * q_BTHD.nbytes + moved,
        calls=calls,
        missing=missing,
        peer="sdpa",
        ours=ours,
        check=near([exact], [plain], ours=ours, pick=pick),
    )  # fmt: skip


def _gpu_peers(device, dtype, calls, missing, q_BTHD, kv_2BSHD, pages, table_BM, visible):
    """Add flash-attn on contiguous K and V, and FlashInfer on the same pages; both need a GPU."""
    for name, module in (("flash-attn", "flash-attn"), ("flashinfer-planned", "flashinfer")):
        missing[name] = missing_module(module) or (
            None if device == "cuda" and dtype != torch.float32 else
            f"{name} runs on a GPU in 16 bits only"
        )  # fmt: skip
    if missing["flash-attn"] is None:
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(q_BTHD, *kv_2BSHD)
    if missing["flashinfer-planned"] is None:
        calls["flashinfer-planned"] = _flashinfer(q_BTHD, pages, table_BM, visible)


def _flashinfer(q_BTHD, pages, table_BM, visible):
    import flashinfer

    rows, tokens = q_BTHD.shape[:2]
    entries, page_size = table_BM.shape[1], pages.shape[2]
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q_BTHD.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q_BTHD.device)
    last = torch.full_like(starts[:rows], (visible - 1) % page_size + 1)
    wrapper.plan(
        starts * tokens,
        starts * entries,
        table_BM.flatten(),
        last,
        q_BTHD.shape[2],
        q_BTHD.shape[2],
        HEAD_DIM,
        page_size,
        causal=False,
        q_data_type=q_BTHD.dtype,
    )
    q_NHD = q_BTHD.flatten(0, 1)
    return lambda: wrapper.run(q_NHD, tuple(pages.unbind(0))).view_as(q_BTHD)


@pytest.mark.benchmark(timer=replay)
def test_paged_attention(report_timing, device, case, implementation):
    report_timing(OP, case, device, implementation, build)
