"""Training images: augmentation, reproducibility, unreadable files."""

import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from variant.data.augment import RAND_AUGMENT_OPS, distort, rand_augment
from variant.data.bad_items import BadItem, BadItems
from variant.data.config import DataSection
from variant.data.images import (
    ORIENTATION,
    FolderData,
    list_images,
    open_image,
    stream,
    upright,
)
from variant.data.sources import differing_classes, open_source
from variant.errors import UserError
from variant.evaluation.image_sets import open_images


def gradient() -> Image.Image:
    """Red rises to the right, green downwards; blue has an edge. Nothing is black or white."""
    down, across = np.mgrid[10:240:10, 10:240:10]
    return Image.fromarray(np.stack((across, down, 200 - 100 * (across > down)), -1).astype("u1"))


GRADIENT = gradient()


@pytest.mark.parametrize("name", RAND_AUGMENT_OPS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_operation_changes_the_image_and_keeps_its_size_and_mode(name, sign):
    changed = RAND_AUGMENT_OPS[name](GRADIENT, 1.0, sign)
    assert (changed.size, changed.mode) == (GRADIENT.size, "RGB")
    same = np.array_equal(np.asarray(changed), np.asarray(GRADIENT))
    assert same == (name == "identity")


@pytest.mark.parametrize("name", ["rotate", "color", "contrast", "shear_x", "translate_y"])
def test_graded_operations_do_nothing_at_no_strength(name):
    changed = RAND_AUGMENT_OPS[name](GRADIENT, 0.0, 1)
    assert np.array_equal(np.asarray(changed), np.asarray(GRADIENT))


def test_rand_augment_is_a_function_of_its_generator():
    first, second, other = (
        np.asarray(rand_augment(GRADIENT, np.random.default_rng(seed), 2, 9)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_distortion_of_no_strength_is_the_identity_and_shifts_shift():
    images = torch.rand(2, 1, 8, 8)
    none = distort(images, torch.ones(2, 5), rotate=0, zoom=0, shift=0, shear=0)
    torch.testing.assert_close(none, images, rtol=0, atol=1e-5)
    moved = distort(
        images, torch.tensor([[0.0, 0, 0, 1, 0]] * 2), rotate=0, zoom=0, shift=0.25, shear=0
    )
    torch.testing.assert_close(moved[..., :6], images[..., 2:], rtol=0, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(3):
            GRADIENT.resize((20 + 4 * index, 24)).save(tmp_path / label / f"{index}.PNG")
    return str(tmp_path)


def section_of(folder, **changes):
    return DataSection(
        "folder",
        train=folder,
        held_out=folder,
        hflip=0.5,
        randaugment_ops=2,
        randaugment_magnitude=9,
        **changes,
    )


def open_folder(folder, **changes):
    return FolderData(section_of(folder, **changes), image_size=16, channels=3, seed=0)


def test_a_folder_image_depends_on_epoch_and_index_alone(folder):
    data, more_workers = open_folder(folder, workers=1), open_folder(folder, workers=3)
    whole, labels = data.train(range(6), epoch=2)
    part, part_labels = more_workers.train([4, 1], epoch=2)
    assert torch.equal(part, whole[[4, 1]])
    assert torch.equal(part_labels, labels[[4, 1]])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert not torch.equal(whole, data.train(range(6), epoch=3)[0])
    assert whole.shape == (6, 3, 16, 16)
    assert whole.abs().max() <= 1


def test_held_out_images_are_cropped_at_the_centre_and_never_change(folder):
    data = open_folder(folder)
    first, _ = data.held_out([0, 5])
    assert torch.equal(first, data.held_out([0, 5])[0])
    assert first.shape == (2, 3, 16, 16)


def test_files_and_classes_are_sorted(folder):
    paths, labels, classes = list_images(folder)
    assert classes == ["a", "b"]
    assert paths == sorted(paths)
    assert labels == [0, 0, 0, 1, 1, 1]


def test_random_streams_of_one_epoch_differ():
    draws = {float(stream(0, 1, which).random()) for which in (1, 2, 3, 4)}
    assert len(draws) == 4
    assert stream(5, 1, 2).random() == stream(5, 1, 2).random()


def test_unsuitable_and_unreadable_images_are_named(folder, monkeypatch):
    def refuse(message):
        source = open_source(section_of(folder), 16, 3, seed=0)
        with pytest.raises(UserError, match=message) as caught:
            source.samples([0], epoch=0)
        assert "0.PNG" in str(caught.value)

    path = f"{folder}/a/0.PNG"
    Image.fromarray(np.full((24, 24), 40000, dtype=np.uint16)).save(path)
    refuse("must have 8 bits per channel; its pixels are of mode I")
    for error in (SyntaxError("broken PNG"), ValueError("bad chunk")):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", fail)
            refuse("is not a readable image: (broken PNG|bad chunk)")
    GRADIENT.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refuse("is not a readable image: Image size")


@pytest.fixture
def spoilt(folder):
    """The folder, with nine images of class a of which 1.PNG is unreadable."""
    for index in range(3, 9):
        shade = Image.new("RGB", (24, 24), (30 * index, 0, 0))
        shade.save(Path(folder) / "a" / f"{index}.png")
    (Path(folder) / "a" / "1.PNG").write_bytes(b"no image")
    return folder


def test_another_image_of_the_class_takes_the_place_of_a_bad_one(spoilt):
    data = open_folder(spoilt)
    images, labels = data.train(range(12), epoch=2)
    assert labels.tolist() == [0] * 9 + [1] * 3
    assert [(Path(item.name).name, item.samples) for item in data.take_bad()] == [("1.PNG", 1)]
    assert data.take_bad() == ()
    # The same one in another batch, another process and with other threads.
    again = pickle.loads(pickle.dumps(open_folder(spoilt, workers=1)))
    assert torch.equal(again.train([1], epoch=2)[0], images[1:2])
    taken = {again.train([1], epoch)[0].numpy().tobytes() for epoch in range(6)}
    assert len(taken) > 1
    assert len(data.held_out(range(12))[0]) == 12


def test_bad_images_are_counted_and_named_once_up_to_their_share(spoilt):
    source = open_source(section_of(spoilt, max_bad=0.1), 16, 3, seed=0)
    with pytest.warns(
        RuntimeWarning, match=r"1.PNG: .* its format is not known. .* 1 of 24 samples"
    ):
        source.samples(range(6), epoch=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.samples(range(6), epoch=1)
        source.held_out(range(12))
    assert source.bad.count == 1
    for name in ("2.PNG", "3.png"):
        (Path(spoilt) / "a" / name).write_bytes(b"")
    with (
        pytest.raises(UserError, match=r"a/3.png: .* 3 of 24 samples .* data.max_bad = 0.1 allows"),
        pytest.warns(RuntimeWarning, match="2 of 24"),
    ):
        source.samples(range(12), epoch=0)


def test_files_that_several_processes_find_are_counted_once():
    """Two processes of a run over ten samples, of which two may be bad."""
    first, second = BadItems(10, 0.2), BadItems(10, 0.2)
    with pytest.warns(RuntimeWarning, match="a is bad. Skipped: 1 of 10"):
        first.add([BadItem("a", "a is bad")])
    for count, name in enumerate("ab", 1):
        with pytest.warns(RuntimeWarning, match=f"{name} is bad. Skipped: {count} of 10"):
            second.add([BadItem(name, f"{name} is bad")])
    found = first.take_unshared() + second.take_unshared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # named where they were found
        for one in (first, second):
            one.add_found(found)
            assert (one.count, one.take_unshared()) == (2, [])
    with pytest.raises(UserError, match=r"c is bad. 3 of 10 samples .* data.max_bad = 0.2 allows"):
        first.add([BadItem("c", "c is bad")])
    with pytest.raises(UserError, match=r"c is bad. 3 of 10 samples"):
        second.add_found(first.take_unshared())


def test_workers_of_a_loader_list_bad_images_and_their_parent_counts_them(spoilt):
    source = open_source(section_of(spoilt, max_bad=0.5), 16, 3, seed=0)
    expected, _ = open_folder(spoilt).train(range(6), epoch=0)  # starts threads before the fork
    dataset = _Batches(source, [range(3), range(3, 6)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    parts = list(loader)
    assert torch.equal(torch.cat([part.images for part in parts]), expected)
    assert [Path(item.name).name for part in parts for item in part.bad] == ["1.PNG"]
    assert source.bad.count == 0
    with pytest.warns(RuntimeWarning, match="1 of 24"):
        source.bad.add(parts[0].bad)


class _Batches(torch.utils.data.Dataset):
    def __init__(self, source, batches):
        self.source, self.batches = source, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.source.samples(self.batches[number], epoch=0)


def test_a_class_without_a_readable_image_is_an_error(folder):
    for path in (Path(folder) / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"nor could another image of its class be read in its"):
        open_folder(folder).train([4], epoch=0)


def corners(image):
    """The brightness of an image's quarters, 0 to 3."""
    values = np.asarray(image.convert("L").resize((2, 2), Image.Resampling.BOX))
    return np.round(values / 80).astype(int).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_upright_as_pillow_does(tmp_path, orientation, suffix):
    image = Image.new("RGB", (32, 48))
    for index, (left, top) in enumerate(((0, 0), (16, 0), (0, 24), (16, 24))):
        image.paste((80 * index,) * 3, (left, top, left + 16, top + 24))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"image.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        turned, expected = upright(opened, path), ImageOps.exif_transpose(opened)
    assert turned.size == expected.size == ((32, 48) if orientation < 5 else (48, 32))
    assert corners(turned) == corners(expected)
    assert (corners(turned) == [[0, 1], [2, 3]]) == (orientation == 1)


def test_training_and_held_out_images_are_turned_upright(folder):
    plain = open_folder(folder)
    expected = [plain.train([0], epoch=1)[0], plain.held_out_paths]
    path = Path(folder) / "a" / "0.PNG"
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    with Image.open(path) as image:
        image.rotate(180).save(path, exif=exif)
    data = open_folder(folder)
    assert torch.equal(data.train([0], epoch=1)[0], expected[0])
    index = data.held_out_paths.index(path)
    path.write_bytes(path.read_bytes())
    with Image.open(path) as image:
        ImageOps.exif_transpose(image).save(path)
    assert torch.equal(data.held_out([index])[0], open_folder(folder).held_out([index])[0])


def test_a_damaged_exif_orientation_is_ignored(tmp_path):
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    GRADIENT.save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff\xff\xff"):
        path.write_bytes(content[:start] + damage + content[start + len(damage) :])
        with Image.open(path) as image, warnings.catch_warnings(record=True) as heard:
            assert upright(image, path).size == GRADIENT.size
        assert all(str(warning.message).startswith(f"{path}: ") for warning in heard)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_warning_of_pillow_names_the_file_once(folder, workers):
    path = Path(folder) / "a" / "damaged.jpg"
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 1, "a description"
    GRADIENT.save(path, exif=exif)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x01\x0e\0\x02\0\0\0\x0e", b"\x01\x0e\0\x02\0\0\xff\0"))
    assert path.read_bytes() != content
    data = open_folder(folder, workers=workers)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for epoch in (1, 2):
            data.train(range(len(data.paths)), epoch)
        (Path(folder) / "set").mkdir()
        copied = shutil.copy(path, Path(folder) / "set" / "copy.jpg")
        for _ in range(2):
            open_images(Path(folder) / "set").read(range(1))
    assert [warning.category for warning in heard] == 2 * [RuntimeWarning]
    for warning, name in zip(heard, (path, copied), strict=True):
        assert str(warning.message).startswith(f"{name}: ")  # then Pillow's words


def png_of_16_bits(color_type, channels):
    """A PNG of 2 x 2 pixels with 16 bits per channel, which Pillow cannot write."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 2, 2, 16, color_type, 0, 0, 0)
    rows = 2 * (b"\0" + 2 * channels * b"\x7f\xff")
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("color_type", "channels", "mode"),
    [(0, 1, "I;16"), (2, 3, "RGB;16B"), (4, 2, "LA;16B"), (6, 4, "RGBA;16B")],
)
def test_16_bits_per_channel_are_refused(folder, tmp_path, color_type, channels, mode):
    content = png_of_16_bits(color_type, channels)
    for path in (Path(folder) / "a").iterdir():
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"must have 8 bits per channel; .* mode {mode}"):
        open_folder(folder).held_out(range(6))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(content)
    with pytest.raises(UserError, match=f"must have 8 bits per channel; .* mode {mode}"):
        open_images(tmp_path / "set").read(range(1))


def test_an_evaluation_sees_images_upright_as_the_training_does(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for folder, orientation in (("turned", 6), ("upright", 1)):
        (tmp_path / folder).mkdir()
        exif[ORIENTATION] = orientation
        image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
        if orientation == 1:
            image = image.transpose(Image.Transpose.ROTATE_270)
        image.save(tmp_path / folder / "0.png", exif=exif)
    turned, plain = (open_images(tmp_path / name).read(range(1)) for name in ("turned", "upright"))
    assert turned.shape == (1, 3, 6, 4)
    assert turned.equal(plain)


def test_hidden_folders_and_files_are_passed_over(folder):
    (Path(folder) / ".ipynb_checkpoints").mkdir()
    GRADIENT.save(Path(folder) / ".ipynb_checkpoints" / "0-checkpoint.png")
    (Path(folder) / "a" / "._0.png").write_bytes(b"\0\x05\x16\x07")
    (Path(folder) / ".DS_Store").write_bytes(b"")
    paths, _, classes = list_images(folder)
    assert classes == ["a", "b"]
    assert len(paths) == 6


def test_images_that_are_not_read_are_named(folder, recwarn):
    list_images(folder)
    assert not recwarn.list
    (Path(folder) / "a" / "notes.txt").write_text("")
    (Path(folder) / "a" / "2020").mkdir()
    list_images(folder)
    assert not recwarn.list
    for name in ("0.png", "a/photo.HEIC", "a/2020/1.jpg", "b/x.tiff"):
        GRADIENT.save(Path(folder) / name, format="PNG")
    assert len(list_images(folder)[0]) == 6
    (warning,) = recwarn.list
    assert str(warning.message) == (
        f"{folder}: passes over 0.png, a/2020/1.jpg, a/photo.HEIC and 1 more: an image ends in "
        ".jpeg, .jpg, .png, .webp, .bmp, and lies in the folder of its class"
    )
    with pytest.warns(RuntimeWarning, match=r"passes over a/photo.HEIC, b/x.tiff: an image ends"):
        assert open_images(folder).count == 8


def test_the_alpha_of_a_palette_is_left_out_without_a_warning(folder, recwarn):
    for path in (Path(folder) / "a").iterdir():
        GRADIENT.convert("P").save(path, transparency=bytes(10))
    open_folder(folder).held_out([0, 1])
    assert np.array_equal(
        open_images(Path(folder) / "a").read(range(1))[0].permute(1, 2, 0),
        np.asarray(GRADIENT.convert("P").convert("RGB")),
    )
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link"])
def test_an_image_that_is_no_regular_file_is_refused_before_the_run(folder, kind):
    path = Path(folder) / "b" / "9.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"b/9.png: must be a regular file"):
        open_folder(folder)


def test_an_image_that_would_be_enlarged_beyond_memory_is_refused(folder):
    Image.new("RGB", (1, 60000)).save(Path(folder) / "a" / "0.PNG")
    section = DataSection("folder", train=folder, held_out=folder)
    data = open_source(section, image_size=256, channels=3, seed=0)
    with pytest.raises(UserError, match=r"0.PNG: is too narrow: 1 x 60000 pixels would become"):
        data.samples([0], epoch=0)


def test_the_digest_follows_paths_sizes_and_classes_but_not_the_place(folder, tmp_path):
    data = open_folder(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    assert open_folder(str(moved)).digest() == data.digest()
    assert sorted(data.class_digests()) == ["held_out/a", "held_out/b", "train/a", "train/b"]
    with (moved / "b" / "1.PNG").open("ab") as file:
        file.write(b"\0")
    changed = open_folder(str(moved))
    assert changed.digest() != data.digest()
    assert differing_classes(data.class_digests(), changed.class_digests()) == [
        "held_out/b",
        "train/b",
    ]
    (moved / "b").rename(moved / "c")
    assert differing_classes(data.class_digests(), open_folder(str(moved)).class_digests()) == [
        "held_out/b",
        "held_out/c",
        "train/b",
        "train/c",
    ]


def test_operations_without_end_are_refused_before_an_image_is_read():
    with pytest.raises(ValueError, match=r"randaugment_ops must be <= 100; got 1000000000000"):
        DataSection("folder", "a", "b", randaugment_ops=10**12)
    assert DataSection("folder", "a", "b", randaugment_ops=100).randaugment_ops == 100


def test_a_file_that_would_start_another_program_is_no_image(folder):
    # Pillow hands EPS to Ghostscript, which runs it; ICO is one of the formats without a use here.
    for name, kind in (("1.png", "EPS"), ("2.png", "ICO")):
        path = Path(folder) / "a" / name
        GRADIENT.save(path, kind)
        with path.open("rb") as file, pytest.raises(Image.UnidentifiedImageError):
            open_image(file, path)
    for kind in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"):
        GRADIENT.save(path, kind)
        with path.open("rb") as file, open_image(file, path) as image:
            assert image.format == kind
