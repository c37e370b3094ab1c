"""Which matrix products a processor has, from its flags and oneDNN's limit."""

import pytest
import torch

from variant_kernels.__main__ import report
from variant_kernels.products import has_products, product_dtype, slow_products

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def processor(monkeypatch):
    """Replaces what torch says of the processor."""

    def replace(mkldnn_bf16, mkldnn_fp16=False, limit=None, **flags):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn_bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: mkldnn_fp16)
        flags = {"architecture": "x86_64"} | flags
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return replace


@pytest.mark.parametrize(
    ("arguments", "slow"),
    [
        ({"mkldnn_bf16": False}, (BF16, FP16)),  # AVX2
        ({"mkldnn_bf16": True}, (BF16, FP16)),  # AVX-512 without BF16: emulated
        ({"mkldnn_bf16": True, "avx512_bf16": True}, (FP16,)),
        ({"mkldnn_bf16": True, "amx_bf16": True, "mkldnn_fp16": True}, ()),
        ({"mkldnn_bf16": True, "avx512_bf16": True, "limit": "avx512_core"}, (BF16, FP16)),
        ({"mkldnn_bf16": True, "avx512_bf16": True, "limit": "AVX512_CORE_BF16"}, (FP16,)),
        ({"mkldnn_bf16": True, "architecture": "aarch64"}, (FP16,)),
    ],
)
def test_slow_dtypes_of_processors(processor, arguments, slow):
    processor(**arguments)
    assert slow_products("cpu") == slow
    assert slow_products("cuda") == ()
    for dtype in (BF16, FP16, FP32):
        # The ops between products have no float16 kernels on a CPU.
        assert product_dtype("cpu", dtype) == (FP32 if dtype in (*slow, FP16) else dtype)
        assert product_dtype("cuda", dtype) == dtype
        assert has_products("cuda:1", dtype)


def test_the_report_names_slow_dtypes(processor):
    processor(mkldnn_bf16=False)
    assert "matrix products: slow in bfloat16, float16, which this processor lacks" in report()
    processor(mkldnn_bf16=True, mkldnn_fp16=True, amx_bf16=True)
    assert "matrix products: native in float32, bfloat16 and float16" in report()
