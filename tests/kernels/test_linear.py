"""Linear layers whose float32 products oneDNN computes on a CPU."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from variant_kernels.gelu import gelu
from variant_kernels.linear import linear, product
from variant_kernels.packed_linear import pack, packed_linear

FLOAT32 = torch.float32


def inputs_of(shape=(3, 5), *, inputs=24, outputs=40, dtype=FLOAT32, bias=True):
    generator = torch.Generator().manual_seed(0)
    sizes = (*shape, inputs), (outputs, inputs), (outputs,)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [x.requires_grad_() for x in tensors[: 3 if bias else 2]]


def result_and_gradients(function, tensors):
    y = function(*tensors)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), [x for x in tensors if x.requires_grad])


@pytest.fixture
def calls(monkeypatch):
    """The number of products that oneDNN computed."""
    counted = []
    real = torch.ops.mkldnn._linear_pointwise

    def count(*args):
        counted.append(args)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return counted


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 130), (2, 3, 4)])
def test_equals_float64_as_closely_as_torch(shape, bias, calls):
    tensors = inputs_of(shape, bias=bias)
    exact = result_and_gradients(F.linear, [x.detach().double().requires_grad_() for x in tensors])
    theirs = result_and_gradients(F.linear, tensors)
    ours = result_and_gradients(linear, tensors)
    assert len(calls) == 2  # the result and the gradient of the input
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert (our.shape, our.dtype, our.stride()) == (their.shape, their.dtype, their.stride())
        error, allowed = ((x.double() - true).norm() for x in (our, their))
        assert error <= 2 * allowed + 1e-7 * true.norm()


def test_takes_tensors_of_any_strides():
    x, weight, bias = (x.detach() for x in inputs_of((4, 6)))
    wide = torch.stack((x, x), -1)[..., 0].transpose(0, 1).requires_grad_()
    across = weight.t().contiguous().t().requires_grad_()
    for grad in (torch.ones(()).expand(6, 4, 40), torch.randn(4, 6, 40).transpose(0, 1)):
        for ours, theirs in zip(
            torch.autograd.grad(linear(wide, across, bias), (wide, across), grad),
            torch.autograd.grad(F.linear(wide, across, bias), (wide, across), grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["every second", "a column", "one number"])
def test_a_bias_of_any_stride_is_added(kind):
    x_RI, weight_OI = torch.randn(5, 32), torch.randn(48, 32)
    bias_O = {
        "every second": torch.randn(96)[::2],
        "a column": torch.randn(48, 3)[:, 1],
        "one number": torch.ones(1).expand(48),
    }[kind]
    expected = F.linear(x_RI.double(), weight_OI.double(), bias_O.double())
    for found in (
        linear(x_RI, weight_OI, bias_O),
        product(x_RI, weight_OI, bias_O),
        packed_linear(x_RI, pack(weight_OI), bias_O),
    ):
        assert torch.allclose(found.double(), expected, atol=1e-4)


def test_only_wanted_gradients_are_computed(calls):
    x, weight, bias = inputs_of()
    linear(x.detach(), weight, bias).sum().backward()
    assert len(calls) == 1
    assert all(x.grad is not None for x in (weight, bias))
    frozen_weight, frozen_bias = weight.detach(), bias.detach()
    linear(x, frozen_weight, frozen_bias).sum().backward()
    assert x.grad is not None
    assert frozen_weight.grad is frozen_bias.grad is None


def test_second_derivatives_equal_torch_s():
    tensors = inputs_of()

    def second(function):
        (grad,) = torch.autograd.grad(
            function(*tensors).square().sum(), tensors[0], create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), tensors)

    for ours, theirs in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


class Own(torch.Tensor):
    """A subclass, as sharded tensors are."""


@pytest.mark.parametrize(
    "case", ["float64", "bfloat16", "subclass", "one axis", "no rows", "autocast", "off", "meta"]
)
def test_torch_computes_what_onednn_would_not(case, calls, monkeypatch):
    x, weight, bias = (x.detach() for x in inputs_of())
    if case in ("float64", "bfloat16"):
        x, weight, bias = (t.to(getattr(torch, case)) for t in (x, weight, bias))
    elif case == "subclass":
        weight = weight.as_subclass(Own)
    elif case == "one axis":
        x = x[0, 0]
    elif case == "no rows":
        x = x[:0]
    elif case == "meta":
        x, weight, bias = (t.to("meta") for t in (x, weight, bias))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", case != "off")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert not calls
    assert (y.dtype, type(y)) == (expected.dtype, type(expected))
    if case != "meta":
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_transforms_of_torch_func_and_forward_mode_work():
    tensors = [x.detach() for x in inputs_of()]
    grads = torch.func.grad(lambda *t: linear(*t).square().sum(), (0, 1, 2))(*tensors)
    wanted = torch.func.grad(lambda *t: F.linear(*t).square().sum(), (0, 1, 2))(*tensors)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    mapped = torch.func.vmap(linear, (0, None, None))(*tensors)
    torch.testing.assert_close(mapped, F.linear(*tensors))
    ones = tuple(map(torch.ones_like, tensors))
    _, ours = torch.func.jvp(linear, tuple(tensors), ones)
    torch.testing.assert_close(ours, torch.func.jvp(F.linear, tuple(tensors), ones)[1])


def test_a_graph_has_torch_s_own_product():
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    tensors = inputs_of()
    torch.testing.assert_close(compiled(*tensors), F.linear(*tensors), rtol=0, atol=0)


def test_a_counter_of_work_sees_every_product():
    x, weight, bias = inputs_of()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * 24 * 40


def test_product_has_no_gradient_and_the_same_bits(calls):
    x, weight, bias = (x.detach() for x in inputs_of())
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_torch_jit_traces_it(grad):
    def layer(x, weight):
        return gelu(linear(x, weight))

    weight = torch.randn(5, 8, requires_grad=grad)
    trace = torch.jit.trace(layer, (torch.randn(3, 8), weight))
    x = torch.randn(4, 8)
    torch.testing.assert_close(trace(x, weight), layer(x, weight))
    assert "PythonOp" not in str(trace.graph)  # it can be saved
