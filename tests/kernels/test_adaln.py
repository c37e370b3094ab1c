"""adaln_modulate and gated_residual_adaln: every backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import Tally, backends_for, cases, draws, moved, name_of, wide

from variant_kernels import adaln_modulate, explain, gated_residual_adaln, use_backend
from variant_kernels.dispatch.select import Backend
from variant_kernels.dispatch.support import always
from variant_kernels.ops import adaln

EPS = 1e-6
CASES = cases(adaln.gated_op.backends)
FLOAT32_BACKENDS = backends_for(adaln.gated_op.backends, torch.float32)


def plain_adaln(x, scale, shift):
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS).to(scale.dtype)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def plain_gated(x, y, gate, scale, shift):
    x = (x + gate.unsqueeze(1) * y).to(x.dtype)
    return x, plain_adaln(x, scale, shift)


def run(function, inputs, weights):
    """Outputs, and gradients of their weighted sum."""
    # Not cloned: a clone of these views would be contiguous, and strides are part of the contract.
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = zip(outputs, weights, strict=True)
    loss = sum((o * w.to(o.device, o.dtype)).sum() for o, w in pairs)
    return outputs, torch.autograd.grad(loss, leaves)


def compare(tally, case, function, plain, inputs, generator):
    exact_inputs = wide(*inputs)
    outputs = plain(*exact_inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    weights = [w.to(inputs[-1].dtype).double() for w in weights]
    exact = run(plain, exact_inputs, weights)
    ours, ordinary = run(function, moved(*inputs), weights), run(plain, inputs, weights)
    for kind, (name, times) in enumerate((("output", 2.0), ("gradient", 3.0))):
        results = zip(ours[kind], ordinary[kind], exact[kind], strict=True)
        for i, (a, b, c) in enumerate(results):
            tally.add(f"case {case} {name} {i}", a.cpu(), b, c, times)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_gated_residual_adaln_matches_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(1)

    def op(*leaves):
        return gated_residual_adaln(*leaves, backend=backend)

    for case, inputs in draws(adaln.sample_inputs, dtype, generator):
        compare(tally, case, op, plain_gated, inputs, generator)
    tally.check()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_adaln_modulate_matches_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(2)

    def op(*leaves):
        return adaln_modulate(*leaves, backend=backend)

    for case, (x, _, _, scale, shift) in draws(adaln.sample_inputs, dtype, generator):
        compare(tally, case, op, plain_adaln, (x, scale, shift), generator)
    tally.check()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_strided_views_give_what_contiguous_copies_give(backend, dtype):
    for inputs in adaln.sample_inputs(dtype, torch.Generator().manual_seed(3)):
        inputs = moved(*inputs)
        strided = gated_residual_adaln(*inputs, backend=backend)
        copies = gated_residual_adaln(*(t.contiguous() for t in inputs), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_large_mean_does_not_cancel(backend):
    """The variance as E[x^2] - E[x]^2 would lose all digits here."""
    x = torch.randn(1, 4, 512, generator=torch.Generator().manual_seed(0)) + 3000
    zeros = torch.zeros(1, 512)
    y = adaln_modulate(*moved(x, zeros, zeros), backend=backend).cpu()
    exact = plain_adaln(*wide(x, zeros, zeros))
    # The limit is what float32 holds of the mean: one part in 2^24 of 3000.
    assert (y - exact).abs().max() < 1e-3


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_opcheck_passes(backend):
    generator = torch.Generator().manual_seed(4)
    cases = adaln.sample_inputs(torch.float32, generator)
    for inputs in (*cases[:2], cases[-1]):
        x, y, gate, scale, shift = (t.requires_grad_() for t in moved(*inputs))
        torch.library.opcheck(adaln.gated_op.overload, (x, y, gate, scale, shift, EPS, backend))
        torch.library.opcheck(adaln.adaln_op.overload, (x, scale, shift, EPS, backend))


def test_fullgraph_compile_gives_the_same_gradients():
    inputs = adaln.sample_inputs(torch.float32, torch.Generator().manual_seed(5))[4]

    def loss(*leaves):
        x, h = gated_residual_adaln(*leaves)
        return (x * h).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_second_derivative_is_refused(backend):
    x, y, gate, scale, shift = (t.requires_grad_() for t in moved(*torch.randn(5, 2, 1, 8)))
    rows = gate[:, 0], scale[:, 0], shift[:, 0]
    for output in (
        adaln_modulate(x, rows[1], rows[2], backend=backend),
        gated_residual_adaln(x, y, *rows, backend=backend)[1],
    ):
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(first.square().sum(), x)


def test_the_backward_pass_runs_where_the_forward_ran(monkeypatch):
    x, row = torch.randn(1, 2, 8, requires_grad=True), torch.zeros(1, 8)
    ran = []
    real = adaln.adaln_op.backends["reference"]

    def spy(**arguments):
        ran.append("reference")
        return real.backward(**arguments)

    monkeypatch.setitem(adaln.adaln_op.backends, "reference", Backend(always, real.forward, spy))
    with use_backend("reference"):
        y = adaln_modulate(x, row, row)
    y.sum().backward()
    assert ran == ["reference"]


def test_the_environment_chooses_the_backend(monkeypatch):
    x, row = torch.zeros(1, 2, 8).half(), torch.zeros(1, 8).half()
    monkeypatch.setenv("VARIANT_BACKEND", "cpu")
    with pytest.raises(ValueError, match='backend "cpu" cannot run this call'):
        adaln_modulate(x, row, row)
    adaln_modulate(x, row, row, backend="reference")
    monkeypatch.setenv("VARIANT_BACKEND", "")
    adaln_modulate(x, row, row)
    chosen = explain("adaln_modulate", dtype=torch.float16)
    assert chosen.startswith("reference (preference order; ")
    assert "cpu: dtype float16 is not among its dtypes" in chosen


def test_wrong_arguments_are_named():
    x, row = torch.zeros(2, 5, 64), torch.zeros(2, 64)
    with pytest.raises(
        ValueError,
        match=r"adaln_modulate: scale_BC must be \(2, 64\) to match x_BTC \(2, 5, 64\); "
        r"got \(2, 32\)",
    ):
        adaln_modulate(x, row[:, :32], row)
    with pytest.raises(ValueError, match="eps must be a finite number >= 0; got -1"):
        adaln_modulate(x, row, row, eps=-1)
    with pytest.raises(TypeError, match="x_BTC must be one of float32, bfloat16, float16, float64"):
        adaln_modulate(x.int(), row, row)
    with pytest.raises(TypeError, match="x_BTC must be float32 or have the dtype of scale_BC"):
        adaln_modulate(x.double(), row, row)
    with pytest.raises(TypeError, match="x_BTC must be float32 or have the dtype of scale_BC"):
        adaln_modulate(x.bfloat16(), row, row)
    with pytest.raises(ValueError, match="x_BTC must have a contiguous last dimension"):
        adaln_modulate(x.transpose(1, 2), torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"y_BTC must be \(2, 5, 64\) to match x_BTC"):
        gated_residual_adaln(x, x[:, :4], row, row, row)
    with pytest.raises(
        ValueError, match='backend "nonsense" is unknown; available: auto, reference, cpu'
    ):
        adaln_modulate(x, row, row, backend="nonsense")
    with pytest.raises(ValueError, match='backend "cpu" cannot run this call: dtype float16'):
        adaln_modulate(x.half(), row.half(), row.half(), backend="cpu")
