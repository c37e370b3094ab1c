"""CPU kernels through Python: threads, errors, and the choice of the instruction set.

B batch, T tokens, C width, H heads, D head width, P pages, N slots, M page-table entries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from variant_kernels import append_paged_kv, paged_attention
from variant_kernels.cpu_ops.adaln import (
    launch_adaln_backward,
    launch_adaln_forward,
    launch_gated_adaln_backward,
    launch_gated_adaln_forward,
)
from variant_kernels.cpu_ops.append_paged_kv import launch_append_paged_kv
from variant_kernels.cpu_ops.block_causal_attention import (
    launch_block_causal_attention_backward,
    launch_block_causal_attention_forward,
)
from variant_kernels.cpu_ops.common import build_info
from variant_kernels.cpu_ops.paged_attention import launch_paged_attention_forward
from variant_kernels.cpu_ops.qk_norm import launch_qk_norm_backward, launch_qk_norm_forward
from variant_kernels.cpu_ops.qk_norm_append_paged_kv import launch_qk_norm_append_paged_kv
from variant_kernels.cpu_ops.sample_tokens import launch_sample_tokens
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv
from variant_kernels.ops.block_causal_attention import dense_mask

SCALES = (1, 4, 9, 49, 100)  # 163 tokens: several panels, several key tiles


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def run_adaln(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x_BTC, y_BTC = random(3, 150, 264), random(3, 150, 264, dtype=dtype)
    gate_BC, scale_BC, shift_BC = random(3, 3, 264, dtype=dtype).unbind(1)
    plain = launch_adaln_forward(x_BTC=x_BTC, scale_BC=scale_BC, shift_BC=shift_BC, eps=1e-6)
    gated = launch_gated_adaln_forward(
        x_BTC=x_BTC, y_BTC=y_BTC, gate_BC=gate_BC, scale_BC=scale_BC, shift_BC=shift_BC, eps=1e-6
    )
    x_out_BTC, _, mean_BT, rstd_BT = gated
    return (
        *plain,
        *gated,
        *launch_adaln_backward(
            grad_y_BTC=y_BTC, x_BTC=x_BTC, scale_BC=scale_BC, mean_BT=plain[1], rstd_BT=plain[2]
        ),
        *launch_gated_adaln_backward(
            grad_x_out_BTC=x_BTC,
            grad_h_BTC=y_BTC,
            x_out_BTC=x_out_BTC,
            y_BTC=y_BTC,
            gate_BC=gate_BC,
            scale_BC=scale_BC,
            mean_BT=mean_BT,
            rstd_BT=rstd_BT,
        ),
    )


def run_qk_norm(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q_BTHD, k_BTHD = random(2, 150, 2, 4, 40, dtype=dtype).unbind(2)
    scale_mul_1H11 = random(1, 4, 1, 1)
    return (
        *launch_qk_norm_forward(q_BTHD=q_BTHD, k_BTHD=k_BTHD, scale_mul_1H11=scale_mul_1H11),
        *launch_qk_norm_backward(
            grad_q_BTHD=k_BTHD,
            grad_k_BTHD=q_BTHD,
            q_BTHD=q_BTHD,
            k_BTHD=k_BTHD,
            scale_mul_1H11=scale_mul_1H11,
        ),
    )


def run_qk_norm_append(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    k_pages_PNHD, v_pages_PNHD = torch.zeros(2, 20, 16, 4, 40, dtype=dtype)
    q_BTHD = launch_qk_norm_append_paged_kv(
        qkv_BT3HD=random(2, 150, 3, 4, 40, dtype=dtype),
        scale_mul_1H11=random(1, 4, 1, 1),
        k_pages_PNHD=k_pages_PNHD,
        v_pages_PNHD=v_pages_PNHD,
        slots_BT=torch.arange(300).view(2, 150),
    )
    return q_BTHD, k_pages_PNHD, v_pages_PNHD


def empty_kv8(pages: int, page_size: int, heads: int, width: int) -> dict[str, torch.Tensor]:
    codes = torch.zeros(2, pages, page_size, heads, width, dtype=torch.uint8).view(KV8_DTYPE)
    scales = torch.zeros(2, pages, page_size, heads, dtype=torch.uint8)
    return {
        "k_pages_PNHD": codes[0],
        "v_pages_PNHD": codes[1],
        "k_scales_PNH": scales[0],
        "v_scales_PNH": scales[1],
    }


def run_kv8(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    pool = empty_kv8(40, 16, 3, 64)
    q_BTHD = launch_qk_norm_append_paged_kv(
        qkv_BT3HD=random(2, 300, 3, 3, 64, dtype=dtype),
        scale_mul_1H11=random(1, 3, 1, 1),
        slots_BT=torch.arange(600).view(2, 300) + torch.tensor([[0], [20]]),
        **pool,
    )
    out_BTHD = launch_paged_attention_forward(**{**paged_arguments(dtype), **pool})
    return q_BTHD, out_BTHD, *(x.view(torch.uint8) for x in pool.values())


def run_block_causal(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    # One head: two threads split it, one thread does not.
    q, k, v = random(1, sum(SCALES), 3, 1, 64, dtype=dtype).unbind(2)
    out, lse = launch_block_causal_attention_forward(
        q_BLHD=q, k_BLHD=k, v_BLHD=v, scale_lengths=SCALES, softmax_scale=0.125
    )
    grads = launch_block_causal_attention_backward(
        grad_out_BLHD=v,
        q_BLHD=q,
        k_BLHD=k,
        v_BLHD=v,
        out_BLHD=out,
        lse_BHL=lse,
        scale_lengths=SCALES,
        softmax_scale=0.125,
    )
    return (out, lse, *grads)


def paged_arguments(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | float]:
    return {
        "q_BTHD": random(2, 200, 3, 64, dtype=dtype),
        "k_pages_PNHD": random(40, 16, 3, 64, dtype=dtype),
        "v_pages_PNHD": random(40, 16, 3, 64, dtype=dtype),
        "page_table_BM": torch.arange(40, dtype=torch.int32).view(2, 20),
        "kv_lens_B": torch.tensor([300, 17], dtype=torch.int32),
        "softmax_scale": 0.125,
    }


PAGED_ORDER = ("q_BTHD", "k_pages_PNHD", "v_pages_PNHD", "page_table_BM", "kv_lens_B")


def run_paged(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (launch_paged_attention_forward(**paged_arguments(dtype)),)


def run_sample(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (sample(random(8, 30, 501, dtype=dtype)),)


def sample(logits_2BTV: torch.Tensor, **changes) -> torch.Tensor:
    arguments = {
        "guidance": 1.5,
        "top_k": 100,
        "top_p": 0.9,
        "seed": 7,
        "image_ids_B": torch.arange(logits_2BTV.shape[0] // 2),
        "position": 3,
        "exponential_RV": None,
    }
    return launch_sample_tokens(logits_2BTV=logits_2BTV, **{**arguments, **changes})


RUNS = [
    run_adaln,
    run_qk_norm,
    run_qk_norm_append,
    run_kv8,
    run_block_causal,
    run_paged,
    run_sample,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("run", RUNS)
def test_thread_count_changes_no_bit(run, dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_calls_from_several_python_threads_at_once_change_no_bit(run):
    # The kernels run without Python's lock, and each thread keeps scratch memory between calls.
    expected = run(torch.float32)
    start = threading.Barrier(3)

    def repeat(_: int) -> list[tuple[torch.Tensor, ...]]:
        start.wait()
        return [run(torch.float32) for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(repeat, range(3)):
            for got in results:
                assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def large_adaln(x_BTC: torch.Tensor, y_BTC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gate_BC, scale_BC, shift_BC = random(1, 3, x_BTC.shape[-1], dtype=y_BTC.dtype).unbind(1)
    rows = {"scale_BC": scale_BC, "shift_BC": shift_BC, "eps": 1e-6}
    return (
        *launch_adaln_forward(x_BTC=x_BTC, **rows),
        *launch_gated_adaln_forward(x_BTC=x_BTC, y_BTC=y_BTC, gate_BC=gate_BC, **rows),
    )


def large_heads(x_BTC: torch.Tensor, y_BTC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, y = (a.to(y_BTC.dtype).unflatten(-1, (-1, 64)) for a in (x_BTC, y_BTC))
    pages = torch.full((4, x.shape[1], 1, *x.shape[2:]), -1.0, dtype=x.dtype)
    slots_BT = torch.arange(x.shape[1]).view(1, -1)
    scale_mul_1H11 = random(1, x.shape[2], 1, 1)
    launch_append_paged_kv(
        k_BTHD=x, v_BTHD=y, k_pages_PNHD=pages[0], v_pages_PNHD=pages[1], slots_BT=slots_BT
    )
    q_BTHD = launch_qk_norm_append_paged_kv(
        qkv_BT3HD=torch.stack((x, y, x), 2),
        scale_mul_1H11=scale_mul_1H11,
        k_pages_PNHD=pages[2],
        v_pages_PNHD=pages[3],
        slots_BT=slots_BT,
    )
    narrow = empty_kv8(x.shape[1], 1, *x.shape[2:])
    q_of_kv8_BTHD = launch_qk_norm_append_paged_kv(
        qkv_BT3HD=torch.stack((x, y, x), 2),
        scale_mul_1H11=scale_mul_1H11,
        slots_BT=slots_BT,
        **narrow,
    )
    q_k = launch_qk_norm_forward(q_BTHD=x, k_BTHD=y, scale_mul_1H11=scale_mul_1H11)
    codes = (a.view(torch.uint8).transpose(0, 1) for a in narrow.values())
    return *(page.view(x.shape) for page in pages), q_BTHD, q_of_kv8_BTHD, *codes, *q_k


@pytest.mark.parametrize(
    ("stream", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", [large_adaln, large_heads])
def test_a_result_larger_than_the_cache_is_that_of_its_parts(launch, stream, dtype):
    # 34 MiB in the narrower dtype: stores go around the cache.
    width = 1024 * 4 // dtype.itemsize
    x_BTC = random(1, 8704, width, dtype=stream)
    y_BTC = random(1, 8704, width + 8, dtype=dtype)[..., :width]
    whole = launch(x_BTC, y_BTC)
    first = launch(x_BTC[:, :5000], y_BTC[:, :5000])
    rest = launch(x_BTC[:, 5000:], y_BTC[:, 5000:])
    for a, b, c in zip(whole, first, rest, strict=True):
        assert torch.equal(a[:, :5000], b)
        assert torch.equal(a[:, 5000:], c)


def test_tokens_do_not_depend_on_the_rest_of_the_batch():
    logits_2BTV = random(8, 30, 501)
    together_BT = sample(logits_2BTV)
    alone_BT = sample(logits_2BTV[[2, 6]], image_ids_B=torch.tensor([2]))
    assert torch.equal(together_BT[2:3], alone_BT)
    later_BT = sample(logits_2BTV[:, 10:], position=13)
    assert torch.equal(together_BT[:, 10:], later_BT)


def test_no_guidance_ignores_the_unconditional_half():
    logits_2BTV = random(4, 5, 50)
    expected_BT = sample(logits_2BTV, guidance=0.0)
    logits_2BTV[2:] = torch.nan
    assert torch.equal(sample(logits_2BTV, guidance=0.0), expected_BT)


def test_an_expanded_gradient_is_accepted():
    x_BTC, scale_BC = random(2, 3, 40), random(2, 40)
    _, mean_BT, rstd_BT = launch_adaln_forward(
        x_BTC=x_BTC, scale_BC=scale_BC, shift_BC=scale_BC, eps=1e-6
    )
    results = [
        launch_adaln_backward(
            grad_y_BTC=grad, x_BTC=x_BTC, scale_BC=scale_BC, mean_BT=mean_BT, rstd_BT=rstd_BT
        )
        for grad in (torch.ones(()).expand(2, 3, 40), torch.ones(2, 3, 40))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("argument", "index", "value", "message"),
    [
        ("page_table_BM", (1, 1), 77, r"page_table_BM\[1, 1\] must be in \[0, 40\); got 77"),
        ("page_table_BM", (0, 18), -1, r"page_table_BM\[0, 18\] must be in \[0, 40\); got -1"),
        ("kv_lens_B", (1,), 321, r"kv_lens_B\[1\] must be in \[0, 320\].*; got 321"),
        ("kv_lens_B", (0,), -1, r"kv_lens_B\[0\] must be in \[0, 320\].*; got -1"),
    ],
)
def test_a_page_or_length_out_of_range_is_named(argument, index, value, message):
    arguments = paged_arguments()
    arguments[argument][index] = value
    with pytest.raises(ValueError, match="paged_attention: " + message):
        paged_attention(*(arguments[name] for name in PAGED_ORDER), backend="cpu")


def test_a_page_table_entry_past_the_length_is_not_read():
    arguments = paged_arguments()
    expected = launch_paged_attention_forward(**arguments)
    arguments["page_table_BM"][0, 19] = -5
    arguments["page_table_BM"][1, 2:] = 2**31 - 1
    assert torch.equal(launch_paged_attention_forward(**arguments), expected)


@pytest.mark.parametrize("slot", [-2, 20, 2**40])
def test_a_slot_out_of_range_is_named_before_anything_is_written(slot):
    pages_PNHD = torch.zeros(5, 4, 2, 16)
    slots_BT = torch.tensor([[0, 1, slot]])
    with pytest.raises(ValueError, match=r"slots_BT\[0, 2\] must be -1 or in \[0, 20\); got "):
        append_paged_kv(
            random(1, 3, 2, 16),
            random(1, 3, 2, 16),
            pages_PNHD,
            pages_PNHD.clone(),
            slots_BT,
            backend="cpu",
        )
    assert not pages_PNHD.any()


def test_a_row_without_a_finite_logit_is_named():
    logits_2BTV = random(4, 5, 50)
    logits_2BTV[1, 3] = -torch.inf
    with pytest.raises(ValueError, match="image 1, token 3"):
        sample(logits_2BTV, guidance=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_pages_give_the_bits_of_the_pages_that_they_stand_for(dtype):
    arguments = paged_arguments(dtype)
    narrow = {}
    for name in ("k", "v"):
        pages = arguments[f"{name}_pages_PNHD"] * torch.logspace(-3, 2, 16).view(-1, 1, 1)
        codes, scales = quantize_kv(pages)
        narrow |= {f"{name}_pages_PNHD": codes, f"{name}_scales_PNH": scales}
        arguments[f"{name}_pages_PNHD"] = dequantize_kv(codes, scales, dtype)
    expected = launch_paged_attention_forward(**arguments)
    assert torch.equal(launch_paged_attention_forward(**{**arguments, **narrow}), expected)


@pytest.mark.parametrize("scale", [0.125, 1.0, -0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scores_beyond_2_to_the_31_choose_the_largest(dtype, scale):
    # One rounding error of such a score exceeds the range of 2^x; the softmax is one-hot.
    q_BLHD, k_BLHD = (random(1, sum(SCALES), 2, 64 + i).to(dtype)[..., :64] for i in (0, 8))
    q_BLHD, k_BLHD, v_BLHD = q_BLHD * 1e5, k_BLHD * 1e5, random(1, sum(SCALES), 2, 64, dtype=dtype)
    arguments = {"scale_lengths": SCALES, "softmax_scale": scale}
    out_BLHD, lse_BHL = launch_block_causal_attention_forward(
        q_BLHD=q_BLHD, k_BLHD=k_BLHD, v_BLHD=v_BLHD, **arguments
    )
    scores = torch.einsum("blhd,bmhd->bhlm", q_BLHD.double(), k_BLHD.double()) * scale
    scores = scores.masked_fill(~dense_mask(SCALES), -torch.inf)
    peak_BHL, best_BHL = scores.max(-1)
    index = best_BHL.transpose(1, 2)[..., None].expand_as(v_BLHD)
    assert torch.equal(out_BLHD, v_BLHD.gather(1, index))
    torch.testing.assert_close(lse_BHL.double(), peak_BHL, rtol=1e-6, atol=0)
    gradients = launch_block_causal_attention_backward(
        grad_out_BLHD=v_BLHD,
        q_BLHD=q_BLHD,
        k_BLHD=k_BLHD,
        v_BLHD=v_BLHD,
        out_BLHD=out_BLHD,
        lse_BHL=lse_BHL,
        **arguments,
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_float16_tokens_for_8_bit_pages_are_refused_by_name():
    tokens, pool = random(1, 2, 3, 64, dtype=torch.float16), empty_kv8(1, 2, 3, 64)
    with pytest.raises(TypeError, match="append_paged_kv: k_BTHD must be float32 or bfloat16"):
        launch_append_paged_kv(
            k_BTHD=tokens, v_BTHD=tokens, slots_BT=torch.tensor([[0, 1]]), **pool
        )

    pool |= {name: tensor for name, tensor in paged_arguments().items() if name not in pool}
    with pytest.raises(TypeError, match="paged_attention: q_BTHD must be float32 or bfloat16"):
        launch_paged_attention_forward(**pool | {"q_BTHD": tokens})


def test_float64_queries_are_refused_by_name():
    arguments = paged_arguments()
    expected = "paged_attention: q_BTHD must be float32, bfloat16 or float16 for the cpu backend"
    with pytest.raises(TypeError, match=f"{expected}; got torch.float64"):
        launch_paged_attention_forward(**arguments | {"q_BTHD": arguments["q_BTHD"].double()})


def test_float16_is_refused_by_name():
    x = random(1, 2, 3, 64, dtype=torch.float16)
    with pytest.raises(TypeError, match="qk_norm: q_BTHD must be float32 or bfloat16"):
        launch_qk_norm_forward(q_BTHD=x, k_BTHD=x, scale_mul_1H11=torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("lengths", [(300, 17, 0), (305, 319, 1)])
def test_float16_pages_give_the_rounded_bits_of_their_float32_copies(lengths):
    generator = torch.Generator().manual_seed(3)
    pages = torch.full((64, 2, 16, 3, 64), torch.nan, dtype=torch.float16)
    # Neither the pages nor those of a sequence lie in order; numbers past a length are no pages.
    table = torch.randperm(64, generator=generator)[:60].view(3, 20).to(torch.int32)
    for row, length in enumerate(lengths):
        for entry in range(20):
            here = min(max(length - 16 * entry, 0), 16)
            values = torch.randn(2, here, 3, 64, generator=generator)
            pages[table[row, entry], :, :here] = values.half()
        table[row, -(-length // 16) :] = 10**6
    q = torch.randn(3, 30, 3, 3, 64, generator=generator).half()[:, :, 1]
    tables = {"page_table_BM": table, "kv_lens_B": torch.tensor(lengths, dtype=torch.int32)}
    k_pages, v_pages = pages.unbind(1)
    ours = launch_paged_attention_forward(
        q_BTHD=q, k_pages_PNHD=k_pages, v_pages_PNHD=v_pages, softmax_scale=0.3, **tables
    )
    wide = launch_paged_attention_forward(
        q_BTHD=q.float(),
        k_pages_PNHD=k_pages.float(),
        v_pages_PNHD=v_pages.float(),
        softmax_scale=0.3,
        **tables,
    )
    assert ours.isfinite().all()
    assert torch.equal(ours, wide.half())


def test_build_info_lists_what_runs_here():
    info = build_info()
    assert info["isas_built"][0] == "portable"
    assert set(info["isas_supported"]) <= set(info["isas_built"])
    assert info["isa"] in info["isas_supported"]


# A process chooses its instruction set once, so each has one of its own; all are forks of one that
# has loaded torch, and not yet the kernels.
FORCED = """
import json, os, sys, torch
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.environ["VARIANT_CPU_ISA"] = name
        try:
            from variant_kernels.cpu_ops.common import build_info
            from variant_kernels.cpu_ops.sample_tokens import launch_sample_tokens
            isa, drawn = build_info()["isa"], []
            g = torch.Generator().manual_seed(0)
            for dtype, entries in ((torch.float32, 4096), (torch.bfloat16, 515)):
                logits_2BTV = torch.randn(8, 40, entries, generator=g).to(dtype)
                drawn += launch_sample_tokens(
                    logits_2BTV=logits_2BTV, guidance=1.5, top_k=900 * entries // 4096, top_p=0.96,
                    seed=1, position=0, image_ids_B=torch.arange(4), exponential_RV=None,
                ).flatten().tolist()
        except ValueError as error:
            isa, drawn = str(error), None
        print(json.dumps([name, isa, drawn]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def forced() -> dict[str, tuple[str, list[int] | None]]:
    """Of each name in VARIANT_CPU_ISA: the instruction set in use, or the error; drawn tokens."""
    ran = subprocess.run(
        [sys.executable, "-c", FORCED, *build_info()["isas_supported"], "pdp11"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {name: (isa, drawn) for name, isa, drawn in map(json.loads, ran.stdout.splitlines())}


def test_an_instruction_set_can_be_forced(forced):
    for name in build_info()["isas_supported"]:
        assert forced[name][0] == name


def test_an_unknown_instruction_set_is_an_error_that_names_the_known_ones(forced):
    error, _ = forced["pdp11"]
    assert error.startswith("VARIANT_CPU_ISA must be one of: portable")
    assert '"pdp11"' in error


def test_every_instruction_set_draws_the_same_tokens(forced):
    supported = build_info()["isas_supported"]
    if len(supported) < 2:
        pytest.skip("this machine supports one instruction set only")
    first, *others = (forced[name][1] for name in supported)
    assert len(first) == 320
    assert len(set(first[:160])) > 100
    assert all(other == first for other in others)
