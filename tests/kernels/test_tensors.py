"""The forms of tensors: which are copied, which overlap, which share memory."""

import numpy as np
import pytest
import torch

from variant_kernels import tensors


def test_only_a_strided_last_dimension_is_copied():
    x = torch.arange(24.0).view(4, 6)
    for same in (x, x[:, :3], x[::2], x[:, :1], x[:, ::6]):
        assert tensors.last_contiguous(same) is same
    for strided in (x.T, x[:, ::2], x[:1, :1].expand(4, 6)):
        copy = tensors.last_contiguous(strided)
        assert copy.stride(-1) == 1
        assert copy.data_ptr() != strided.data_ptr()
        assert torch.equal(copy, strided)
    # The last dimension, not the second: rows may have any stride, and one column too.
    y = torch.zeros(2, 3, 4)
    for same in (y.transpose(0, 1), y.transpose(1, 2)[..., :1]):
        assert tensors.last_contiguous(same) is same


def test_addresses_and_strides_leave_the_last_dimension_out():
    x = torch.zeros(4, 6)
    assert tensors.address_and_strides(x[1:, 2:]) == (x.data_ptr() + 4 * 8, 6)


def test_empty_tensors_are_contiguous_in_the_dtype_asked_for():
    empty = tensors.empty_as(torch.zeros(2, 3).T, torch.float16)
    assert (empty.shape, empty.stride(), empty.dtype) == ((3, 2), (2, 1), torch.float16)


@pytest.mark.parametrize(
    ("size", "stride", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (2, 1), True),
        ((2, 3), (1, 3), False),
        ((2, 3), (0, 1), True),
        ((1, 3), (0, 1), False),
        ((2, 1), (1, 0), False),
        ((2, 2, 2), (2, 2, 1), True),
        ((2, 2, 2), (4, 2, 1), False),
        ((2, 2, 2), (3, 2, 1), True),  # 3 = 2 + 1
        # Elements at 0, 2, 4 and 3, 5, 7: no common address, but counted as overlapping.
        ((2, 3), (3, 2), True),
        ((), (), False),
    ],
)
def test_overlap_of_a_tensor_with_itself(size, stride, overlaps):
    assert tensors.overlaps_itself(torch.zeros(64).as_strided(size, stride)) is overlaps


def test_memory_shared_by_two_tensors():
    x = torch.zeros(8, 8)
    assert tensors.share_memory(x, x[3])
    assert tensors.share_memory(x[3], x.view(torch.int16))
    assert not tensors.share_memory(x[:4], x[4:])
    assert not tensors.share_memory(x, x.clone())
    # Interleaved: every second column of the same rows.
    assert not tensors.share_memory(x[:, ::2], x[:, 1::2])
    assert tensors.share_memory(x[:, ::2], x[:, 2:3])
    assert tensors.share_memory(x[0, :1], x)
    assert tensors.share_memory(x, x[0, :1])
    for empty in (x[:0], x[:, :0]):
        assert not tensors.share_memory(x, empty)
        assert not tensors.share_memory(empty, x)
        assert not tensors.share_memory(empty, empty)
        assert not tensors.share_memory(empty, torch.zeros(0))


def test_memory_counts_as_shared_where_finding_out_takes_too_long(monkeypatch):
    def too_hard(*arrays, max_work):
        assert max_work == 10**6
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    assert tensors.share_memory(torch.zeros(2), torch.zeros(2)) is True


def test_addresses_read_no_memory():
    assert tensors._Addresses.of(torch.empty(2, 3, device="cpu").T).shape == (3, 2)
    assert not tensors._Addresses.of(torch.zeros(2)).flags.writeable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (300, 701)])
def test_the_version_of_a_tensor_of_inference_mode_tells_its_values(shape, dtype):
    ordinary = torch.ones(shape, dtype=dtype)
    assert tensors.version_of(ordinary) == ordinary._version
    with torch.inference_mode():
        x = torch.arange(ordinary.numel()).remainder(251).to(dtype).view(shape)
        before = tensors.version_of(x)
        assert tensors.version_of(x.clone()) == before
        others = [x + 7]
        for index in {0, x.numel() // 2, x.numel() - 1}:
            others.append(x.clone())
            others[-1].view(-1)[index] += 1
        if x.ndim == 2:  # the same values in another order
            rows, columns = torch.arange(len(x)), torch.arange(x.shape[1])
            rows[:2], columns[:2] = rows[:2].flip(0).clone(), columns[:2].flip(0).clone()
            others += [x[rows], x[:, columns], x.flip(0), x.flip(1)]
        versions = [tensors.version_of(other) for other in others]
        assert len({before, *versions}) == 1 + len(others)
        if x.ndim:  # also where a value lies across a boundary of eight bytes
            assert tensors.version_of(x[1:]) == tensors.version_of(x[1:].clone())


def test_every_bit_of_a_value_tells_in_the_version():
    with torch.inference_mode():
        x = torch.arange(1, 102) * 0x123456789ABCDEF
        before = tensors.version_of(x)
        for bit in range(64):
            x[50] ^= 1 << bit if bit < 63 else -(2**63)
            assert tensors.version_of(x) != before
            x[50] ^= 1 << bit if bit < 63 else -(2**63)
        assert tensors.version_of(x) == before


def test_a_tensor_without_values_of_inference_mode_has_the_version_0():
    with torch.inference_mode():
        assert tensors.version_of(torch.zeros(0, 3)) == 0
        assert tensors.version_of(torch.zeros(2, 3, device="meta")) == 0


def test_memory_is_not_kept_alive():
    x, y = torch.ones(4), torch.ones(4)
    memory = tensors.Memory([x, y.view(2, 2)])
    assert not memory.was_freed
    view = x[1:]
    del x
    assert not memory.was_freed
    del view
    assert memory.was_freed


def test_an_address_is_given_for_a_contiguous_last_dimension_alone():
    x = torch.zeros(4, 3, 2)
    assert tensors.address_and_strides(x) == (x.data_ptr(), 6, 2)
    assert tensors.address_and_strides(x[..., :1]) == (x.data_ptr(), 6, 2)
    assert tensors.address_and_strides(x[..., ::2]) == (x.data_ptr(), 6, 2)  # one element
    with pytest.raises(ValueError, match=r"^address_and_strides: .*strides \(6, 1, 2\)"):
        tensors.address_and_strides(x.transpose(1, 2))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) and strides \(1, 3\)"):
        tensors.address_and_strides(torch.zeros(2, 3).T)


def test_a_tensor_without_elements_may_have_any_strides():
    x = torch.zeros(1).expand(0, 3, 2)
    assert tensors.last_contiguous(x).stride() == (0, 0, 0)  # torch copies none
    assert tensors.address_and_strides(x) == (x.data_ptr(), 0, 0)
