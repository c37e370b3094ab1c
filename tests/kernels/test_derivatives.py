"""What every op answers to derivatives: right gradients in every form, or a refusal by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.kernels.compare import backends_for, moved
from variant_kernels import (
    ScaleLayout,
    adaln_modulate,
    append_paged_kv,
    block_causal_attention,
    gated_residual_adaln,
    paged_attention,
    qk_norm,
    qk_norm_append_paged_kv,
    sample_tokens,
)
from variant_kernels.ops import derivatives, tables

LAYOUT = ScaleLayout.from_patch_nums((1, 2))
X, Y = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
QKV = torch.randn(1, 5, 3, 2, 16, generator=torch.Generator().manual_seed(2))
SCALE = torch.zeros(1, 2, 1, 1)
LOGITS = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))


def pool():
    return torch.zeros(2, 4, 2, 16, device=moved(X)[0].device)


def differentiable():
    """(op, function of tensors, tensors)."""
    q, k, v = QKV.unbind(2)
    gate, scale, shift = ROWS
    return {
        "adaln_modulate": (adaln_modulate, (X, scale, shift)),
        "gated_residual_adaln": (gated_residual_adaln, (X, Y, gate, scale, shift)),
        "qk_norm": (qk_norm, (q, k, SCALE)),
        "block_causal_attention": (
            lambda q, k, v, **named: block_causal_attention(q, k, v, LAYOUT, **named),
            (q, k, v),
        ),
        "block_causal_attention with scale_mul": (
            lambda q, k, v, scale, **named: block_causal_attention(
                q, k, v, LAYOUT, scale_mul_1H11=scale, **named
            ),
            (q, k, v, SCALE),
        ),
    }


def inference_only():
    table, lens = moved(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    (slots,) = moved(torch.arange(5).view(1, 5))
    q, k, v = QKV.unbind(2)
    return {
        "paged_attention": (
            lambda q, **named: paged_attention(q, pool(), pool(), table, lens, **named),
            (q,),
        ),
        "append_paged_kv": (
            lambda k, v, **named: append_paged_kv(k, v, pool(), pool(), slots, **named),
            (k, v),
        ),
        "qk_norm_append_paged_kv": (
            lambda qkv, scale, **named: qk_norm_append_paged_kv(
                qkv, scale, pool(), pool(), slots, **named
            ),
            (QKV, SCALE),
        ),
        "sample_tokens": (lambda x, **named: sample_tokens(x, guidance=1.0, **named), (LOGITS,)),
    }


def of_each_backend(functions):
    return [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for name in functions
        for backend in backends_for(tables()[name.split()[0]], torch.float32)
    ]


EVERY = of_each_backend({**differentiable(), **inference_only()})
DIFFERENTIABLE = of_each_backend(differentiable())
INFERENCE_ONLY = of_each_backend(inference_only())


def bound(name, backend):
    """(function of the tensors alone, the tensors)."""
    function, tensors = {**differentiable(), **inference_only()}[name]
    return lambda *inputs: function(*inputs, backend=backend), moved(*tensors)


def scalar(function):
    """The weighted sum of all results, so that each gets another gradient."""

    def total(*inputs):
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return sum((i + 1) * (r * r).sum() for i, r in enumerate(results))

    return total


def gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(scalar(function)(*leaves), leaves)


# --- forward mode -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_forward_mode_is_refused_by_name(name, backend):
    function, inputs = bound(name, backend)
    message = f"^{name.split()[0]}: has no forward-mode derivative"
    # Where another argument requires a gradient, either refusal is right.
    either = message.replace("forward-mode derivative", "(forward-mode derivative|gradient)")
    for position, x in enumerate(inputs):
        for wanted in (False, True):
            for grad_enabled in (False, True):
                primals = [y.detach().requires_grad_(wanted) for y in inputs]
                with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
                    primals[position] = forward_ad.make_dual(primals[position], torch.ones_like(x))
                    with pytest.raises(NotImplementedError, match=either if wanted else message):
                        function(*primals)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, tuple(inputs), tuple(map(torch.ones_like, inputs)))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(function)(*inputs)
    function(*inputs)  # outside, the same tensors are taken


@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_a_tangent_below_another_transform_is_refused(name, backend):
    """Of forward over reverse, the outer level shows no tangent."""
    function, inputs = bound(name, backend)

    def outer(x):
        def inner(weight):
            function(weight.detach() * x, *inputs[1:])
            return weight.sum()

        return torch.func.grad(inner)(torch.ones(1, device=x.device))

    with pytest.raises(NotImplementedError, match=f"^{name.split()[0]}: has no forward-mode"):
        torch.func.jvp(outer, (inputs[0],), (inputs[0],))


@pytest.mark.parametrize("name", {**differentiable(), **inference_only()})
def test_without_a_tangent_a_dual_level_changes_nothing(name):
    function, inputs = bound(name, "reference")
    with forward_ad.dual_level():
        function(*inputs)
        dual = forward_ad.make_dual(inputs[0], inputs[0])
        function(dual.detach(), *inputs[1:])
        with torch.inference_mode():  # which disables forward mode, as torch documents
            function(dual, *inputs[1:])


class OwnJvp(torch.autograd.Function):
    """A user's function with its own tangent, which calls an op in forward."""

    @staticmethod
    def forward(x, row):
        return adaln_modulate(x, row, row)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx, x_tangent, row_tangent):
        return 2 * ctx.saved_tensors[0]


def test_an_op_inside_a_function_with_its_own_tangent_runs():
    x, row = moved(X, ROWS[0])
    with forward_ad.dual_level():
        result = OwnJvp.apply(forward_ad.make_dual(x, x), row)
        tangent = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(tangent, 2 * adaln_modulate(x, row, row))


def test_a_graph_does_not_drop_a_tangent():
    x, row = moved(X, ROWS[0])
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(lambda x: adaln_modulate(x, row, row), backend=backend)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                compiled(dual)
        torch.testing.assert_close(compiled(x), adaln_modulate(x, row, row))


# --- reverse mode -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), DIFFERENTIABLE)
def test_the_gradients_of_torch_func_are_those_of_autograd(name, backend):
    function, inputs = bound(name, backend)
    expected = gradients(function, inputs)
    every = tuple(range(len(inputs)))
    for actual in (
        torch.func.grad(scalar(function), every)(*inputs),
        torch.func.jacrev(scalar(function), every)(*inputs),
        torch.func.vjp(scalar(function), *inputs)[1](torch.ones((), device=inputs[0].device)),
        torch.func.functional_call(  # of a module whose parameters are the inputs
            Holder(function, inputs), dict(zip("abcde", inputs, strict=False)), ()
        ),
    ):
        for ours, exact in zip(actual, expected, strict=True):
            assert torch.equal(ours, exact)


class Holder(torch.nn.Module):
    """Returns the gradients of its parameters."""

    def __init__(self, function, inputs):
        super().__init__()
        self.function = function
        self.names = "abcde"[: len(inputs)]
        for name, x in zip(self.names, inputs, strict=True):
            setattr(self, name, torch.nn.Parameter(torch.zeros_like(x)))

    def forward(self):
        return gradients(self.function, [getattr(self, name) for name in self.names])


@pytest.mark.parametrize(("name", "backend"), DIFFERENTIABLE)
def test_a_gradient_reaches_every_level_of_transforms(name, backend):
    function, inputs = bound(name, backend)
    expected = gradients(function, inputs)

    def outer(x):
        def inner(weight):
            return weight.sum() * scalar(function)(x, *inputs[1:])

        return torch.func.grad(inner)(torch.ones(1, device=x.device)).sum()

    torch.testing.assert_close(torch.func.grad(outer)(inputs[0]), expected[0])
    leaf = inputs[0].clone().requires_grad_()
    outer(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected[0])


@pytest.mark.parametrize(("name", "backend"), DIFFERENTIABLE)
def test_rows_of_vmap_are_rows_of_calls(name, backend):
    function, inputs = bound(name, backend)
    batch = [torch.stack([x, 0.5 * x, -x]) for x in inputs]
    every = tuple(range(len(inputs)))
    results = torch.vmap(scalar(function))(*batch)
    grads = torch.vmap(torch.func.grad(scalar(function), every))(*batch)
    for row in range(3):
        single = [x[row] for x in batch]
        assert torch.equal(results[row], scalar(function)(*single))
        for ours, exact in zip(grads, gradients(function, single), strict=True):
            assert torch.equal(ours[row], exact)


@pytest.mark.parametrize("name", ["append_paged_kv", "qk_norm_append_paged_kv", "sample_tokens"])
def test_vmap_of_what_writes_or_draws_is_refused_by_name(name):
    function, inputs = bound(name, "reference")
    with pytest.raises(NotImplementedError, match=f"{name}: has no vmap"):
        torch.vmap(function)(*[x[None] for x in inputs])


@pytest.mark.parametrize(("name", "backend"), DIFFERENTIABLE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(name, backend, reentrant):
    function, inputs = bound(name, backend)
    expected = gradients(function, inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    checkpoint(scalar(function), *leaves, use_reentrant=reentrant).backward()
    for leaf, exact in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, exact)


@pytest.mark.parametrize(("name", "backend"), DIFFERENTIABLE)
def test_a_second_derivative_is_refused_by_name(name, backend):
    function, inputs = bound(name, backend)
    message = f"^{name.split()[0]}: has no second derivative"
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(scalar(function)(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(sum(x.sum() for x in first), leaves)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: torch.func.grad(scalar(function))(x, *inputs[1:]).sum())(
            inputs[0]
        )
    with pytest.raises(NotImplementedError, match=f"^{name.split()[0]}: has no forward-mode"):
        torch.func.hessian(scalar(function))(*inputs)


@pytest.mark.parametrize(("name", "backend"), INFERENCE_ONLY)
def test_a_gradient_of_an_inference_only_op_is_refused_by_name(name, backend):
    function, inputs = bound(name, backend)
    message = f"^{name}: has no gradient"
    for position in range(len(inputs)):
        leaves = list(inputs)
        leaves[position] = inputs[position].clone().requires_grad_()
        with pytest.raises(NotImplementedError, match=message):
            function(*leaves)
        with torch.no_grad():
            function(*leaves)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=message):
            transform(scalar(function))(*inputs)

    def outer(x):  # the inner level wants no gradient of the op, the outer one does
        def inner(weight):
            function(weight.detach() * x, *inputs[1:])
            return weight.sum()

        return torch.func.grad(inner)(torch.ones(1, device=x.device)).sum()

    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(outer)(inputs[0])


def test_sampling_that_is_refused_leaves_the_generator_alone():
    (logits,) = moved(LOGITS)
    generator = torch.Generator(logits.device).manual_seed(5)
    before = generator.get_state()
    with pytest.raises(NotImplementedError, match="has no gradient"):
        sample_tokens(logits.clone().requires_grad_(), guidance=1.0, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_graph_with_an_inference_only_op_is_whole():
    function, inputs = bound("paged_attention", "auto")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    with pytest.raises(Exception, match="paged_attention: has no gradient"):
        compiled(*[x.clone().requires_grad_() for x in inputs])


def test_a_tangent_behind_a_number_is_refused():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(NotImplementedError, match=r"^an_op: has no forward-mode derivative"):
            derivatives._refuse_tangents("an_op", (3, None, torch.ones(1), dual))
        derivatives._refuse_tangents("an_op", (3, None, torch.ones(1)))
