"""Files of tensors by value: headers, regions, checksums and views, at their limits."""

import argparse
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch

from variant import tensor_files
from variant.errors import UserError
from variant.tensor_files import (
    CHUNK_BYTES,
    Region,
    Source,
    StoredTensor,
    checksums_of,
    read_all,
    read_values,
    replace_tensors,
    stored_pickle,
    stored_safetensors,
)

VALUES = struct.pack("<4f", 1.0, -2.0, 3.5, 0.25)
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def header_of(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def file_of(folder, header, values=VALUES):
    path = folder / "a.safetensors"
    path.write_bytes(header_of(header) + values)
    return path


def test_a_file_tells_names_shapes_and_dtypes_and_then_the_values(tmp_path):
    path = file_of(tmp_path, {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "none": {"dtype": "I64", "shape": [0, 5], "data_offsets": [16, 16]},
    })  # fmt: skip
    stored = stored_safetensors(path)
    assert stored.metadata == {"format": "pt"}
    assert {name: (tuple(x.shape), x.dtype, x.device.type) for name, x in stored.items()} == {
        "b": ((3,), torch.float32, "meta"),
        "a": ((1, 1), torch.float32, "meta"),
        "none": ((0, 5), torch.int64, "meta"),
    }
    values = read_all(stored, torch.float16)
    assert values["a"].tolist() == [[1.0]]
    assert values["b"].tolist() == [-2.0, 3.5, 0.25]
    assert (values["b"].dtype, values["none"].dtype) == (torch.float16, torch.int64)
    assert values["none"].shape == (0, 5)
    for dtype in (None, torch.float32):  # each in memory of its own
        values = read_all(stored, dtype)
        assert (values["a"].item(), values["b"][0].item()) == (1.0, -2.0)
        assert values["b"].dtype == torch.float32
    assert stored["b"].read(device="meta").is_meta
    assert stored_safetensors(file_of(tmp_path, {}, b"")) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F31"}, "'a' has the unknown dtype 'F31'"),
        ({"more": 1}, "'a' must have dtype, shape and data_offsets"),
        ({"shape": [2, -2]}, "'a': shape and data_offsets must be lists of integers >= 0"),
        ({"shape": 4}, "'a': shape and data_offsets must be lists of integers >= 0"),
        ({"shape": [2, True]}, "'a': shape and data_offsets must be lists of integers >= 0"),
        ({"data_offsets": [0, 16, 16]}, "'a': shape and data_offsets must be lists of integers"),
        ({"data_offsets": [0, 2**62]}, "'a': shape and data_offsets must be lists of integers"),
        ({"shape": [1] * 65}, "'a' has more than 64 axes or 2^63 values"),
        ({"shape": [2**32, 2**31]}, "'a' has more than 64 axes or 2^63 values"),
        ({"shape": [0, 2**32, 2**31]}, "'a' has more than 64 axes or 2^63 values"),
        ({"shape": [2**31, 2**31, 1]}, "'a' of shape [2147483648, 2147483648, 1] has 16 bytes"),
        ({"shape": [2, 3]}, "'a' of shape [2, 3] has 16 bytes"),
        ({"data_offsets": [1, 17]}, "the values of 'a' start at 1, not 0"),
        ({"shape": [2], "data_offsets": [0, 8]}, "bytes; its header describes "),
        ({"shape": [6], "data_offsets": [0, 24]}, "bytes; its header describes "),
    ],
)
def test_entries_that_are_refused(tmp_path, change, message):
    path = file_of(tmp_path, {"a": ENTRY | change})
    text = f"{path}: is missing or damaged: {message}"
    if "describes" in message:
        size, end = path.stat().st_size, ENTRY | change
        text = f"it has {size} bytes; its header describes {size - 16 + end['data_offsets'][1]}"
    with pytest.raises(UserError, match=re.escape(text)):
        stored_safetensors(path)


def test_the_largest_shapes_and_headers(tmp_path, monkeypatch):
    axes = stored_safetensors(file_of(tmp_path, {"a": ENTRY | {"shape": [4] + [1] * 63}}))
    assert axes["a"].ndim == 64
    empty = {"dtype": "U8", "shape": [0, 2**61, 2], "data_offsets": [0, 0]}
    assert stored_safetensors(file_of(tmp_path, {"a": empty}, b""))["a"].numel() == 0
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", 1000)
    padded = json.dumps({"a": ENTRY}).encode().ljust(1000)
    assert stored_safetensors(file_of(tmp_path, padded))["a"].shape == (2, 2)
    with pytest.raises(UserError, match="a header of 1,001 bytes in a file of 1,025 bytes"):
        stored_safetensors(file_of(tmp_path, padded + b" "))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01" * 7, "is missing or damaged: it has no header"),
        (struct.pack("<Q", 1), "is missing or damaged: a header of 1 byte in a file of 8 bytes"),
        (b"PK\x03\x04" + b"\0" * 4, "is a file of torch.save; rename it to end in .pth"),
        (header_of([]), "is missing or damaged: the header must be an object"),
        (
            header_of({"__metadata__": 3}),
            "is missing or damaged: its __metadata__ must be an object",
        ),
        (header_of(b"[" * 100_000), "is missing or damaged: its header is nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file"),
    ],
    ids=range(7),
)
def test_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        stored_safetensors(path)


def test_an_entry_is_named_and_a_long_reason_is_cut(tmp_path):
    other = {"dtype": "F32", "shape": [3], "data_offsets": [16, 20]}
    with pytest.raises(UserError, match=r"damaged: 'b' of shape \[3\] has 4 bytes$"):
        stored_safetensors(file_of(tmp_path, {"a": ENTRY, "b": other}))
    with pytest.raises(UserError, match=r"damaged: '" + "x" * 199 + "$"):
        stored_safetensors(file_of(tmp_path, {"x" * 300: ENTRY | {"dtype": "F31"}}))


def test_a_header_may_list_so_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_TENSORS", 2)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    assert len(stored_safetensors(file_of(tmp_path, {"a": empty, "b": empty}, b""))) == 2
    with pytest.raises(UserError, match="it lists 3 tensors; at most 2"):
        stored_safetensors(file_of(tmp_path, {"a": empty, "b": empty, "c": empty}, b""))


# --- checksums ------------------------------------------------------------------------------------


def sum_by_definition(content, size):
    total = 0
    for start in range(0, len(content), size):
        chunk = content[start : start + size]
        words = [chunk[i : i + 8] for i in range(0, len(chunk), 8)]
        total = total * 0x9E3779B97F4A7C15 + sum(int.from_bytes(w, "little") for w in words)
    return f"{total % 2**64:016x}"


@pytest.mark.parametrize("chunk", [64, CHUNK_BYTES])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 65, 200, 300, 400, 1000])
def test_checksums_are_those_of_the_definition(tmp_path, monkeypatch, size, chunk):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    texts = checksums_of({"a": tensor})
    assert json.loads(texts["sum64"]) == {"a": sum_by_definition(tensor.numpy().tobytes(), chunk)}
    header = {
        "__metadata__": texts,
        "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    path = file_of(tmp_path, header, tensor.numpy().tobytes())
    assert torch.equal(stored_safetensors(path)["a"].read(), tensor)
    if size:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged: the checksum of 'a' is .*; expected "):
            stored_safetensors(path)["a"].read()


# --- regions and memory ---------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(64)))
    with path.open("rb") as file:
        return Source(path, file)


def test_bytes_of_a_region(source):
    read = source.read_bytes(Region("r", 3, 5))
    assert read.tolist() == [3, 4, 5, 6, 7]
    assert source.read_bytes(Region("r", 64, 0)).tolist() == []
    scratch = source.read_bytes(Region("r", 0, 4), into_scratch=True)
    again = source.read_bytes(Region("r", 10, 4), into_scratch=True)
    assert scratch.data_ptr() == again.data_ptr()
    assert scratch.tolist() == [10, 11, 12, 13]
    larger = source.read_bytes(Region("r", 10, 6), into_scratch=True)
    assert larger.tolist() == [10, 11, 12, 13, 14, 15]
    assert read.tolist() == [3, 4, 5, 6, 7]
    one = source.shared_bytes(Region("one", 0, 8))
    assert source.shared_bytes(Region("one", 0, 8)) is one
    assert source.shared_bytes(Region("one", 8, 8)).tolist() == list(range(8, 16))
    with pytest.raises(UserError, match="is damaged: it ends within the values of a tensor"):
        source.read_bytes(Region("r", 60, 5))


def test_bytes_that_come_piece_by_piece(source, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, at: preadv(f, [views[0][:3]], at))
    assert source.read_bytes(Region("r", 3, 11)).tolist() == list(range(3, 14))


def test_every_value_that_is_read_counts(source):
    meta = torch.empty(8, dtype=torch.int16, device="meta")
    stored = StoredTensor.of(meta, source, Region("r", 8, 16))
    for _ in range(4 * 64 // 16):
        stored.read()
    with pytest.raises(UserError, match="they would take more than 4 times the 64 bytes"):
        stored.read()


def test_tensors_take_at_most_four_times_their_file(source):
    source.allocate(4 * 64 - 1)
    source.allocate(1)
    text = "its tensors overlap: they would take more than 4 times the 64 bytes of the file"
    with pytest.raises(UserError, match=text):
        source.allocate(1)


def test_views_lie_within_their_region(source):
    region = Region("r", 8, 16)

    def view(size, stride, start=0):
        base = torch.empty(1000, dtype=torch.int16, device="meta")
        return StoredTensor.of(base.as_strided(size, stride, start), source, region)

    words = [int.from_bytes(bytes(range(i, i + 2)), "little") for i in range(8, 24, 2)]
    assert view((8,), (1,)).read().tolist() == words
    assert view((2, 2), (1, 4), 2).read().tolist() == [[words[2], words[6]], [words[3], words[7]]]
    assert view((4,), (2,), 1).read().tolist() == words[1::2]
    assert view((0, 3), (1, 1), 900).read().shape == (0, 3)
    assert view((), (), 7).read().item() == words[7]
    assert view((4,), (0,), 3).read().tolist() == [words[3]] * 4
    # Large enough by its last value, or by the number of its values, which may share memory.
    for size, stride, start in (((8,), (1,), 1), ((4,), (2,), 2), ((9,), (1,), 0), ((9,), (0,), 0)):
        text = f"a tensor of shape {size} reaches beyond the 16 bytes of r"
        with pytest.raises(UserError, match=re.escape(text)):
            view(size, stride, start)


def test_other_tensors_keep_their_device_and_integers_their_dtype():
    x, n = torch.ones(2), torch.ones(2, dtype=torch.int32)
    assert read_values(x) is x
    assert read_values(x, torch.float16).dtype == torch.float16
    assert read_values(n, torch.float16).dtype == torch.int32
    assert read_values(x.to("meta")).is_meta
    assert read_values(x, device="meta").is_meta


# --- .pth -----------------------------------------------------------------------------------------


def test_a_pickle_gives_its_values_with_tensors_that_are_read_later(tmp_path):
    path, base = tmp_path / "a.pth", torch.arange(12.0).view(3, 4)
    names = argparse.Namespace(depth=3, inner=argparse.Namespace(lr=0.5))
    torch.save(
        {"a": base, "columns": [base[:, 1], (base[1:],)], "args": names, 3: None,
         "none": torch.empty(0, 2), "other": torch.ones(3)}, path
    )  # fmt: skip
    state = stored_pickle(path)
    assert state["args"] == {"depth": 3, "inner": {"lr": 0.5}}
    assert state[3] is None
    assert all(isinstance(x, StoredTensor) for x in (state["a"], state["columns"][0]))
    read = replace_tensors(state, read_values)
    assert torch.equal(read["a"], base)
    assert torch.equal(read["columns"][0], base[:, 1])
    assert torch.equal(read["columns"][1][0], base[1:])
    assert read["none"].shape == (0, 2)
    assert read["other"].tolist() == [1, 1, 1]
    torch.save({"a": base}, path, _use_new_zipfile_serialization=False)  # read whole
    old = stored_pickle(path)["a"]
    assert type(old) is torch.Tensor
    assert torch.equal(old, base)


class Runs:
    """Runs code where it is unpickled."""

    ran = ()

    def __reduce__(self):
        return setattr, (Runs, "ran", (1,))


@pytest.mark.parametrize("beside", [None, argparse.Namespace(depth=3)])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, beside):
    torch.save({"args": beside, "a": Runs()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: refused: it holds a .*, and loading that "):
        stored_pickle(tmp_path / "a.pth")
    assert Runs.ran == ()


def test_the_reason_of_torch_or_of_the_system_is_told_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"PK\x03\x04 and no archive")
    with pytest.raises(UserError, match=r"is not a readable checkpoint: File is not a zip file$"):
        stored_pickle(path)
    torch.save({}, path)
    unreadable = "is not a readable checkpoint: "
    for error, reason in (
        (RuntimeError("x" * 201 + "\ny"), unreadable + "x" * 200),
        (KeyError("a value"), unreadable + "torch.save did not write it"),
        (
            pickle.UnpicklingError("no class"),
            "refused: loading it would run code .* of weights are read",
        ),
    ):

        def load(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(UserError, match=f"{reason}$"):
            stored_pickle(path)


def test_files_that_are_no_pickles_of_weights(tmp_path):
    path = tmp_path / "a.pth"
    for content, kind in (([1], "list"), (torch.ones(2), "Tensor"), (None, "NoneType")):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"must hold a dictionary of tensors; got {kind}"):
            stored_pickle(path)
    path.write_bytes(header_of({"a": ENTRY}) + VALUES)
    with pytest.raises(UserError, match=r"is a \.safetensors file; rename it to end so"):
        stored_pickle(path)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"is not a readable checkpoint: torch\.save did not write"):
        stored_pickle(path)
    torch.save({"a": torch.ones(2, device="meta")}, path)
    with pytest.raises(UserError, match=r"no values of a tensor of shape \(2,\), which was saved"):
        stored_pickle(path)
    lazy = torch.ones(2, dtype=torch.complex64).conj()
    for other in (torch.ones(2).to_sparse(), lazy, torch._neg_view(torch.ones(2))):
        torch.save({"a": other}, path)
        with pytest.raises(UserError, match="a Tensor that is sparse, quantized or a lazy view"):
            stored_pickle(path)


def changed_archive(path, change):
    """Writes the archive again; ``change`` gives (content, compression) of a record."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            content, compression = change(name, content)
            archive.writestr(zipfile.ZipInfo(name), content, compression)


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        ("data.pkl", lambda c: (c, zipfile.ZIP_DEFLATED), "data.pkl' is compressed; torch.save"),
        ("data/0", lambda c: (c, zipfile.ZIP_DEFLATED), "data/0' is compressed; torch.save"),
        (
            "byteorder",
            lambda c: (b"big", 0),
            "has the byte order 'big'; this machine's is 'little'",
        ),
        (
            "data/0",
            lambda c: (c[:-4], 0),
            "no record of the archive has the 1,024 bytes of a tenso",
        ),
    ],
)
def test_archives_that_are_refused(tmp_path, record, change, message):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(256)}, path)
    changed_archive(path, lambda name, c: change(c) if name.endswith(f"/{record}") else (c, 0))
    with pytest.raises(UserError, match=re.escape(message)):
        stored_pickle(path)


def test_an_archive_may_describe_its_tensors_in_so_many_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(i.file_size for i in archive.infolist() if "/data/" not in i.filename)
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", largest)
    assert stored_pickle(path)["a"].shape == (2,)
    monkeypatch.setattr(tensor_files, "MAX_HEADER_BYTES", largest - 1)
    with pytest.raises(UserError, match=f"has more than {largest - 1} bytes; weights need less"):
        stored_pickle(path)


def test_tensors_are_replaced_wherever_they_are():
    x, items = torch.ones(2), [1]
    items.append(items)
    value = {"a": x, "b": [x, (x, 2)], "c": argparse.Namespace(x=x), "self": items, "text": "t"}
    replaced = replace_tensors(value, lambda tensor: tensor.numel())
    assert replaced is value
    assert (value["a"], value["b"], value["c"], value["text"]) == (2, [2, (2, 2)], {"x": 2}, "t")
    assert value["self"][1] is items
    assert replace_tensors(x, lambda tensor: 5) == 5
