"""The tanh-approximated GELU of training on a CPU."""

import pytest
import torch
from torch.nn import functional as F

from variant_kernels import gelu as gelus
from variant_kernels.gelu import gelu


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


def result_and_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y, x, torch.linspace(-1, 2, x.numel()).view(x.shape).to(x.dtype))
    return y.detach(), grad


@pytest.fixture
def calls(monkeypatch):
    """Tensors that our kernel got."""
    taken = []
    real = gelus._Gelu.apply
    monkeypatch.setattr(gelus._Gelu, "apply", lambda x: taken.append(x) or real(x))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 130, 257)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 2, 20])
def test_equals_float64_as_closely_as_torch(spread, shape, dtype, calls):
    generator = torch.Generator().manual_seed(0)
    x = (spread * torch.randn(shape, generator=generator)).to(dtype)
    exact = result_and_gradient(torch_gelu, x.double())
    theirs = result_and_gradient(torch_gelu, x)
    ours = result_and_gradient(gelu, x)
    assert len(calls) == 1
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert (our.shape, our.dtype) == (their.shape, dtype)
        error, allowed = ((y.double() - true).norm() for y in (our, their))
        assert error <= 1.2 * allowed + torch.finfo(dtype).eps * true.norm()


def test_the_gradient_may_be_expanded():
    x = torch.randn(4, 6, requires_grad=True)
    (ours,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(torch_gelu(x).sum(), x)[0])


@pytest.mark.parametrize("case", ["float64", "float16", "strided", "empty", "meta"])
def test_torch_computes_what_our_kernel_does_not_take(case, calls):
    x = torch.randn(6, 8)
    if case.startswith("float"):
        x = x.to(getattr(torch, case))
    x = {"strided": x.t(), "empty": x[:0], "meta": x.to("meta")}.get(case, x)
    y, expected = gelu(x), torch_gelu(x)
    assert not calls
    assert y.device == expected.device
    if case != "meta":
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_transforms_forward_mode_and_graphs_have_torch_s_own(calls):
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.func.vmap(gelu)(x), torch_gelu(x), rtol=0, atol=0)
    ours, theirs = (torch.func.jvp(f, (x,), (x,))[1] for f in (gelu, torch_gelu))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), torch_gelu(x), rtol=0, atol=0)
    assert not calls


def test_a_second_derivative_is_refused_by_name():
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gelu: has no second derivative"):
        grad.sum().backward()


def test_threads_change_no_bit():
    x = torch.randn(50_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(result_and_gradient(gelu, x))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_negated_views_have_the_negated_values():
    """Their memory holds the other sign, and the kernel takes addresses."""
    x, grad_y = torch.randn(2, 3, 4)
    negated, like = torch._neg_view(x).requires_grad_(), (-x).requires_grad_()
    torch.testing.assert_close(gelu(negated), torch_gelu(like))
    (ours,) = torch.autograd.grad(gelu(like), like, torch._neg_view(grad_y))
    torch.testing.assert_close(ours, torch.autograd.grad(torch_gelu(like), like, -grad_y)[0])
