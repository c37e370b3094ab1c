"""Sets of images, statistics, results and classifiers that are damaged, hostile or merely odd.

Every refusal is a UserError of one line that names the file, and reads no more than it must.
"""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from variant.cli import evaluate_depths
from variant.cli.evaluate import MAX_METRICS, _check_number
from variant.cli.main import main
from variant.engine import memory
from variant.errors import UserError
from variant.evaluation.image_sets import (
    MAX_FILE_BYTES,
    array_images,
    open_images,
    open_reference,
)
from variant.training.classifier import FORMAT, Classifier, read_classifier

PIXELS = np.zeros((4, 8, 8, 3), np.uint8)


def read_all(path):
    reference = open_reference(path)
    return [] if reference.images is None else list(reference.images.batches(2))


def refused(path, match=None):
    """The message of the UserError of opening and reading a set, which is one line."""
    with pytest.raises(UserError, match=match) as caught:
        read_all(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


# --- .npz -----------------------------------------------------------------------------------------


def flip(path, *changes):
    """Replace bytes of a file at places; a place is found by what stands there."""
    data = bytearray(path.read_bytes())
    for after, offset, value in changes:
        place = data.find(after) + offset
        data[place : place + len(value)] = value
    path.write_bytes(data)


def plain_npy(path):
    with path.open("wb") as file:
        np.save(file, PIXELS)


def unknown_compression(path):
    np.savez(path, arr_0=PIXELS)
    flip(path, (b"PK\x01\x02", 10, b"\x63\0"), (b"PK\x03\x04", 8, b"\x63\0"))


def encrypted(path):
    np.savez(path, arr_0=PIXELS)
    flip(path, (b"PK\x01\x02", 8, b"\x01"), (b"PK\x03\x04", 6, b"\x01"))


def damaged(compression):
    def write(path):
        content = io.BytesIO()
        np.save(content, np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8))
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("arr_0.npy", content.getvalue())
        data = bytearray(path.read_bytes())
        data[60:200] = b"\xff" * 140
        path.write_bytes(data)

    return write


def member(name, content):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)

    return write


def npy(header):
    """An array of five 8 x 8 images by any header."""
    head = header.encode().ljust(100) + b"\n"
    return member("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + bytes(960))


def arrays(**values):
    return lambda path: np.savez(path, **values)


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (plain_npy, "not a zip file"),
        (unknown_compression, "compression"),
        (encrypted, "encrypted"),
        (damaged(zipfile.ZIP_DEFLATED), "is no readable .npz"),
        (damaged(zipfile.ZIP_LZMA), "is no readable .npz"),
        (damaged(zipfile.ZIP_BZIP2), "is no readable .npz"),
        (member("arr_0.npy", b"hello"), "magic"),
        (member("arr_0", b"hello"), "magic"),
        (npy("{'descr': ("), "is no readable .npz: .*EOF"),
        (npy("a\n  b\n c"), "is no readable .npz: unindent"),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000000000000000,)}"),
            "is no readable .npz: Python int too large",
        ),
        (arrays(images=PIXELS, mu=np.zeros(2)), r"\(mu, sigma\); it has images, mu$"),
        (arrays(), r"\(mu, sigma\); it has nothing$"),
        (arrays(arr_0=np.array([{}], object)), "Object arrays cannot be loaded"),
        (arrays(arr_0=np.zeros((4, 0, 8, 3), np.uint8)), r"holds no images: .*\(4, 0, 8, 3\)"),
        (arrays(mu=np.full(2, 1j), sigma=np.eye(2)), "must be real numbers; mu is complex128"),
        (arrays(mu=np.array(["1", "2"]), sigma=np.eye(2)), "must be real numbers; mu is <U1"),
        (arrays(mu=np.zeros(2), sigma=np.eye(2) > 0), "must be real numbers; sigma is bool"),
        (arrays(mu=np.zeros(2), sigma=np.array([[1.0, 5], [-5, 1]])), "must be symmetric"),
        (arrays(mu=np.zeros(2), sigma=np.diag([1.0, -1])), "variances >= 0"),
        (arrays(mu=np.zeros(0), sigma=np.zeros((0, 0))), "a row for each feature"),
    ],
)
def test_what_is_no_archive_of_arrays_is_one_line(tmp_path, write, text):
    path = tmp_path / "r.npz"
    write(path)
    refused(path, text)


def test_images_without_their_name_are_named(tmp_path):
    np.savez(tmp_path / "r.npz", images=PIXELS)
    with pytest.raises(UserError, match=r"holds no images \(arr_0\); it has images$"):
        open_images(tmp_path / "r.npz")


def by_python_2(path):
    npy("{'descr': '|u1', 'fortran_order': False, 'shape': (5L, 8L, 8L, 3L), }")(path)


def zip64(path):
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as f,
    ):
        np.save(f, np.zeros((5, 8, 8, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@pytest.mark.parametrize(
    "write",
    [
        arrays(
            arr_0=np.asfortranarray(np.zeros((5, 8, 8, 3), np.uint8)),
            arr_1=np.arange(5, dtype=">i8"),
        ),
        npy("{'descr': '|u1', 'fortran_order': True, 'shape': (5, 8, 8, 3), }"),
        by_python_2,
        zip64,
    ],
)
def test_archives_of_other_writers_are_read(tmp_path, write):
    path = tmp_path / "a b\u00fc.npz"
    write(path)
    (tmp_path / "link.npz").symlink_to(path)
    assert sum(map(len, read_all(tmp_path / "link.npz"))) == 5
    assert open_images(path).labels in (None, [0, 1, 2, 3, 4])


def test_an_archive_is_compared_with_the_memory_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "r.npz"
    np.savez_compressed(path, arr_0=np.zeros((2000, 8, 8, 3), np.uint8), mine=np.zeros(10**6))
    assert path.stat().st_size < 30_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: 390_000)  # mine is not read
    assert open_reference(path).images.count == 2000
    monkeypatch.setattr(memory, "free_bytes", lambda device: 380_000)
    refused(path, "its arrays need")


@pytest.mark.parametrize("bad", [-1, 2**63])
def test_numbers_that_are_no_labels_are_left_out(bad):
    labels = np.array([0, 1, 2, bad], np.int64 if bad < 0 else np.uint64)
    assert array_images("a", PIXELS, labels).labels is None
    assert array_images("a", PIXELS, np.arange(4, dtype=np.uint64)).labels == [0, 1, 2, 3]


def test_statistics_that_differ_from_their_transpose_by_rounding_are_taken(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    sigma = np.cov(values.T).astype(np.float32)
    sigma[0, 1] += 1e-6
    np.savez(tmp_path / "r.npz", mu=values.mean(0), sigma=sigma)
    assert open_reference(tmp_path / "r.npz").gaussian.mean_D.dtype == torch.float64


# --- .tar -----------------------------------------------------------------------------------------


def png():
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(content, "PNG")
    return content.getvalue()


def write_tar(path, names, mode="w", **headers):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(png()), headers
            archive.addfile(entry, io.BytesIO(png()))
    return path


def test_hidden_files_of_a_tar_are_passed_over(tmp_path):
    names = ["./._a.png", "./a.png", ".cache/b.png", "../up/c.png", "._d.tif"]
    write_tar(tmp_path / "s.tar", names)
    (tmp_path / "._s.tar").write_bytes(b"of macOS")
    for path in (tmp_path, tmp_path / "s.tar"):
        seen = [name.rpartition(": ")[2] for name in open_images(path).names]
        assert seen == ["../up/c.png", "./a.png"]


def test_images_of_other_formats_in_a_tar_are_named(tmp_path):
    write_tar(tmp_path / "s.tar", ["a.png", "b.tif", "/c.GIF", "d.txt"])
    with pytest.warns(RuntimeWarning, match=r"s\.tar: passes over c\.GIF, b\.tif: an image ends"):
        assert open_images(tmp_path / "s.tar").count == 1
    with pytest.warns(RuntimeWarning, match=r": passes over s\.tar/c\.GIF, s\.tar/b\.tif: an im"):
        assert open_images(tmp_path).count == 1


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_named_as_such(tmp_path, mode):
    """Its images cannot be read at their places, which are those of the content."""
    refused(write_tar(tmp_path / "s.tar", ["a.png"], mode), "it is compressed")


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"},
        {"GNU.sparse.map": "0", "GNU.sparse.size": "99999999999999"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"},
        {"size": "99999999999999"},
    ],
)
def test_hostile_headers_of_a_tar_are_one_line(tmp_path, headers):
    refused(write_tar(tmp_path / "s.tar", ["a.png"], **headers))


def test_a_tar_whose_first_name_begins_as_a_compressed_file_is_read(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["BZhang/a_class1.png"])
    assert open_images(path).labels == [1]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_long_name_of_gigabytes_is_not_read(tmp_path, kind):
    path = tmp_path / "s.tar"
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.size = kind, 7 * 2**30
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT))
    refused(path, r"is no readable \.tar: a header of 7,516,192,768 bytes; at most 1,048,576")


def test_long_names_without_end_are_one_line(tmp_path):
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1
    path = tmp_path / "s.tar"
    path.write_bytes((entry.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 2000)
    refused(path, r"is no readable \.tar: .*recursion")


def test_links_and_devices_of_a_tar_are_passed_over(tmp_path):
    path = write_tar(tmp_path / "s.tar", ["../../z_class1.png"])
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo("a.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    images = open_images(path)
    assert (images.count, images.labels) == (1, [1])
    assert next(images.batches(1)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("label", ["9" * 19, "9" * 5000, "\u0663"])
def test_a_number_that_no_label_can_be_is_none(tmp_path, label):
    path = write_tar(tmp_path / "s.tar", [f"a_class{label}.png", "b_class1.png"])
    assert open_images(path).labels is None
    path = write_tar(tmp_path / "t.tar", ["a_class" + "0" * 17 + "7.png"])
    assert open_images(path).labels == [7]


# --- folders --------------------------------------------------------------------------------------


def image_folder(folder):
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    return folder


def test_files_larger_than_an_image_are_not_read(tmp_path):
    folder = image_folder(tmp_path / "images")
    with (folder / "b.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # takes no space on the disk
    refused(folder, r"1 of 2 images cannot be read: .*b\.png")
    with (tmp_path / "s.tar").open("wb") as file:
        entry = tarfile.TarInfo("b.png")
        entry.size = 20 * 2**30
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(20 * 2**30 + 2048)
    refused(tmp_path / "s.tar", r"1 of 1 image cannot be read: .*b\.png")


@pytest.mark.parametrize("kind", ["pipe", "dangling", "loop", "device"])
def test_an_image_that_is_no_file_is_not_left_out_in_silence(tmp_path, kind):
    folder = image_folder(tmp_path / "images")
    if kind == "pipe":
        os.mkfifo(folder / "b.png")
    else:
        target = {"dangling": "nowhere", "loop": "b.png", "device": "/dev/zero"}[kind]
        (folder / "b.png").symlink_to(target)
    message = {"pipe": "named pipe", "dangling": "no such file", "loop": "symbolic links"}
    with pytest.raises(UserError, match=rf"b\.png: .*{message.get(kind, 'device')}"):
        list(open_images(folder).batches(2))


def test_a_folder_named_as_an_image_is_a_folder(tmp_path):
    folder = image_folder(tmp_path / "images")
    image_folder(folder / "b.png")
    assert open_images(folder).count == 2


def test_linked_folders_are_visited_once(tmp_path):
    image_folder(tmp_path / "class one")
    folder = image_folder(tmp_path / "images")
    (folder / "one").symlink_to(tmp_path / "class one")
    (folder / "again").symlink_to(tmp_path / "class one")
    (folder / "self").symlink_to(folder)
    (tmp_path / "class one" / "back").symlink_to(folder)
    image_folder(folder / ".hidden")
    (folder / "._a.png").write_bytes(b"of another system")
    (tmp_path / "link").symlink_to(folder)
    assert open_images(folder).count == open_images(tmp_path / "link").count == 2


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images")
    image_folder(folder / "b")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # by mode 0 too, but not for the superuser
    with pytest.raises(UserError, match=r"images: cannot be read: Permission denied"):
        open_images(folder)


def test_many_declared_pixels_are_refused_without_a_warning(tmp_path, recwarn):
    folder = image_folder(tmp_path / "images")
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    data = bytearray(png())
    data[16:29] = header
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (folder / "a.png").write_bytes(data)
    refused(folder, r"1 of 1 image cannot be read: .*a\.png")
    assert not recwarn.list


# --- results and records --------------------------------------------------------------------------

ONE = {"name": "FID", "value": 1.0, "count": 30}
GOOD = {"format": "variant-eval-1", "metrics": [ONE], "a": 1}


def compared(tmp_path, capsys, other):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "b.json").write_text(other if isinstance(other, str) else json.dumps(other))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    code = main(["eval", "--compare", *paths[:2], "--json", paths[2]])
    out, error = capsys.readouterr()
    return code, out, error


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({**GOOD, "metrics": 3}, '"metrics" must be a list'),
        ({**GOOD, "metrics": {"a": 1}}, '"metrics" must be a list'),
        ({**GOOD, "metrics": ["a"]}, "each must be an object with a name; got 'a'"),
        ({**GOOD, "metrics": [{**ONE, "name": [1]}]}, "each must be an object with a name"),
        ({**GOOD, "metrics": [{**ONE, "name": 3}]}, "each must be an object with a name"),
        ({**GOOD, "metrics": [{**ONE, "name": None}]}, "each must be an object with a name"),
        ({**GOOD, "metrics": [{**ONE, "value": [1]}]}, "'FID' must be a number; got [1]"),
        ({**GOOD, "metrics": [{**ONE, "value": True}]}, "'FID' must be a number; got True"),
        ({**GOOD, "metrics": [{**ONE, "value": "0x1"}]}, "could not convert"),
        ({**GOOD, "metrics": [{**ONE, "value": 10**400}]}, "too large"),
        ({**GOOD, "metrics": [{**ONE, "x": 1}]}, "unexpected keyword"),
        ({**GOOD, "metrics": [ONE, {**ONE, "value": 2}]}, "FID comes twice"),
        (
            {**GOOD, "metrics": [{**ONE, "name": str(i)} for i in range(MAX_METRICS + 1)]},
            "a list of at most 100",
        ),
        ({"format": evaluate_depths.FORMAT, "settings": []}, "holds the settings of --model"),
        (json.dumps(GOOD)[:-1] + ', "b": ' + "[" * 900 + "]" * 900 + "}", "nested at most 50"),
        (json.dumps(GOOD)[:-1] + ', "a": 2}', "the key a twice"),
    ],
)
def test_a_result_that_eval_did_not_write_is_named(tmp_path, capsys, other, text):
    code, out, error = compared(tmp_path, capsys, other)
    assert (code, out) == (1, "")
    first, line = error.splitlines()
    assert first.startswith("eval: comparing ")
    assert line.startswith("variant: error: ")
    assert "b.json" in line
    assert text in line
    assert not (tmp_path / "c.json").exists()


def test_long_settings_are_shortened_on_the_terminal_alone(tmp_path, capsys):
    long = "x" * 10**6
    code, out, _ = compared(tmp_path, capsys, {**GOOD, "b": long, "metrics": [{**ONE, "value": 3}]})
    assert code == 0
    assert len(out) < 5000
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["differing"] == {"b": [None, long]}
    assert result["metrics"] == {"FID": [1, 3]}


@pytest.mark.parametrize(("num", "says"), [("x", "'x'"), (None, "None"), ([1], "[1]"), (5, "5")])
def test_an_odd_number_in_a_record_is_a_warning(num, says):
    record = {"format": "variant-sample-1", "num": num}
    with pytest.warns(RuntimeWarning, match=r"holds 4 images; its record .* says ") as caught:
        _check_number(array_images("a", PIXELS), record)
    assert str(caught[0].message).endswith(says)


# --- the classifier -------------------------------------------------------------------------------

RECORD = {
    "format": FORMAT,
    "classes": ["a", "b"],
    "data_sha256": "x",
    "seed": 0,
    "steps": 1,
    "accuracy": 0.5,
}


@pytest.fixture
def classifier(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file(Classifier(2).state_dict(), path)
    (tmp_path / "c.json").write_text(json.dumps(RECORD))
    return path


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000, None])
def test_damaged_weights_of_a_classifier_are_named(classifier, content):
    classifier.write_bytes(classifier.read_bytes()[:-8] if content is None else content)
    with pytest.raises(UserError, match=r"c\.safetensors: is missing or damaged"):
        read_classifier(classifier)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"classes": "ab"}, "classes: "),
        ({"classes": [1, 2]}, "classes"),
        ({"classes": ["a", "a"]}, "class_names must differ"),
        ({"classes": None}, "classes: "),
        ({"accuracy": "x"}, "accuracy: "),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"accuracy": 2.0}, "accuracy"),
        ({"steps": -1}, "steps"),
        ({"z": 1}, "z: unknown key"),
    ],
)
def test_a_record_that_is_none_of_a_classifier_is_named(classifier, change, text):
    record = classifier.with_suffix(".json")
    record.write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(UserError, match=rf"c\.json: is no record of a classifier: .*{text}"):
        read_classifier(classifier)


def test_a_classifier_of_other_classes_is_refused_before_it_is_built(classifier, monkeypatch):
    assert read_classifier(classifier)[1].classes == ("a", "b")
    names = [str(index) for index in range(1000)]
    classifier.with_suffix(".json").write_text(json.dumps({**RECORD, "classes": names}))
    monkeypatch.setattr("variant.training.classifier.Classifier", None)
    with pytest.raises(UserError, match=r"is no classifier of the 1,000 classes in c\.json"):
        read_classifier(classifier)
