"""Which calls the CUDA C++ kernels can serve, and the checks and choices of their launchers."""

import inspect
from dataclasses import replace

import pytest
import torch

from variant_kernels.cuda_ops import adaln, block_causal_attention, common, library, qk_norm
from variant_kernels.dispatch import select, support
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.support import MAX_ROW_WIDTH, cuda_unsupported
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import tables

GPU = Request("cuda", (torch.bfloat16,), 64)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Simulates a built library and a GPU of capability 9.0."""
    monkeypatch.delenv(library.EMULATION, raising=False)
    monkeypatch.setattr(library, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(support, "_least_capability", lambda: (9, 0))


def test_every_op_has_a_cuda_implementation():
    for op, impls in tables().items():
        assert "cuda" in impls, op


def test_serves_what_lies_on_a_gpu(on_a_gpu):
    assert cuda_unsupported(GPU) is None
    assert cuda_unsupported(replace(GPU, kv_dtype=KV8_DTYPE)) is None


def test_is_taken_by_auto_only_where_triton_does_not_serve(on_a_gpu, monkeypatch):
    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    impls = tables()["paged_attention"]
    monkeypatch.setattr(support, "_has_triton", lambda: False)
    assert select.choose_name("paged_attention", impls, "auto", GPU) == "cuda"
    monkeypatch.setattr(support, "_has_triton", lambda: True)
    assert select.choose_name("paged_attention", impls, "auto", GPU) == "triton"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request("cpu", (torch.float32,), 64), "on cpu"),
        (Request("cuda", (torch.float64,), 64), "float64"),
        (
            Request("cuda", (torch.float32,), row_width=MAX_ROW_WIDTH + 1),
            f"rows of {MAX_ROW_WIDTH + 1:,}",
        ),
    ],
)
def test_says_why_it_cannot_serve(on_a_gpu, request_, reason):
    assert reason in (cuda_unsupported(request_) or "")


def test_an_old_gpu_is_refused_with_its_capability(on_a_gpu, monkeypatch):
    monkeypatch.setattr(support, "_least_capability", lambda: (7, 5))
    assert "7.5" in (cuda_unsupported(GPU) or "")


def test_a_missing_build_is_the_reason(monkeypatch):
    monkeypatch.delenv(library.EMULATION, raising=False)
    monkeypatch.setattr(library, "is_built", lambda: False)
    assert "VARIANT_CUDA=1" in (cuda_unsupported(GPU) or "")


def test_emulation_takes_cpu_tensors_and_is_never_chosen(monkeypatch):
    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    monkeypatch.setenv(library.EMULATION, "/nowhere/library.so")
    request = Request("cpu", (torch.float32,), 64)
    assert cuda_unsupported(request) is None
    assert "on cuda" in (cuda_unsupported(GPU) or "")
    name = select.choose_name("paged_attention", tables()["paged_attention"], "auto", request)
    assert name != "cuda"
    assert "cuda" in support.available_backends()


def test_too_many_scales_and_rows_are_refused():
    x = torch.zeros(1, 300, 1, 16)
    with pytest.raises(ValueError, match="at most 256 scales; got 300"):
        block_causal_attention.launch_block_causal_attention_forward(
            q_BLHD=x, k_BLHD=x, v_BLHD=x, scale_lengths=(1,) * 300, softmax_scale=1.0
        )
    with pytest.raises(ValueError, match=r"qk_norm: .* rows of q_BTHD; got 2147483648"):
        common.check_rows("qk_norm", "q_BTHD", 2**31)


NO_ROWS = {
    "x_BTC": (2, 0, 8),
    "y_BTC": (2, 0, 8),
    "x_out_BTC": (2, 0, 8),
    "grad_y_BTC": (2, 0, 8),
    "grad_x_out_BTC": (2, 0, 8),
    "grad_h_BTC": (2, 0, 8),
    "mean_BT": (2, 0),
    "rstd_BT": (2, 0),
    "gate_BC": (2, 8),
    "scale_BC": (2, 8),
    "shift_BC": (2, 8),
    "q_BTHD": (2, 0, 2, 8),
    "k_BTHD": (2, 0, 2, 8),
    "grad_q_BTHD": (2, 0, 2, 8),
    "grad_k_BTHD": (2, 0, 2, 8),
    "scale_mul_1H11": (1, 2, 1, 1),
    "q_BLHD": (0, 3, 2, 8),
    "k_BLHD": (0, 3, 2, 8),
    "v_BLHD": (0, 3, 2, 8),
    "grad_out_BLHD": (0, 3, 2, 8),
    "out_BLHD": (0, 3, 2, 8),
    "lse_BHL": (0, 2, 3),
}


@pytest.mark.parametrize(
    "launcher",
    [
        adaln.launch_adaln_forward,
        adaln.launch_adaln_backward,
        adaln.launch_gated_adaln_forward,
        adaln.launch_gated_adaln_backward,
        qk_norm.launch_qk_norm_forward,
        qk_norm.launch_qk_norm_backward,
        block_causal_attention.launch_block_causal_attention_forward,
        block_causal_attention.launch_block_causal_attention_backward,
    ],
    ids=lambda launcher: launcher.__name__,
)
def test_nothing_is_launched_for_no_rows(launcher, monkeypatch):
    # CUDA refuses a grid without blocks.
    monkeypatch.setattr(library, "load", lambda: pytest.fail("the library was asked"))
    plain = {"eps": 1e-6, "scale_lengths": (1, 2), "softmax_scale": 1.0}
    named = {}
    for name in inspect.signature(launcher).parameters:
        named[name] = plain[name] if name in plain else torch.ones(NO_ROWS[name])
    for result in launcher(**named):
        # What is summed over no rows is zero.
        assert torch.equal(result, torch.zeros_like(result))
