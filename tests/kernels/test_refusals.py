"""Arguments that no op takes are refused by op and argument; odd but valid ones are right."""

import numpy as np
import pytest
import torch

from tests.kernels.compare import backends_for
from variant_kernels import (
    ScaleLayout,
    adaln_modulate,
    append_paged_kv,
    block_causal_attention,
    explain,
    gated_residual_adaln,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
    use_backend,
)
from variant_kernels.kv_quantization import KV8_DTYPE
from variant_kernels.ops import append_paged_kv as append
from variant_kernels.tensors import overlaps_itself, share_memory

LAYOUT = ScaleLayout.from_patch_nums((1,))
X, ROW = torch.randn(1, 2, 16), torch.randn(1, 16)
Q, SCALE = torch.randn(1, 1, 1, 16), torch.zeros(1, 1, 1, 1)
QKV, LOGITS = torch.randn(1, 1, 3, 1, 16), torch.randn(2, 1, 8)
TABLE, LENS = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
SLOTS = torch.zeros(1, 1, dtype=torch.int64)


def pool(pages=4):
    return torch.zeros(pages, 2, 1, 16)


# op -> (call with named arguments that replace the good ones, the good tensors by name)
def calls():
    return {
        adaln_modulate: {"x_BTC": X, "scale_BC": ROW, "shift_BC": ROW},
        gated_residual_adaln: {
            "x_BTC": X, "y_BTC": X, "gate_BC": ROW, "scale_BC": ROW, "shift_BC": ROW,
        },
        qk_norm: {"q_BTHD": Q, "k_BTHD": Q, "scale_mul_1H11": SCALE},
        block_causal_attention: {
            "q_BLHD": Q, "k_BLHD": Q, "v_BLHD": Q, "layout": LAYOUT, "scale_mul_1H11": SCALE,
        },
        paged_attention: {
            "q_BTHD": Q, "k_pages_PNHD": pool(), "v_pages_PNHD": pool(), "page_table_BM": TABLE,
            "kv_lens_B": LENS,
        },
        append_paged_kv: {
            "k_BTHD": Q, "v_BTHD": Q, "k_pages_PNHD": pool(), "v_pages_PNHD": pool(),
            "slots_BT": SLOTS,
        },
        qk_norm_append_paged_kv: {
            "qkv_BT3HD": QKV, "scale_mul_1H11": SCALE, "k_pages_PNHD": pool(),
            "v_pages_PNHD": pool(), "slots_BT": SLOTS,
        },
        sample_tokens: {"logits_2BTV": LOGITS, "image_ids": torch.zeros(1, dtype=torch.int64)},
    }  # fmt: skip


OPS = {op.__name__: op for op in calls()}
TENSORS = [
    (op.__name__, name)
    for op, arguments in calls().items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


def call(op, **changed):
    arguments = {**calls()[OPS[op]], **changed}
    named = {"guidance": 1.0} if op == "sample_tokens" else {}
    return OPS[op](**{**named, **arguments})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [None, 5, b"cpu", ["cpu"], torch.float32])
def test_a_backend_that_is_no_text_is_named(op, bad):
    with pytest.raises(TypeError, match=rf"^{op}: backend must be of type str; got .*\. Use "):
        call(op, backend=bad)
    with pytest.raises(ValueError, match=f'^{op}: backend "nowhere" is unknown'):
        call(op, backend="nowhere")
    with (
        pytest.raises(TypeError, match="use_backend: backend must be of type str"),
        use_backend(bad),
    ):
        pass


ODD = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: torch.zeros(1, 16).to_sparse_csr(),
    "mkldnn": lambda x: torch.zeros(x.shape).to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "jagged": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(torch.zeros(x.shape), 1.0, 0, torch.quint8),
    "complex": lambda x: x.to(torch.complex64),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "boolean": lambda x: x.to(torch.bool),
    "no axis": lambda x: torch.ones((), dtype=x.dtype),
    "empty": lambda x: torch.zeros(0, dtype=x.dtype),
    "array": lambda x: x.numpy(),
    "number": lambda x: 1.0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_an_odd_tensor_is_named(op, name, odd):
    call(op)
    bad = ODD[odd](calls()[OPS[op]][name])
    for inference in (False, True):
        with (
            torch.inference_mode(inference),
            pytest.raises((TypeError, ValueError), match=f"^{op}(_qk_norm)?: ") as caught,
        ):
            call(op, **{name: bad})
        assert "\n" not in str(caught.value)
        if odd in ("sparse", "csr", "mkldnn", "nested", "jagged"):
            assert f"{name} must be a dense tensor with strides" in str(caught.value)
    call(op)


PLAIN = [
    *((op, "eps", bad) for op in ("adaln_modulate", "gated_residual_adaln")
      for bad in ("x", None, True, [1.0], np.zeros(2), 1j)),
    *((op, "softmax_scale", bad) for op in ("block_causal_attention", "paged_attention")
      for bad in ("0.5", "cpu", 1j, True, [1.0], torch.zeros(2))),
    *(("sample_tokens", name, bad) for name in ("guidance", "top_p")
      for bad in ("1", None, True, [1.0], np.zeros(2), 1j)),
    *(("sample_tokens", name, bad) for name in ("top_k", "position")
      for bad in ("3", None, True, 2.5, 1.0, torch.zeros(2, dtype=torch.int64), np.float32(2))),
    *(("sample_tokens", "seed", bad) for bad in ("3", True, 1.5, torch.tensor(1.5))),
    *(("sample_tokens", "generator", bad) for bad in (3, "cpu", np.random.default_rng(0))),
    ("sample_tokens", "image_ids", [0]),
    ("block_causal_attention", "layout", (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "bad"), PLAIN)
def test_a_plain_argument_of_another_type_is_named(op, name, bad):
    with pytest.raises(TypeError, match=f"^{op}: {name} must be .*; got ") as caught:
        call(op, **{name: bad})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("op", "name", "bad"),
    [
        *(("adaln_modulate", "eps", bad) for bad in (-1, float("nan"), float("inf"), 10**400)),
        *(("paged_attention", "softmax_scale", bad)
          for bad in (float("nan"), float("inf"), 2.0**21, -1e38, np.float32(1e7))),
        ("block_causal_attention", "softmax_scale", 1e38),
        *(("sample_tokens", "guidance", bad) for bad in (-0.5, float("nan"), float("inf"))),
        *(("sample_tokens", "top_p", bad) for bad in (-0.5, 1.5, float("nan"))),
        *(("sample_tokens", "top_k", bad) for bad in (-1, 2**31)),
        *(("sample_tokens", "position", bad) for bad in (-1, 2**32)),
        *(("sample_tokens", "seed", bad) for bad in (-1, 2**63)),
    ],
)  # fmt: skip
def test_a_plain_argument_out_of_range_is_named(op, name, bad):
    with pytest.raises(ValueError, match=f"^{op}: {name} must be .*; got "):
        call(op, **{name: bad})


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, float])
def test_numbers_of_numpy_and_torch_are_numbers(number):
    exact = {"eps": 0.25, "softmax_scale": 0.25, "guidance": 0.25, "top_p": 0.25}
    for op in OPS:
        names = {
            name: value for name, value in exact.items() if name in OPS[op].__kwdefaults__
            or (name == "guidance" and op == "sample_tokens")
        }  # fmt: skip
        seed = {"seed": 3} if op == "sample_tokens" else {}
        expected = call(op, **names, **seed)
        actual = call(op, **{name: number(value) for name, value in names.items()}, **seed)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor, int])
def test_integers_of_numpy_and_torch_are_integers(number):
    expected = call("sample_tokens", top_k=3, position=2, seed=5)
    actual = call("sample_tokens", top_k=number(3), position=number(2), seed=number(5))
    assert torch.equal(actual, expected)
    assert torch.equal(call("sample_tokens", guidance=number(2), seed=1),
                       call("sample_tokens", guidance=2.0, seed=1))  # fmt: skip


# --- views that torch has not computed ----------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_negated_view_is_right_or_refused(op, name):
    good = calls()[OPS[op]][name]
    view = torch._neg_view(-good)
    if name in ("k_pages_PNHD", "v_pages_PNHD") and op != "paged_attention":
        with pytest.raises(ValueError, match=f"^{op}: {name} must not be a negated or conjugate"):
            call(op, **{name: view})
        return
    seed = {"seed": 2} if op == "sample_tokens" else {}
    torch.testing.assert_close(
        call(op, **{name: view}, **seed), call(op, **{name: good}, **seed), rtol=0, atol=0
    )


def test_a_negated_view_with_overlapping_strides_is_right():
    strides = (1, 5, 3, 1, 24), (360, 1, 24, 24, 1)
    view = torch._neg_view(torch.randn(1, 5, 3, 1, 24)).as_strided(*strides)
    slots = torch.arange(5).view(1, 5)
    pools = []
    for qkv in (view, view.clone(memory_format=torch.contiguous_format)):
        target = torch.zeros(2, 5, 2, 1, 24).unbind(0)
        q = qk_norm_append_paged_kv(qkv, None, *target, slots)
        pools.append((q, *target))
    for ours, expected in zip(*pools, strict=True):
        assert torch.equal(ours, expected)


# --- memory -------------------------------------------------------------------------------------

BACKENDS = backends_for(append.append_paged_kv_op.backends, torch.float32)


def appended(op, backend, k_pages, v_pages, **changed):
    return call(op, k_pages_PNHD=k_pages, v_pages_PNHD=v_pages, backend=backend, **changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["append_paged_kv", "qk_norm_append_paged_kv"])
def test_pools_that_share_memory_are_refused_and_untouched(op, backend):
    pages = torch.zeros(6, 2, 1, 16)
    shared = [
        (pages, pages),
        (pages[:], pages[:]),
        (pages, pages.view_as(pages)),
        (pages, pages.detach()),
        (pages[:4], pages[2:]),
        (pages[:4], pages[1:5]),
        (pages.view(3, 4, 1, 16)[:, :3], pages.view(3, 4, 1, 16)[:, 1:]),
        (pages, torch.from_numpy(pages.numpy())),  # another storage, the same memory
    ]
    message = f"^{op}: k_pages_PNHD and v_pages_PNHD must not share memory"
    for k_pages, v_pages in shared:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                appended(op, backend, k_pages, v_pages)
    for name, view in (("k_BTHD", pages[:1, :1]), ("v_BTHD", pages[1:2, 1:])):
        if op == "append_paged_kv":
            with pytest.raises(ValueError, match=f"k_pages_PNHD and {name} must not share memory"):
                appended(op, backend, pages, pool(6), **{name: view})
    assert not pages.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_that_overlaps_itself_is_refused(backend):
    flat = torch.zeros(400)
    for strides in ((16, 16, 16, 1), (32, 8, 16, 1), (0, 16, 16, 1)):
        with pytest.raises(ValueError, match=r"v_pages_PNHD must not (overlap|be expanded)"):
            appended("append_paged_kv", backend, pool(), flat.as_strided((4, 2, 1, 16), strides))
    assert not flat.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pools_that_lie_beside_each_other_are_written(backend):
    halves, parts = torch.zeros(8, 2, 1, 16), torch.zeros(4, 2, 2, 2, 16)
    apart = [
        (halves[:4], halves[4:]),
        (halves[::2], halves[1::2]),
        (halves.view(4, 4, 1, 16)[:, :2], halves.view(4, 4, 1, 16)[:, 2:]),
        tuple(x[..., :1, :] for x in parts.unbind(1)),
        tuple(x[..., 1:, :] for x in parts.unbind(2)),
    ]
    for k_pages, v_pages in apart:
        appended("append_paged_kv", backend, k_pages, v_pages, v_BTHD=-Q)
        assert torch.equal(k_pages[0, 0], Q[0, 0])
        assert torch.equal(v_pages[0, 0], -Q[0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_that_share_memory_are_refused(backend):
    k_pages, v_pages = (pool().to(KV8_DTYPE) for _ in range(2))
    scales = torch.ones(4, 2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="k_scales_PNH and v_scales_PNH must not share memory"):
        appended("append_paged_kv", backend, k_pages, v_pages,
                 k_scales_PNH=scales, v_scales_PNH=scales[:])  # fmt: skip
    inside = v_pages.view(torch.uint8)[..., 0, :1]
    with pytest.raises(ValueError, match="v_pages_PNHD and k_scales_PNH must not share"):
        appended("append_paged_kv", backend, k_pages, v_pages,
                 k_scales_PNH=inside, v_scales_PNH=scales)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_of_inference_mode_are_written_there_only(backend):
    with torch.inference_mode():
        pages, other, q, slots = pool(), pool(), Q.clone(), SLOTS.clone()
        appended("append_paged_kv", backend, pages, other)
        assert pages.any()
    for arguments in ({}, {"k_BTHD": q, "v_BTHD": q, "slots_BT": slots}):
        with pytest.raises(ValueError, match=r"k_pages_PNHD was made under torch\.inference_mode"):
            appended("append_paged_kv", backend, pages, other, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["append_paged_kv", "qk_norm_append_paged_kv"])
def test_autograd_sees_that_pages_were_written(op, backend):
    pages, weight = pool(), torch.ones(4, 2, 1, 16, requires_grad=True)
    product = (pages * weight).sum()
    appended(op, backend, pages, pool())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_shared_memory_is_what_brute_force_finds():
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(60)

    def drawn(high):
        return torch.randint(high, (3,), generator=generator).tolist()

    def addresses(x):
        offsets = torch.zeros((), dtype=torch.int64)
        for size, step in zip(x.shape, x.stride(), strict=True):
            offsets = offsets.unsqueeze(-1) + step * torch.arange(size)
        return (x.storage_offset() + offsets).flatten().tolist()

    between, within = 0, 0
    for _ in range(500):
        a, b = (flat.as_strided(drawn(4), drawn(7), drawn(20)[0]) for _ in range(2))
        shared = bool(set(addresses(a)) & set(addresses(b)))
        assert share_memory(a, b) == shared
        twice = len(set(addresses(a))) < a.numel()
        assert overlaps_itself(a) >= twice
        between, within = between + shared, within + twice
    assert between > 30
    assert within > 30
    assert not overlaps_itself(torch.zeros(2, 3, 4).transpose(0, 2))


# --- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"op": 5}, TypeError, "op must be one of"),
        ({"op": "nothing"}, ValueError, "op must be one of"),
        ({"dtype": "float32"}, TypeError, r"dtype must be of type dtype; got 'float32' \(str\)"),
        ({"device": 5}, TypeError, "device must be text or a torch.device; got 5"),
        ({"device": "a\nb"}, ValueError, r"device must be one of torch's; got 'a\\nb' \(str\)$"),
        ({"head_dim": "64"}, TypeError, "head_dim must be an integer >= 1; got '64'"),
        ({"page_size": 0}, ValueError, "page_size must be an integer >= 1; got 0"),
    ],
)
def test_wrong_arguments_of_explain_are_named(named, error, message):
    with pytest.raises(error, match=f"^explain: {message}"):
        explain(**{"op": "qk_norm", **named})


def test_explain_takes_a_device_and_a_backend_by_name():
    assert explain("qk_norm", device=torch.device("cpu")) == explain("qk_norm")
    assert explain("qk_norm", device="cuda:0") == explain("qk_norm", device="cuda")
    with pytest.raises(ValueError, match=r'^qk_norm: backend "a b" is unknown; available: .*$'):
        explain("qk_norm", backend="a\nb")
    with pytest.raises(TypeError, match=r"^qk_norm: backend must be of type str; got ndarray"):
        explain("qk_norm", backend=np.ones(2))
    with pytest.raises(TypeError, match="qk_norm: backend must be of type str; got 5"):
        explain("qk_norm", backend=5)
    with pytest.raises(TypeError, match='qk_norm: float64 runs with backend="reference" only'):
        explain("qk_norm", dtype=torch.float64)
    assert explain("qk_norm", dtype=torch.float64, backend="reference").startswith("reference")
