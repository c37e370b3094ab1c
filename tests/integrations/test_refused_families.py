"""The errors for codebases that ``patch`` recognises but does not support."""

import pytest
import torch
from torch import nn

from variant_kernels import patch
from variant_kernels.integrations import PatchError


class Part(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def lookalike_switti(use_ar):
    """The attributes by which ``patch`` recognises Switti."""
    block = Part(attn=nn.Linear(2, 2), cross_attn=nn.Linear(2, 2))
    return Part(use_ar=use_ar, patch_nums=(1, 2, 3), blocks=nn.ModuleList([block]))


def lookalike_hart():
    """The attributes by which ``patch`` recognises HART."""
    attn = Part(qkv_proj=nn.Linear(2, 6), context_token=300)
    return Part(patch_nums=(1, 2, 3), blocks=nn.ModuleList([Part(attn=attn)]))


@pytest.mark.parametrize("use_ar", [False, True])
def test_switti_is_refused_because_it_does_not_cache_self_attention(use_ar):
    with pytest.raises(PatchError, match=r"Switti, which is not supported: by default .*caches no"):
        patch(lookalike_switti(use_ar))


def test_hart_is_refused_because_it_needs_its_cuda_extension():
    with pytest.raises(PatchError, match=r"HART, which is not supported: .*hart_backend"):
        patch(lookalike_hart())


@pytest.mark.parametrize("make", [lambda: lookalike_switti(False), lookalike_hart])
def test_a_refused_model_is_not_touched(make):
    model = make()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(PatchError):
        patch(model, depth=2)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert torch.is_tensor(next(model.parameters()))


def test_the_error_for_an_unknown_model_names_every_family():
    with pytest.raises(PatchError) as caught:
        patch(nn.Linear(2, 2))
    for name in ("Infinity", "HART", "Switti", "CoDe", "VAR"):
        assert f"{name}: " in str(caught.value)
