"""The interpreter of the tests does what Triton's does, with fewer replacements of functions."""

import pytest
import torch

from variant_kernels.dispatch.support import triton_interprets

if not triton_interprets():
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.quick_interpreter import leave_out_repeated_patches


@triton.jit
def largest_and_sum(x_ptr, i):
    row = tl.load(x_ptr + i * 4 + tl.arange(0, 4))
    return tl.max(row, axis=0), tl.sum(row * 2, axis=0)


@triton.jit
def kernel(x_ptr, y_ptr):
    i = tl.program_id(0)
    largest, total = largest_and_sum(x_ptr, i)
    tl.store(y_ptr + 2 * i, largest)
    tl.store(y_ptr + 2 * i + 1, total)


def test_functions_are_replaced_once_a_launch_and_put_back(monkeypatch):
    patched = []
    original = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda *given: patched.append(given[0]) or original(*given)
    )
    load = tl.load
    x = torch.arange(12.0).view(3, 4)
    for _ in range(2):
        patched.clear()
        y = torch.zeros(3, 2)
        kernel[(3,)](x, y)
        assert torch.equal(y, torch.stack([x.amax(1), 2 * x.sum(1)], dim=1))
        assert tl.load is load
    # A launch replaces those of tl, of its tensor, its math and descriptors. Each of three programs
    # calls functions, which call others: Triton does the same again for each of these calls.
    assert len(patched) == 4


def test_another_version_of_triton_is_left_alone(monkeypatch):
    patch = interpreter._patch_lang
    monkeypatch.delattr(interpreter, "_LangPatchScope")
    assert not leave_out_repeated_patches()
    assert interpreter._patch_lang is patch
