"""Models in graphs, and on tensors without values: no check may ask for values."""

import pytest
import torch
from small_models import small_model
from torch._subclasses.fake_tensor import FakeTensorMode

LABELS = torch.tensor([1, 2])
TOKENS = torch.randint(24, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return small_model().eval()


def calls(model, device="cpu"):
    side = model.vae.config.image_size
    images = torch.zeros(2, model.vae.config.in_channels, side, side, device=device)
    tokens, labels = TOKENS.to(device), LABELS.to(device)
    words = torch.zeros(2, 13, model.var.config.vae_channels, device=device)
    return {
        "forward": lambda: model.var(labels, words),
        "loss": lambda: model.var(labels, words, targets_BL=tokens).mean,
        "teacher_input": lambda: model.vae.teacher_input(tokens),
        "decode": lambda: model.vae.decode(tokens),
        "encode": lambda: model.vae.encode(images),
    }


@pytest.mark.parametrize("name", ["forward", "loss", "teacher_input", "decode", "encode"])
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(model, name):
    with torch.no_grad():
        expected = calls(model)[name]()
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = calls(model)[name]()
        meta = calls(small_model().to("meta").eval(), "meta")[name]()
        assert torch.equal(calls(model)[name](), expected)
    for found in (fake, meta):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.nightly
def test_an_exported_transformer_gives_the_same_logits(model):
    words = model.vae.teacher_input(TOKENS)
    exported = torch.export.export(model.var, (LABELS, words)).module()
    with torch.no_grad():
        assert torch.equal(exported(LABELS, words), model.var(LABELS, words))
