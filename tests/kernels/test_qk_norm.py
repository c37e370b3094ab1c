"""qk_norm: every backend against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import DRAWS, Tally, backends_for, cases, moved, name_of, wide

from variant_kernels import qk_norm
from variant_kernels.ops import qk_norm as op

CASES = cases(op.qk_norm_op.backends)
FLOAT32_BACKENDS = backends_for(op.qk_norm_op.backends, torch.float32)


def plain_qk_norm(q, k, scale_mul):
    scale = scale_mul.clamp_max(math.log(100)).exp().transpose(1, 2)
    return (F.normalize(q, dim=-1) * scale).to(q.dtype), F.normalize(k, dim=-1)


def gradients(function, inputs, weights):
    leaves = [t.detach().requires_grad_() for t in inputs]  # strides and all
    outputs = function(*leaves)
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_matches_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        for case, inputs in enumerate(op.sample_inputs(dtype, generator)):
            exact, plain = plain_qk_norm(*wide(*inputs)), plain_qk_norm(*inputs)
            ours = qk_norm(*moved(*inputs), backend=backend)
            for name, a, b, c in zip("qk", ours, plain, exact, strict=True):
                assert a.is_contiguous()
                tally.add(f"case {case} {name}", a.cpu(), b, c)
    tally.check()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_gradients_match_float64(backend, dtype):
    tally, generator = Tally(), torch.Generator().manual_seed(2)
    for _ in range(DRAWS):
        for case, (q, k, scale_mul) in enumerate(op.sample_inputs(dtype, generator)):
            # At a vector of zeros the gradient is 1/eps: a separate test checks it.
            q = q + (q == 0).all(-1, keepdim=True) * torch.ones((), dtype=dtype)
            inputs = q, k, scale_mul
            weights = [torch.randn(q.shape, generator=generator).to(dtype) for _ in range(2)]
            exact = gradients(plain_qk_norm, wide(*inputs), wide(*weights))
            plain = gradients(plain_qk_norm, inputs, weights)
            ours = gradients(
                lambda *a: qk_norm(*a, backend=backend), moved(*inputs), moved(*weights)
            )
            for name, a, b, c in zip(("dq", "dk", "dscale"), ours, plain, exact, strict=True):
                tally.add(f"case {case} {name}", a.cpu(), b, c, times=3)
    tally.check()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_zero_vectors_stay_zero_and_their_gradient_is_that_of_torch(backend):
    q, k, scale_mul = moved(
        torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 1)
    )
    q.requires_grad_()
    out, _ = qk_norm(q, k, scale_mul, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    (ours,) = torch.autograd.grad(out.sum(), q)
    (torchs,) = torch.autograd.grad(F.normalize(q, dim=-1).sum(), q)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_scale_is_clamped_at_100_and_passes_no_gradient_above(backend):
    q, scale_mul = moved(
        torch.randn(1, 2, 2, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([math.log(100) + 1, 1.0]).view(1, 2, 1, 1),
    )
    scale_mul.requires_grad_()
    out, _ = qk_norm(q, q, scale_mul, backend=backend)
    torch.testing.assert_close(
        out.norm(dim=-1).cpu(), torch.tensor([[[100, math.e]] * 2]), rtol=1e-5, atol=0
    )
    (grad,) = torch.autograd.grad((out * q).sum(), scale_mul)
    assert grad[0, 0] == 0
    assert grad[0, 1] != 0


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_opcheck_passes(backend):
    for q, k, scale in op.sample_inputs(torch.float32, torch.Generator().manual_seed(4))[1:2]:
        leaves = [t.detach().requires_grad_() for t in moved(q, k, scale)]
        torch.library.opcheck(op.qk_norm_op.overload, (*leaves, backend))


def test_wrong_arguments_are_named():
    q, scale = torch.zeros(2, 5, 2, 64), torch.zeros(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"scale_mul_1H11 must be \(1, 2, 1, 1\)"):
        qk_norm(q, q, scale[:, :1])
    with pytest.raises(ValueError, match=r"head_dim\) must be a multiple of 8 from 16 to 256"):
        qk_norm(q[..., :12], q[..., :12], scale)
    with pytest.raises(ValueError, match=r"k_BTHD must be \(2, 5, 2, 64\) to match q_BTHD"):
        qk_norm(q, q[:, :4], scale)
    with pytest.raises(TypeError, match="k_BTHD must have the dtype of q_BTHD"):
        qk_norm(q, q.bfloat16(), scale)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS, ids=name_of)
def test_an_empty_batch_has_gradients_from_gradients_of_any_stride(backend):
    q, k = (torch.zeros(0, 5, 2, 32, requires_grad=True) for _ in range(2))
    scale_mul = torch.zeros(1, 2, 1, 1, requires_grad=True)
    outputs = qk_norm(*moved(q, k, scale_mul), backend=backend)
    like = torch.zeros(()).to(outputs[0].device)
    torch.autograd.backward(outputs, [like.expand(o.shape) for o in outputs])
    assert q.grad.shape == k.grad.shape == q.shape
    assert scale_mul.grad.abs().max() == 0
