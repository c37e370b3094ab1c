"""IDX files: their images and labels, damaged ones, and Fashion-MNIST where it is installed."""

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from variant.data import idx
from variant.data.config import DataSection
from variant.data.idx import FASHION_MNIST, FASHION_MNIST_CLASSES, IdxData, read_idx
from variant.data.sources import classes_problem, open_data, open_source
from variant.errors import UserError

needs_fashion = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def as_idx(values):
    """An IDX file of unsigned bytes, byte by byte as its definition says."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    return header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def pixels(count, rows=6, columns=4):
    return np.random.default_rng(count).integers(0, 256, (count, rows, columns), dtype=np.uint8)


@pytest.fixture
def section(tmp_path):
    """Twelve training images and five held-out ones of 4x6 pixels, in three classes."""
    for part, count in (("train", 12), ("held_out", 5)):
        (tmp_path / part).write_bytes(as_idx(pixels(count)))
        labels = np.arange(count, dtype=np.uint8) % 3
        (tmp_path / f"{part}_labels").write_bytes(gzip.compress(as_idx(labels)))
    names = ("train", "train_labels", "held_out", "held_out_labels")
    return DataSection("idx", **{name: str(tmp_path / name) for name in names})


def test_images_are_padded_to_the_size_and_the_channels_of_the_model(section):
    data = open_data(section, 8, 3, seed=0)
    images, labels = data.train(range(12), epoch=0)
    assert images.shape == (12, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2] * 4
    expected = torch.from_numpy(pixels(12)).float() / 127.5 - 1
    for channel in range(3):
        torch.testing.assert_close(images[:, channel, 1:7, 2:6], expected)
    border = images.clone()
    border[:, :, 1:7, 2:6] = -1
    assert (border == -1).all()
    assert data.train([3], 0)[0].dtype == torch.float32
    assert open_data(section, 7, 1, seed=0).train([0], 0)[0].shape == (1, 1, 7, 7)


def test_held_out_images_come_in_a_fixed_order_with_their_labels(section):
    data = open_data(section, 8, 1, seed=0)
    images, labels = data.held_out(range(5))
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2]
    originals = torch.from_numpy(pixels(5)).float() / 127.5 - 1
    for image, label in zip(images[:, 0, 1:7, 2:6], labels, strict=True):
        found = [n for n in range(5) if torch.allclose(originals[n], image, atol=1e-6)]
        assert [n % 3 for n in found] == [label]
    again = open_data(section, 8, 1, seed=9).held_out([2])
    assert torch.equal(again[0], images[2:3])


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(section):
    augmented = dataclasses.replace(section, hflip=0.5, rotate=20.0, zoom=0.2, shift=0.1, shear=0.1)
    data = open_data(augmented, 8, 1, seed=1)
    whole, _ = data.train(range(12), epoch=2)
    assert torch.equal(data.train([7, 2], epoch=2)[0], whole[[7, 2]])
    assert not torch.equal(data.train(range(12), epoch=3)[0], whole)
    assert not torch.equal(open_data(augmented, 8, 1, seed=2).train(range(12), 2)[0], whole)
    assert whole.abs().max() <= 1


def test_flips_happen_with_their_probability(section):
    plain, _ = open_data(section, 8, 1, seed=0).train(range(12), 0)
    always = open_data(dataclasses.replace(section, hflip=1.0), 8, 1, seed=0)
    assert torch.equal(always.train(range(12), 0)[0], plain.flip(3))
    half = open_data(dataclasses.replace(section, hflip=0.5), 8, 1, seed=0)
    flips = [torch.equal(half.train([0], epoch)[0], plain[:1].flip(3)) for epoch in range(60)]
    assert 15 < sum(flips) < 45


def test_classes_are_named_by_the_recipe_or_by_their_labels(section):
    data = open_data(section, 8, 1, seed=0)
    assert data.classes == ["0", "1", "2"]
    assert data.classes_from == f"labels up to 2 in {section.train_labels}"
    named = dataclasses.replace(section, class_names=("shoe", "bag", "coat", "none"))
    data = open_data(named, 8, 1, seed=0)
    assert (data.classes, data.num_classes) == (["shoe", "bag", "coat", "none"], 4)
    assert data.classes_from == "names in data.class_names"


def test_a_flipped_label_is_named_with_its_file(section):
    labels = np.arange(12, dtype=np.uint8) % 3
    labels[7] |= 128
    Path(section.train_labels).write_bytes(as_idx(labels))
    source = open_source(section, 8, 1, seed=0)
    assert classes_problem(3, source) == (
        "model.num_classes must be 130, as many as the data has (labels up to 129 in "
        f"{section.train_labels}); got 3"
    )
    assert classes_problem(130, source) is None


def test_the_digest_is_that_of_the_values_wherever_they_lie(section, tmp_path):
    first = open_source(section, 8, 1, seed=0)
    moved = tmp_path / "moved.gz"
    moved.write_bytes(gzip.compress(as_idx(pixels(12))))
    other = open_source(dataclasses.replace(section, train=str(moved)), 8, 1, seed=0)
    assert first.digest() == other.digest()
    changed = pixels(12)
    changed[3, 2, 1] ^= 1
    moved.write_bytes(as_idx(changed))
    other = open_source(dataclasses.replace(section, train=str(moved)), 8, 1, seed=0)
    assert first.digest() != other.digest()
    digests = [source.class_digests() for source in (first, other)]
    assert [key for key in digests[0] if digests[0][key] != digests[1][key]] == ["train"]


def packed(content):
    return gzip.compress(content, mtime=0)  # the names of the tests must not hold the time


GOOD = as_idx(pixels(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file"),
        (b"\x89PNG" + GOOD, "is no IDX file: it must begin with two zero bytes"),
        (GOOD[:3], "is no IDX file"),
        (b"\0\0\x0d\3" + GOOD[4:], r"must hold unsigned bytes with 3 axes .*got 0x0d03"),
        (
            as_idx(np.zeros(4, np.uint8)),
            r"must hold .* with 3 axes .magic number 0x0803.; got 0x0801",
        ),
        (GOOD[:9], "ends within its header"),
        (GOOD[:-1], r"is cut off: its sizes \(3, 6, 4\) need 72 bytes"),
        (GOOD + b"\0", "is longer than its sizes"),
        (GOOD[:4] + struct.pack(">3I", 0, 6, 4), r"must not be empty; its sizes are \(0, 6, 4\)"),
        (GOOD[:4] + b"\xff" * 12 + GOOD, "is cut off: its sizes .4294967295, "),
        (packed(GOOD[:4] + b"\xff" * 12 + GOOD), "is cut off: its sizes .4294967295, "),
        (packed(GOOD)[:-12], "cannot be read: Compressed file ended"),
        (packed(GOOD[:-1]), "is cut off: .* need 72 bytes of values; it has 71"),
        (packed(GOOD)[:20] + b"damaged" + packed(GOOD)[27:], "cannot be read: "),
        (packed(GOOD + bytes(10**6)), "is longer than its sizes"),
        (b"\x1f\x8bnothing", "cannot be read: "),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {message}") as caught:
        read_idx(path, 3)
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_beyond_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "images.gz"
    path.write_bytes(packed(as_idx(np.zeros((64, 512, 512), np.uint8))))  # 16 MiB in 16 kB
    assert read_idx(path, 3).shape == (64, 512, 512)
    monkeypatch.setattr("variant.engine.memory.free_bytes", lambda device: 2**20)
    monkeypatch.setattr(idx, "CHUNK", 0)  # nothing is read
    with pytest.raises(UserError, match=r"its values need 16 MiB, but 1 MiB are free"):
        read_idx(path, 3)


def test_pairs_that_do_not_fit_are_refused(section, tmp_path):
    with pytest.raises(UserError, match=r"at most as large as the model's, 5 x 5; they are 4 x 6"):
        IdxData(section, 5, 3, 0)
    names = dataclasses.replace(section, class_names=("a", "b"))
    with pytest.raises(UserError, match="labels must be below 2, by the names of its classes; the"):
        IdxData(names, 8, 3, 0)
    (tmp_path / "held_out_labels").write_bytes(as_idx(np.full(5, 3, np.uint8)))
    with pytest.raises(UserError, match=r"held_out_labels: .* below 3, by the labels in the train"):
        IdxData(section, 8, 3, 0)
    (tmp_path / "held_out_labels").write_bytes(as_idx(np.zeros(4, np.uint8)))
    with pytest.raises(
        UserError, match=r"must have a label for each of the 5 images in .* it has 4"
    ):
        IdxData(section, 8, 3, 0)
    with pytest.raises(UserError, match="absent: no such file"):
        IdxData(dataclasses.replace(section, train=str(tmp_path / "absent")), 8, 3, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, 'kind "idx" needs either dataset, or all of train, train_labels, held_out'),
        ({"train": "a", "held_out": "b"}, 'kind "idx" needs either dataset, or all of'),
        ({"dataset": "fashion-mnist", "train": "a"}, 'kind "idx" needs either dataset, or all'),
        ({"dataset": "fashion-mnist", "class_names": ("a",)}, "class_names must not be given with"),
        (
            {"dataset": "fashion-mnist", "randaugment_ops": 2},
            'randaugment_ops is not for kind "idx"',
        ),
    ],
)
def test_sections_without_or_with_too_many_files_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        DataSection("idx", **keys)
    with pytest.raises(ValueError, match='dataset is not for kind "digits"'):
        DataSection("digits", dataset="fashion-mnist")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "FASHION_MNIST", tmp_path)
    with pytest.raises(
        UserError, match=r"train-images.*: no such file; install Debian's package dataset-fashion-m"
    ):
        open_data(DataSection("idx", dataset="fashion-mnist"), 32, 3, 0)


@needs_fashion
def test_fashion_mnist_is_read_from_the_package():
    data = open_data(DataSection("idx", dataset="fashion-mnist"), 32, 3, 0)
    assert (data.num_train, data.num_held_out) == (60_000, 10_000)
    assert data.classes == list(FASHION_MNIST_CLASSES)
    picked = np.random.default_rng(0).permutation(60_000)[:200]
    images, labels = data.train(picked, 0)
    assert images.shape == (200, 3, 32, 32)
    assert (images[:, :, :2] == -1).all()
    assert labels.unique().tolist() == list(range(10))
    # Trousers are narrow, bags are wide: the labels belong to the images.
    mean = {name: images[labels == FASHION_MNIST_CLASSES.index(name)].mean(0)[0] for name in
            ("trouser", "bag")}  # fmt: skip
    wide = {name: (image.mean(0) > -0.7).sum().item() for name, image in mean.items()}
    assert wide["trouser"] < wide["bag"] - 5
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
