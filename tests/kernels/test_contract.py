"""The checks that all ops share: what each takes at its limits, and what each refuses."""

import math

import pytest
import torch

from variant_kernels.ops import contract


def test_tensors_of_other_layouts_are_named():
    contract.check_tensor("op", "x", torch.zeros(2))
    with pytest.raises(TypeError, match=r"^op: x must be a torch.Tensor; got list$"):
        contract.check_tensor("op", "x", [1.0])
    for value, got in (
        (torch.zeros(2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
        (
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            "a nested tensor",
        ),
    ):
        with pytest.raises(TypeError, match=rf"a dense tensor with strides; got {got}$"):
            contract.check_tensor("op", "x", value)


def test_dtypes_of_the_kernels_and_of_the_reference():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        contract.check_float("op", "x", torch.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match=r"^op: x must be one of .*float64; got int64$"):
        contract.check_float("op", "x", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^op: x must be one of float32; got float64$"):
        contract.check_float("op", "x", torch.zeros(2, dtype=torch.float64), (torch.float32,))


def test_the_last_dimension_is_contiguous_where_it_has_more_than_one_element():
    x = torch.zeros(4, 4)
    for taken in (x, x[::2], x[:, ::4], torch.zeros(()), x[:1].T):
        contract.check_last_contiguous("op", "x", taken)
    y = torch.zeros(2, 3, 4)
    contract.check_last_contiguous("op", "x", y.transpose(0, 1))
    for refused in (x.T, x[:, ::2], x[:2].T, y.transpose(1, 2), y.transpose(0, 1)[..., ::2]):
        with pytest.raises(ValueError, match=rf"got stride {refused.stride(-1)}\. Call"):
            contract.check_last_contiguous("op", "x", refused)


def test_dimensions_and_shapes():
    contract.check_ndim("op", "x", torch.zeros(1, 2, 3), "(B, T, C)")
    with pytest.raises(ValueError, match=r"must have 3 dimensions \(B, T, C\); got shape \(2, 3\)"):
        contract.check_ndim("op", "x", torch.zeros(2, 3), "(B, T, C)")
    contract.check_shape("op", "x", torch.zeros(2, 3), (2, 3), "to match y")
    with pytest.raises(ValueError, match=r"^op: x must be \(3, 2\) to match y; got \(2, 3\)$"):
        contract.check_shape("op", "x", torch.zeros(2, 3), (3, 2), "to match y")


def test_dtype_and_device_of_another_argument():
    x = torch.zeros(2)
    contract.check_same("op", "x", x, "y", torch.zeros(3))
    with pytest.raises(TypeError, match=r"x must have the dtype of y \(float64\); got float32$"):
        contract.check_same("op", "x", x, "y", x.double())
    with pytest.raises(ValueError, match=r"x must be on the device of y \(meta\); got cpu$"):
        contract.check_same("op", "x", x, "y", x.to("meta"))


@pytest.mark.parametrize("value", [0.5, 2, -(2.0**20), 2.0**20, 2**20, torch.tensor(0.5), 0])
def test_softmax_scales_are_floats(value):
    result = contract.softmax_scale("op", value)
    assert type(result) is float
    assert result == float(value)


def test_no_softmax_scale_stays_none_and_the_default_is_of_the_width():
    assert contract.softmax_scale("op", None) is None
    assert contract.default_softmax_scale(torch.zeros(3, 64)) == 1 / 8
    assert contract.default_softmax_scale(torch.zeros(1, 64, 2, 16)) == 1 / 4


@pytest.mark.parametrize("value", [math.inf, math.nan, 2.0**20 + 1, -(2.0**21), 2**20 + 1])
def test_softmax_scales_out_of_range(value):
    with pytest.raises(ValueError, match=r"^op: softmax_scale must be a finite number in \[-"):
        contract.softmax_scale("op", value)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 248, 256])
def test_head_dims_that_the_kernels_take(head_dim):
    contract.check_head_dim("op", "q", head_dim)


@pytest.mark.parametrize("head_dim", [0, 8, 15, 20, 63, 250, 257, 264])
def test_head_dims_that_they_do_not_take(head_dim):
    with pytest.raises(ValueError, match=rf"multiple of 8 from 16 to 256; got {head_dim}$"):
        contract.check_head_dim("op", "q", head_dim)
