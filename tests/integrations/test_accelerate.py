"""``variant.accelerate`` on a live model built like the original VAR."""

import pytest
import torch
from lookalike_var import build_vae_var, lookalike
from small_models import small_model
from torch import nn

import variant
from variant.errors import UserError
from variant_kernels import patch

LABELS = torch.tensor([1, 3])


def live(**options):
    model = lookalike(sides=(1, 2, 3), vocab=24, **options)
    return model, small_model().vae


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_logits_are_those_of_the_live_model(l2, shared, patched):
    model, vae = live(attn_l2_norm=l2, shared_aln=shared)
    handle = patch(model) if patched else None
    ours = variant.accelerate(model, vae)
    tokens = torch.randint(24, (2, 14), generator=torch.Generator().manual_seed(0))
    words = vae.teacher_input(tokens)
    with torch.no_grad():
        expected = model(LABELS, words)
    logits = ours.engine().forced_logits(LABELS, tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    if handle is not None:
        handle.unpatch()


def test_the_first_scale_may_have_several_tokens():
    vae, model = build_vae_var("cpu", depth=2, sides=(2, 3, 4))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.nan_to_num_(0.01)  # of convolutions, before a checkpoint is loaded
    ours = variant.accelerate(model, vae.eval())
    tokens = torch.randint(24, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(LABELS, vae.teacher_input(tokens))
    for logits in (
        ours.engine().forced_logits(LABELS, tokens),
        ours.var(LABELS, vae.teacher_input(tokens)),
    ):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    # Of the four tokens of the first scale a map keeps those that it covers, not all.
    mask = torch.zeros(4, 4)
    mask[:2] = 1
    result = ours.generate(LABELS, seed=0, tokens=tokens, mask=mask)
    free = ours.generate(LABELS, seed=0)
    assert torch.equal(result.tokens[:, :2], tokens[:, :2])
    assert torch.equal(result.tokens[:, 2:4], free.tokens[:, 2:4])
    assert not torch.equal(result.tokens[:, 2:4], tokens[:, 2:4])


def test_another_default_device_changes_nothing():
    model, vae = live()
    with torch.device("meta"):
        ours = variant.accelerate(model, vae)
    assert {weight.device.type for weight in ours.parameters()} == {"cpu"}


def test_weights_are_shared_and_changes_are_seen():
    model, vae = live()
    ours = variant.accelerate(model, vae)
    for name, parameter in ours.var.named_parameters():
        assert parameter.data_ptr() == model.get_parameter(name).data_ptr()
    tokens = torch.randint(24, (2, 14))
    first = ours.engine().forced_logits(LABELS, tokens)
    with torch.no_grad():
        model.head.weight.mul_(-1)
        model.head.bias.mul_(-1)
    assert torch.allclose(ours.engine().forced_logits(LABELS, tokens), -first, atol=1e-4)


def test_another_model_is_refused():
    model, vae = live()
    with pytest.raises(UserError, match="head_nm"):
        variant.accelerate(nn.Linear(3, 3), vae)
    with pytest.raises(UserError, match="VQ-VAE"):
        variant.accelerate(model, nn.Linear(3, 3))
    own = small_model()
    for kind in (own, own.var):
        with pytest.raises(UserError, match=r"got this package's .*VARiant\(var, vae\)\.generate"):
            variant.accelerate(kind, vae)


def test_a_call_of_the_model_names_what_generates():
    with pytest.raises(NotImplementedError, match=r"VARiant: .*model\.generate\(labels\)"):
        small_model()(LABELS)
