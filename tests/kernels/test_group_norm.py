"""group_norm_silu: every backend against float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import Tally, cases, draws, moved, name_of

from variant_kernels.ops.group_norm import group_norm_silu, group_norm_silu_op, sample_inputs

CASES = cases(group_norm_silu_op.backends)
EPS = 1e-6


def plain(x_BYXC, weight, bias, groups, silu):
    y = F.group_norm(x_BYXC.permute(0, 3, 1, 2), groups, weight, bias, EPS)
    return (F.silu(y) if silu else y).permute(0, 2, 3, 1)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_matches_float64(backend, dtype, silu):
    tally, generator = Tally(), torch.Generator().manual_seed(5)
    for case, (x, weight, bias, groups) in draws(sample_inputs, dtype, generator):
        ours = group_norm_silu(*moved(x, weight, bias), groups, silu=silu, backend=backend)
        exact = plain(x.double(), weight.double(), bias.double(), groups, silu)
        assert ours.is_contiguous()
        assert ours.dtype == dtype
        tally.add(f"case {case}", ours.cpu(), plain(x, weight, bias, groups, silu), exact)
    tally.check()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=name_of)
def test_large_and_empty_values(backend, dtype):
    x, weight, bias, groups = sample_inputs(dtype, torch.Generator().manual_seed(5))[1]
    large = group_norm_silu(*moved(x, weight * 100, bias), groups, backend=backend)
    assert large.isfinite().all()
    shape = (0, 3, 5, 12)
    assert group_norm_silu(*moved(x[:0], weight, bias), groups, backend=backend).shape == shape


def test_wrong_arguments_are_named():
    x, weight, bias, groups = sample_inputs(torch.float32, torch.Generator())[1]
    for error, match, arguments, options in (
        (
            ValueError,
            "num_groups must divide the 12 channels of x_BYXC; got 5",
            (x, weight, bias, 5),
            {},
        ),
        (
            ValueError,
            "weight_C must be .12,. for x_BYXC's channels",
            (x, weight[1:], bias, groups),
            {},
        ),
        (TypeError, "bias_C must have the dtype of x_BYXC", (x, weight, bias.half(), groups), {}),
        (ValueError, "eps must be", (x, weight, bias, groups), {"eps": -1.0}),
        (TypeError, "silu must be", (x, weight, bias, groups), {"silu": 2}),
        (ValueError, "must have 4 dimensions", (x[0], weight, bias, groups), {}),
    ):
        with pytest.raises(error, match=match):
            group_norm_silu(*arguments, **options)
    with pytest.raises(NotImplementedError, match="group_norm_silu"):
        group_norm_silu(x.requires_grad_(), weight, bias, groups)
