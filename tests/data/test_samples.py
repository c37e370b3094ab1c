"""Samples: mixup and tokens are functions of (seed, epoch, index), whatever the batch."""

import numpy as np
import pytest
import torch
from small_models import small_model

from variant.data.encode import encode_images, part_size, without_tf32
from variant.data.images import epoch_order
from variant.data.samples import ImageSource, Samples, mixing
from variant.models.config import VQVAEConfig
from variant.models.vqvae import VQVAE


class Numbers:
    """Image data whose image i is filled with i, and whose label is i too."""

    num_held_out = num_classes = 3
    classes, classes_from = ("a", "b", "c"), "letters"

    def __init__(self, num_train):
        self.num_train, self.read = num_train, []

    def train(self, indices, epoch):
        self.read += list(indices)
        labels_B = torch.as_tensor(np.asarray(indices))
        return labels_B.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels_B

    def held_out(self, indices):
        return self.train(indices, 0)

    def take_bad(self):
        return ()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_partners_are_neighbours_in_the_order_of_the_epoch(count):
    partner_N, mix_N = mixing(3, 5, count, 0.4)
    order_N = epoch_order(3, 5, count)
    for position, index in enumerate(order_N):
        other = order_N[(position ^ 1) if (position ^ 1) < count else 0]
        assert partner_N[index] == other
    assert mix_N.shape == (count,)
    assert ((mix_N >= 0) & (mix_N <= 1)).all()


def test_mixing_differs_between_epochs_and_seeds_and_is_repeatable():
    draws = [mixing(seed, epoch, 50, 0.4) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({values[0].tobytes() for values in draws}) == 3
    assert len({values[1].tobytes() for values in draws}) == 3
    mixing.cache_clear()
    again = mixing(0, 0, 50, 0.4)
    assert all(np.array_equal(a, b) for a, b in zip(again, draws[0], strict=True))


def test_an_image_is_mixed_with_its_partner_by_its_weight():
    samples = ImageSource(Numbers(9), seed=1, alpha=0.4).samples([4, 0, 7], epoch=2)
    partner_N, mix_N = mixing(1, 2, 9, 0.4)
    assert samples.labels_B.tolist() == [4, 0, 7]
    assert samples.mixed_labels_B.tolist() == partner_N[[4, 0, 7]].tolist()
    expected = [mix_N[i] * i + (1 - mix_N[i]) * partner_N[i] for i in (4, 0, 7)]
    torch.testing.assert_close(samples.images[:, 0, 0, 0].tolist(), expected)


def test_a_sample_does_not_depend_on_the_others():
    source = ImageSource(Numbers(11), seed=0, alpha=0.4)
    whole = source.samples(np.arange(11), epoch=3)
    for index in range(11):
        one = source.samples([index], epoch=3)
        for name in ("images_BIYX", "labels_B", "mixed_labels_B", "mix_B"):
            assert torch.equal(getattr(one, name)[0], getattr(whole, name)[index])


def test_an_even_part_of_the_order_reads_no_image_twice():
    data = Numbers(12)
    source, order_N = ImageSource(data, seed=0, alpha=0.4), epoch_order(0, 1, 12)
    for part in np.split(order_N, 3):
        source.samples(part, epoch=1)
    assert sorted(data.read) == list(range(12))


def test_without_mixup_and_in_evaluations_images_are_as_they_are():
    plain = ImageSource(Numbers(5), seed=0, alpha=0.0).samples([3, 1], epoch=0)
    assert plain.images[:, 0, 0, 0].tolist() == [3.0, 1.0]
    assert plain.mixed_labels_B is plain.mix_B is None
    mixed = ImageSource(Numbers(5), seed=0, alpha=0.4)
    for samples in (mixed.unmixed([3, 1]), mixed.held_out([3, 1])):
        assert samples.images[:, 0, 0, 0].tolist() == [3.0, 1.0]
        assert samples.mix_B is None


def test_samples_move_and_split_as_one():
    samples = Samples(
        torch.zeros(4, 3, 2, 2), None, torch.arange(4), torch.arange(4), torch.ones(4)
    )
    part = samples.part(slice(1, 3))
    assert (len(samples), len(part), part.labels_B.tolist()) == (4, 2, [1, 2])
    moved = samples.to(torch.device("meta"))
    assert moved.images.is_meta
    assert moved.mix_B.is_meta
    assert moved.tokens_BL is None


@pytest.fixture(scope="module")
def vae():
    return small_model().vae


@pytest.mark.parametrize("sides", [(1, 2, 3), (1, 2, 4), (1, 2, 5), (1, 2, 6), (1, 2, 4, 8)])
def test_tokens_of_an_image_do_not_depend_on_its_batch(sides):
    torch.manual_seed(0)
    config = VQVAEConfig(
        vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=sides
    )
    vae = VQVAE(config).eval()
    images = torch.rand(40, 3, config.image_size, config.image_size) * 2 - 1
    features = []
    encode = vae.quantize.encode
    # Tokens hide small differences of the features, which would change some image's tokens.
    vae.quantize.encode = lambda rest: features.append(rest.clone()) or encode(rest)
    size = part_size(vae, torch.device("cpu"))

    def features_of(parts):
        """The features of all images, without those of the padding."""
        features.clear()
        for part in parts:
            encode_images(vae, part)
        counts = [len(piece) for part in parts for piece in part.split(size)]
        return torch.cat([f[:n] for f, n in zip(features, counts, strict=True)])

    whole = features_of([images])
    for step in (1, 5, 16, 19):
        assert torch.equal(features_of(images.split(step)), whole)
    order = torch.randperm(40)
    assert torch.equal(features_of([images[order]]), whole[order])


def test_encoding_turns_autocast_and_tf32_off(vae, monkeypatch):
    observed = []
    encode = vae.encode
    monkeypatch.setattr(
        vae,
        "encode",
        lambda images: (
            observed.append((torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32))
            or encode(images)
        ),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encode_images(vae, torch.zeros(1, 3, 6, 6))
    assert observed == [(False, False)]


def test_tf32_is_restored():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with without_tf32():
        assert not cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert cudnn.allow_tf32 == before
