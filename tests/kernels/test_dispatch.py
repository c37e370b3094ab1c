"""Which backend runs a call, and which checks an op repeats at later calls."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

from variant_kernels import (
    adaln_modulate,
    append_paged_kv,
    block_causal_attention,
    explain,
    paged_attention,
    qk_norm,
    sample_tokens,
    use_backend,
)
from variant_kernels.dispatch import select, support
from variant_kernels.dispatch.explain import resolve
from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import Backend, requested_name
from variant_kernels.dispatch.support import BACKENDS
from variant_kernels.ops import adaln, registry, tables
from variant_kernels.ops import append_paged_kv as append
from variant_kernels.ops import block_causal_attention as block_causal
from variant_kernels.ops import paged_attention as paged_op
from variant_kernels.ops import qk_norm as qk_norm_op
from variant_kernels.ops import qk_norm_append_paged_kv as fused

ROOT = Path(__file__).parent.parent.parent
X, ROW = torch.randn(2, 3, 16), torch.zeros(2, 16)


@pytest.fixture(autouse=True)
def nothing_forces_a_backend(monkeypatch):
    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def checks(monkeypatch):
    """Shapes of x in each run of adaln_modulate's check."""
    shapes, check = [], adaln.adaln_op.check

    def counted(x, *rows):
        shapes.append(tuple(x.shape) if isinstance(x, torch.Tensor) else x)
        check(x, *rows)

    monkeypatch.setattr(adaln.adaln_op, "check", counted)
    return shapes


def test_every_table_is_in_the_order_of_preference():
    for op, backends in tables().items():
        assert list(backends) == [name for name in BACKENDS if name in backends], op
        assert list(backends)[-1] == "reference"


def test_a_signature_is_checked_once(checks):
    for _ in range(3):
        adaln_modulate(X, ROW, ROW)
    assert checks == [(2, 3, 16)]
    for other in (X[:, :2], X.bfloat16(), X.transpose(0, 1).contiguous().transpose(0, 1)):
        rows = ROW.to(other.dtype)
        adaln_modulate(other, rows, rows)
        adaln_modulate(other, rows, rows)
    assert len(checks) == 4


def test_a_bad_call_after_a_good_one_raises_every_time():
    good = (X, ROW, ROW)
    adaln_modulate(*good)
    wide = torch.zeros(2, 17)
    bad = (
        ((X, wide[:, :16].t().contiguous().t(), ROW), ValueError, "contiguous last dimension"),
        ((X, ROW, wide), ValueError, r"shift_BC must be \(2, 16\)"),
        ((X.int(), ROW, ROW), TypeError, "x_BTC must be one of"),
        ((X.double(), ROW, ROW), TypeError, "x_BTC must be float32 or have the dtype of scale_BC"),
        ((X.double(), ROW.double(), ROW.double()), TypeError, "float64 runs with backend"),
        ((X[0], ROW, ROW), ValueError, "must have 3 dimensions"),
        ((X, ROW, ROW.to("meta")), ValueError, "shift_BC must be on the device of scale_BC"),
        *(((X, ROW, other), TypeError, "shift_BC must be a torch.Tensor; got")
          for other in (None, 3.0, [1.0], np.zeros((2, 16)), "x")),
    )  # fmt: skip
    for arguments, error, message in bad:
        for _ in range(2):
            with pytest.raises(error, match=f"adaln_modulate: .*{message}"):
                adaln_modulate(*arguments)
    adaln_modulate(*good)


def test_what_is_no_tensor_is_named_in_every_op():
    q = torch.zeros(1, 1, 1, 16)
    slots = torch.zeros(1, 1, dtype=torch.int64)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    calls = {
        "q_BTHD": lambda bad: paged_attention(bad, q, q, table, lens),
        "kv_lens_B": lambda bad: paged_attention(q, q, q, table, bad),
        "k_scales_PNH": lambda bad: paged_attention(
            q, q.to(torch.float8_e4m3fn), q.to(torch.float8_e4m3fn), table, lens,
            k_scales_PNH=bad, v_scales_PNH=bad,
        ),
        "k_pages_PNHD": lambda bad: append_paged_kv(q, q, bad, bad, slots),
        "slots_BT": lambda bad: append_paged_kv(q, q, q.clone(), q.clone(), bad),
        "k_BTHD": lambda bad: append_paged_kv(bad, q, q.clone(), q.clone(), slots),
        "scale_mul_1H11": lambda bad: qk_norm(q, q, bad),
        "logits_2BTV": lambda bad: sample_tokens(bad, guidance=1.0),
        "image_ids": lambda bad: sample_tokens(torch.zeros(2, 1, 8), guidance=1.0, image_ids=bad),
        "v_BLHD": lambda bad: block_causal_attention(
            q, q, bad, block_causal.ScaleLayout.from_patch_nums((1,))
        ),
    }  # fmt: skip
    for name, call in calls.items():
        for bad in (3.0, [1.0], "x", np.zeros(3)):
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor; got"):
                call(bad)
    with pytest.raises(TypeError, match=r"k_pages_PNHD must be a torch\.Tensor; got None"):
        append_paged_kv(q, q, None, None, slots)


def test_a_changed_environment_chooses_anew(monkeypatch, checks):
    x, row = X.half(), ROW.half()
    adaln_modulate(x, row, row)
    monkeypatch.setenv("VARIANT_BACKEND", "cpu")
    for _ in range(2):
        with pytest.raises(ValueError, match='backend "cpu" cannot run this call'):
            adaln_modulate(x, row, row)
    monkeypatch.setenv("VARIANT_BACKEND", "reference")
    adaln_modulate(x, row, row)
    with use_backend("cpu"), pytest.raises(ValueError, match='backend "cpu" cannot run'):
        adaln_modulate(x, row, row)
    with pytest.raises(ValueError, match='backend "triton" cannot run'):
        adaln_modulate(x, row, row, backend="triton")


def test_an_unknown_backend_of_the_environment_is_named_as_such(monkeypatch, checks):
    monkeypatch.setenv("VARIANT_BACKEND", "cpus")
    with pytest.raises(ValueError, match=r'^the environment variable VARIANT_BACKEND: .*"cpus"'):
        adaln_modulate(X, ROW, ROW)
    adaln_modulate(X, ROW, ROW, backend="reference")
    with use_backend("reference"):
        adaln_modulate(X, ROW, ROW)


def test_auto_inside_a_named_backend_follows_the_environment_again(monkeypatch):
    monkeypatch.setenv("VARIANT_BACKEND", "reference")
    with use_backend("cpu"):
        assert requested_name("auto") == "cpu"
        with use_backend("auto"):
            assert requested_name("auto") == "reference"
        assert requested_name("auto") == "cpu"


def test_triton_is_available_without_a_gpu_in_its_interpreter_alone(monkeypatch):
    monkeypatch.setattr(support, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for interpreted in (True, False):
        monkeypatch.setattr(support, "triton_interprets", lambda value=interpreted: value)
        assert ("triton" in support.available_backends()) is interpreted
        assert "flex" not in support.available_backends()


@pytest.mark.parametrize(
    ("reason_of", "device", "dtype", "installed", "interpreted", "reason"),
    [
        ("triton", "cuda", torch.float32, False, False, "Triton is not installed"),
        ("triton", "cuda", torch.float32, True, True, "takes CPU tensors; these are on cuda"),
        ("triton", "cpu", torch.bfloat16, True, True, "computes bfloat16 wrongly"),
        ("triton", "cpu", torch.float32, True, False, "the tensors are on cpu, not on a GPU"),
        ("triton", "cuda", torch.float64, True, False, "dtype float64 is not among its dtypes"),
        ("triton", "cuda", torch.float32, True, False, None),
        ("triton", "cpu", torch.float16, True, True, None),
        ("flex", "cpu", torch.float32, True, False, "has no backward pass on cpu"),
        ("flex", "cuda", torch.float32, False, False, "Triton is not installed"),
        ("flex", "xpu", torch.float32, True, False, None),
    ],
)
def test_triton_and_flex_say_why_not(
    monkeypatch, reason_of, device, dtype, installed, interpreted, reason
):
    monkeypatch.setattr(support, "_has_triton", lambda: installed)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    answer = getattr(support, f"{reason_of}_unsupported")(Request(device, (dtype,), 64))
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("device", "built", "emulated", "hip", "capability", "reason"),
    [
        ("cpu", True, True, None, (8, 0), None),
        ("cuda", True, True, None, (8, 0), "takes CPU tensors; these are on cuda"),
        ("cuda", False, False, None, (8, 0), "it is not built; build with VARIANT_CUDA=1"),
        ("cpu", True, False, None, (8, 0), "the tensors are on cpu, not on an NVIDIA GPU"),
        ("cuda", True, False, "6.4", (9, 4), "the tensors are on cuda, not on an NVIDIA GPU"),
        ("cuda", True, False, None, (7, 5), "the GPU has compute capability 7.5; it needs 8.0"),
        ("cuda", True, False, None, (8, 0), None),
    ],
)
def test_cuda_says_why_not(monkeypatch, device, built, emulated, hip, capability, reason):
    monkeypatch.setattr(support.cuda_library, "is_built", lambda: built)
    monkeypatch.setattr(support.cuda_library, "is_emulated", lambda: emulated)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(support, "_least_capability", lambda: capability)
    answer = support.cuda_unsupported(Request(device, (torch.float16,), 64))
    assert answer is None if reason is None else reason in answer
    # The two backends of GPUs take rows of the same length and the same dtypes.
    if reason is None:
        longest = Request(device, (torch.float16,), row_width=65536)
        assert support.cuda_unsupported(longest) is None
        longer = support.cuda_unsupported(Request(device, (torch.float16,), row_width=65537))
        assert longer == "rows of 65,537 entries are longer than the 65,536 that it takes"
        double = support.cuda_unsupported(Request(device, (torch.float64,)))
        assert "dtype float64 is not among its dtypes (float32, bfloat16, float16)" in double


@pytest.mark.parametrize(
    ("gpu", "hip", "built", "emulated", "names"),
    [
        (False, None, True, False, {"triton": False, "flex": False, "cuda": False}),
        (False, None, False, True, {"triton": False, "flex": False, "cuda": True}),
        (True, None, True, False, {"triton": True, "flex": True, "cuda": True}),
        (True, None, False, False, {"triton": True, "flex": True, "cuda": False}),
        (True, "6.4", True, False, {"triton": True, "flex": True, "cuda": False}),
    ],
)
def test_backends_that_this_machine_can_run(monkeypatch, gpu, hip, built, emulated, names):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(support.cuda_library, "is_built", lambda: built)
    monkeypatch.setattr(support.cuda_library, "is_emulated", lambda: emulated)
    monkeypatch.setattr(support, "_has_triton", lambda: True)
    nvidia = gpu and hip is None
    # Other libraries run on NVIDIA's GPUs alone, wherever they are installed.
    monkeypatch.setattr(support, "find_flash", lambda device: "installed")
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: "installed")
    names = names | {"cpu": True, "reference": True, "flash": nvidia, "flashinfer": nvidia}
    # The most general first.
    expected = tuple(name for name in reversed(BACKENDS) if names[name])
    assert support.available_backends() == expected
    monkeypatch.setattr(support, "find_flash", lambda device: None)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    left = support.available_backends()
    assert left == tuple(name for name in expected if not name.startswith("flash"))


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("emulated", [False, True])
def test_kernels_for_tests_are_never_taken_automatically(monkeypatch, interpreted, emulated):
    monkeypatch.setattr(select, "triton_interprets", lambda: interpreted)
    monkeypatch.setattr(select.cuda_library, "is_emulated", lambda: emulated)
    taken = {name for name in BACKENDS if select.for_tests(name)}
    assert taken == {name for name, is_so in (("triton", interpreted), ("cuda", emulated)) if is_so}


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_every_op_asks_for_the_properties_of_its_tensors(kv_dtype):
    half, wide = torch.float16, torch.float32
    x_BTC, x_BTHD = torch.zeros(2, 3, 5, dtype=half), torch.zeros(2, 3, 4, 16, dtype=half)
    pages, scale = torch.zeros(7, 8, 4, 16, dtype=kv_dtype or half), torch.zeros(1, 4, 1, 1)
    qkv = torch.zeros(2, 3, 3, 4, 16, dtype=half)
    paged = {"kv_dtype": kv_dtype}
    requests = {
        paged_op.paged_attention_op: ((x_BTHD, pages), ((half,), 16, None, 8), paged),
        append.append_paged_kv_op: ((x_BTHD, x_BTHD, pages), ((half,), 16), paged),
        fused.qk_norm_append_paged_kv_op: ((qkv, scale, pages), ((half, wide), 16), paged),
        block_causal.block_causal_attention_op: ((x_BTHD,), ((half,), 16), {}),
        qk_norm_op.qk_norm_op: ((x_BTHD, x_BTHD, scale), ((half, wide), 16), {}),
        adaln.adaln_op: ((x_BTC.to(wide), x_BTC), ((wide, half), None, 5), {}),
        adaln.gated_op: ((x_BTC.to(wide), x_BTC), ((wide, half), None, 5), {}),
    }
    for op, (tensors, properties, named) in requests.items():
        assert op._request(*tensors) == Request("cpu", *properties, **named), op.title
    without = fused.qk_norm_append_paged_kv_op._request(qkv, None, pages)
    assert without == Request("cpu", (half,), 16, kv_dtype=kv_dtype)


@pytest.mark.parametrize("found", [None, "triton"])
def test_triton_is_there_where_it_can_be_imported(monkeypatch, found):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: found)
    assert support._has_triton.__wrapped__() is (found is not None)


def test_the_gradient_of_an_op_without_one_is_refused():
    with pytest.raises(RuntimeError, match="inference-only: it has no backward pass"):
        Backend(support.always, max).backward  # noqa: B018
    assert Backend(support.always, max, min).backward is min


def test_the_least_of_all_visible_gpus_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5), (8, 6)].__getitem__)
    assert support._least_capability.__wrapped__() == (7, 5)


def test_what_a_choice_depends_on_is_asked_again_after_forgetting(monkeypatch):
    def launch(**arguments):
        ran.append("planted")
        return adaln.reference_adaln_forward(**arguments)

    ran = []
    adaln_modulate(X, ROW, ROW)
    monkeypatch.setitem(adaln.adaln_op.backends, "cpu", Backend(support.always, launch))
    registry.forget_signatures()
    adaln_modulate(X, ROW, ROW)
    assert ran == ["planted"]


def test_no_more_signatures_are_kept_than_the_limit(monkeypatch, checks):
    monkeypatch.setattr(registry, "MAX_SIGNATURES", 5)
    for tokens in range(1, 30):
        adaln_modulate(torch.zeros(2, tokens, 16), ROW, ROW)
        assert 1 <= len(adaln.adaln_op.signatures) <= 5
    assert len(checks) == 29
    adaln_modulate(torch.zeros(2, 29, 16), ROW, ROW)
    assert len(checks) == 29


def test_values_are_checked_at_every_call_of_a_known_signature():
    q, pages = torch.zeros(1, 1, 1, 16), torch.zeros(2, 2, 1, 16)
    table, lens = torch.tensor([[1]], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    paged_attention(q, pages, pages, table, lens)
    lens.fill_(3)
    with pytest.raises(ValueError, match=r"kv_lens_B\[0\] must be in \[0, 2\]"):
        paged_attention(q, pages, pages, table, lens)
    slots = torch.zeros(1, 1, dtype=torch.int64)
    append_paged_kv(q, q, pages, pages.clone(), slots)
    slots.fill_(4)
    with pytest.raises(ValueError, match=r"slots_BT\[0, 0\] must be -1 or in \[0, 4\)"):
        append_paged_kv(q, q, pages, pages.clone(), slots)
    logits = torch.zeros(2, 1, 8)
    sample_tokens(logits, guidance=1.0)
    logits.fill_(torch.nan)
    with pytest.raises(ValueError, match="must be free of NaN"):
        sample_tokens(logits, guidance=1.0)


def test_one_pool_for_keys_and_values_is_refused_after_a_good_call():
    q, pages = torch.zeros(1, 1, 1, 16), torch.zeros(2, 2, 1, 16)
    slots = torch.zeros(1, 1, dtype=torch.int64)
    append_paged_kv(q, q, pages, pages.clone(), slots)
    with pytest.raises(ValueError, match="k_pages_PNHD and v_pages_PNHD must not share memory"):
        append_paged_kv(q, q, pages, pages, slots)


def test_fake_tensors_are_checked_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, row = mode.from_tensor(X), mode.from_tensor(ROW)
        assert adaln_modulate(x, row, row).shape == X.shape
        with pytest.raises(ValueError, match="shift_BC must be"):
            adaln_modulate(x, row, row[:, :8])
    assert not adaln.adaln_op.signatures


def test_a_wrong_shape_in_a_compiled_function_is_refused():
    compiled = torch.compile(adaln_modulate, backend="aot_eager")
    torch.testing.assert_close(compiled(X, ROW, ROW), adaln_modulate(X, ROW, ROW))
    with pytest.raises(ValueError, match="shift_BC must be"):
        compiled(X, ROW, ROW[:, :8])


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_and_sizes_that_are_symbols_give_the_same_bits(dynamic):
    def step(x, scale, shift):
        return adaln_modulate(x.transpose(0, 1) * 2, scale, shift).sum(1)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5):
        x = torch.randn(tokens, 2, 16)
        expected = step(x, ROW, ROW)
        torch.testing.assert_close(compiled(x, ROW, ROW), expected)


def test_a_named_backend_in_a_graph_is_checked_when_it_runs():
    @torch.compile(fullgraph=True, backend="eager")
    def step(x, row):
        return adaln_modulate(x, row, row, backend="cpu")

    with pytest.raises(ValueError, match='backend "cpu" cannot run this call: dtype float16'):
        step(X.half(), ROW.half())


def test_explain_says_why_not_another_and_refuses_an_unknown_op(monkeypatch):
    text = explain("adaln_modulate")
    assert text.startswith("cpu (preference order; triton: ")
    assert "flash: it does not implement this op" in text
    with pytest.raises(ValueError, match="op must be one of 'block_causal_attention', "):
        explain("no_such_op")
    assert explain("qk_norm", backend="reference").startswith("reference (asked for by name; ")
    monkeypatch.setenv("VARIANT_BACKEND", "reference")
    assert "cpu: not asked for" in explain("paged_attention", page_size=16)


def test_a_launcher_is_imported_at_its_first_call():
    run = """
import sys, torch, variant_kernels as vk
assert "variant_kernels.cpu_ops.adaln" not in sys.modules
vk.adaln_modulate(torch.zeros(1, 1, 8), torch.zeros(1, 8), torch.zeros(1, 8))
assert "variant_kernels.cpu_ops.adaln" in sys.modules
assert "variant_kernels.cpu_ops.qk_norm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", run], check=True)


def test_every_backend_of_an_op_is_where_its_table_says():
    for op, backends in tables().items():
        for name, backend in backends.items():
            for launcher in (backend._forward, backend._backward):
                if isinstance(launcher, str):
                    module, _, function = launcher.rpartition(".")
                    path = ROOT / "variant_kernels" / (module.replace(".", "/") + ".py")
                    defined = {
                        getattr(node, "name", "") for node in ast.parse(path.read_text()).body
                    }
                    assert function in defined, (op, name, launcher)


def test_a_backward_op_called_directly_names_the_backends_that_it_takes():
    dot = torch.ops.variant_kernels.qk_norm_backward
    q_BTHD, scale_mul = torch.randn(1, 2, 2, 16), torch.zeros(1, 2, 1, 1)
    for name in ("auto", "triton9"):
        with pytest.raises(ValueError, match="qk_norm_backward: backend must be one of"):
            dot(q_BTHD, q_BTHD, q_BTHD, q_BTHD, scale_mul, name)


def test_explain_follows_the_order_of_the_op():
    def refuses(request):
        return "it never can"

    backends = {
        "flex": Backend(refuses, "nowhere"),
        "cpu": Backend(support.always, "nowhere"),
        "triton": Backend(support.always, "nowhere"),
        "reference": Backend(support.always, "nowhere"),
    }
    choice = resolve("an_op", backends, Request("cpu", (torch.float32,)))
    assert choice.name == "cpu"
    # triton stands behind cpu in this op; the others are none of its backends.
    missing = "it does not implement this op"
    assert choice.others == {
        "cuda": missing, "flash": missing, "flashinfer": missing, "flex": "it never can"
    }  # fmt: skip


def test_explain_says_that_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(select, "for_tests", lambda name: name == "triton")
    backends = {name: Backend(support.always, "nowhere") for name in ("triton", "cpu")}
    choice = resolve("an_op", backends, Request("cpu", (torch.float32,)))
    assert (choice.name, choice.others["triton"]) == ("cpu", "interpreted")


def statements(path):
    """Lines of a file that hold code: no blank line, comment or docstring."""
    source = path.read_text()
    lines = set()
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skip, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines -= set(range(value.lineno, value.end_lineno + 1))
    return len(lines)


def test_little_generic_python_stands_in_front_of_a_launcher():
    kernels = ROOT / "variant_kernels"
    files = [kernels / "ops/registry.py", kernels / "ops/contract.py"]
    files += (kernels / "dispatch").glob("*.py")
    # 475: 450 before float64, sparse tensors and backends that are no text were refused by name,
    # and messages counted their nouns.
    assert sum(map(statements, files)) < 475
    # An ordinary call passes a dozen of these lines; the others answer to derivatives, vmap, sparse
    # tensors and negated views.
    assert statements(kernels / "ops/derivatives.py") + statements(kernels / "ops/library.py") < 140
