"""The contents of hostile files and command lines; each function returns what it did, in words."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    1000,
    100000,
    10**6,
    10**9,
    10**12,
    10**18,
    2**62,
    2**63,
    2**64,
    10**40,
    -(2**63),
    0.5,
    1.5,
    -0.0,
    1e-300,
    1e308,
    3.2e10,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "1",
    "../../etc/passwd",
    "/dev/zero",
    "a\nb",
    "x" * 5000,
    "\u202e\u0000",
    [],
    {},
    [1, 2],
    [1, 10**6],
    [1, 10**9],
    [1, 2, 2**62],
    list(range(1, 5000)),
    [[1]],
    {"2": [0, 3]},
    {"x": "y"},
    {str(n): [0, 3] for n in range(2000)},
)


def import_everything() -> None:
    """What the commands import at first use, so that a case's seconds are its own."""
    import importlib

    for name in (
        "generate", "plan", "info", "train", "tokenize", "convert", "bench", "kv_error_table",
    ):  # fmt: skip
        importlib.import_module(f"variant.cli.{name}")
    import torch._dynamo  # noqa: F401  an optimizer imports it at first use
    import tyro  # noqa: F401


def recipe(images: Path, workers: int = 0) -> dict[str, Any]:
    """A training of two short epochs on a folder of images."""
    optim = {"batch_size": 8, "learning_rate": 1e-3}
    return {
        "name": "tiny",
        "description": "flat colours",
        "seed": 0,
        "model": {"depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 2},
        "vae": {
            "vocab_size": 8,
            "z_channels": 4,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "patch_nums": [1, 2, 4],
        },
        "vae_training": {
            "epochs": 2,
            "revive_every": 2,
            "scale_dropout": 0.5,
            "optim": dict(optim),
        },
        "data": {
            "kind": "folder",
            "train": str(images / "train"),
            "held_out": str(images / "held_out"),
            "hflip": 0.5,
            "randaugment_ops": 1,
            "randaugment_magnitude": 9.0,
            "mixup": 0.2,
            "workers": workers,
        },
        "optim": dict(optim),
        "schedule": {"depths": [2], "bridge": 1, "joint": 1, "transition": 1, "refinement": 1},
        "eval": {"batch_size": 4},
    }


def to_toml(values: dict[str, Any], prefix: str = "") -> str:
    """TOML of plain values; values that it does not know are written as Python shows them."""
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            name = f"{prefix}{key}"
            tables.append(f"[{name}]\n{to_toml(value, name + '.')}")
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, *tables])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


# --- trees of plain values, and texts -------------------------------------------------------------


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    found = [path] if path else []
    for key, value in items:
        found += _places(value, (*path, key))
    return found


def spoil_tree(rng: random.Random, tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """One place changed, removed, added or renamed."""
    tree = copy.deepcopy(tree)
    path = rng.choice(_places(tree))
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    where, key = ".".join(map(str, path)), path[-1]
    roll = rng.random()
    if roll < 0.08:
        del parent[key]
        return tree, f"{where} removed"
    if roll < 0.14 and isinstance(parent, dict):
        parent[rng.choice(("unknown", "", "x" * 300, "a.b", "__class__"))] = rng.choice(ODD)
        return tree, f"a key added beside {where}"
    value = rng.choice(ODD)
    if isinstance(parent[key], int) and rng.random() < 0.3:
        value = parent[key] * rng.choice((-1, 2, 3, 10, 1000, 10**6)) + rng.choice((0, 1))
    parent[key] = value
    shown = repr(value)
    return tree, f"{where} = {shown if len(shown) < 60 else shown[:57] + '...'}"


def _odd_text(rng: random.Random, text: str) -> tuple[bytes, str]:
    """The bytes of a damaged text file."""
    data = text.encode()
    cut = rng.randrange(len(data))
    flipped = bytearray(data)
    flipped[cut] ^= 1 << rng.randrange(8)
    choices: tuple[tuple[str, bytes], ...] = (
        ("nothing", b""),
        (f"{cut} bytes", data[:cut]),
        (f"byte {cut} flipped", bytes(flipped)),
        ("a byte order mark", b"\xef\xbb\xbf" + data),
        ("UTF-16", text.encode("utf-16")),
        ("bytes that are no text", rng.randbytes(300)),
        ("zeros", bytes(4096)),
        ("200,000 brackets", b"[" * 200_000),
        ("100,000 nested objects", b'{"a":' * 100_000),
        ("a list", b"[1, 2]"),
        ("a number", b"1e999"),
        ("a number of 10,000 digits", data.replace(b"3", b"3" * 10_000, 1)),
        ("a key of 20,000 dots", b"a" + b".a" * 20_000 + b" = 1\n" + data),
        ("itself twice", data + data),
        ("null", b"null"),
        ("a pickle", pickle.dumps({"a": 1})),
    )
    what, result = rng.choice(choices)
    return result, what


def _no_file(rng: random.Random, path: Path) -> str:
    """Something that is no regular file in the file's place."""
    path.unlink()
    kind = rng.choice(
        ("missing", "a folder", "a pipe", "a link to itself", "/dev/zero", "/dev/full")
    )
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind.startswith("/dev"):
        path.symlink_to(kind)
    return kind


def spoil_json(rng: random.Random, path: Path) -> str:
    tree = json.loads(path.read_text())
    roll = rng.random()
    if roll < 0.1:
        return _no_file(rng, path)
    if roll < 0.3:
        data, text = _odd_text(rng, path.read_text())
        path.write_bytes(data)
        return text
    texts = []
    for _ in range(rng.choice((1, 1, 2))):
        tree, text = spoil_tree(rng, tree)
        texts.append(text)
    path.write_text(json.dumps(tree))
    return "; ".join(texts)


def spoil_toml(rng: random.Random, good: dict[str, Any], path: Path) -> str:
    path.write_text(to_toml(good))
    roll = rng.random()
    if roll < 0.07:
        return _no_file(rng, path)
    if roll < 0.25:
        data, text = _odd_text(rng, path.read_text())
        path.write_bytes(data)
        return text
    tree, text = spoil_tree(rng, good)
    path.write_text(to_toml(tree))
    return text


# --- weights --------------------------------------------------------------------------------------


def _bytes_spoilt(rng: random.Random, path: Path) -> str:
    """Cut or flipped bytes anywhere, more often in the first ones."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(500, len(data)))
    if rng.random() < 0.5:
        path.write_bytes(bytes(data[:at]))
        return f"its first {at} bytes only"
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return f"byte {at} flipped"


def spoil_safetensors(rng: random.Random, path: Path) -> str:
    roll = rng.random()
    if roll < 0.12:
        return _no_file(rng, path)
    if roll < 0.35:
        return _bytes_spoilt(rng, path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if roll < 0.45:
        wrong = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", wrong) + data[8:])
        return f"a header size of {wrong}"
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = rng.choice(("dtype", "shape", "offsets", "name", "added", "removed", "layer", "values"))
    if what == "dtype":
        entry["dtype"] = rng.choice(("F64", "I64", "BOOL", "F16", "F8_E4M3", "XX", "", 3))
    elif what == "shape":
        entry["shape"] = rng.choice(([], [0], [2**40, 2**40], [-1], entry["shape"] + [1], ["a"]))
    elif what == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**60], [8, 4], [-4, 0], [0]))
    elif what == "name":
        header[rng.choice(("", "x" * 10000, "var.blocks.0", "vae.x"))] = header.pop(name)
    elif what == "added":
        header["__metadata__"] = {"a": "b" * 100_000}
    elif what == "removed":
        del header[name]
    elif what == "layer":
        header["var.blocks.999999999.attn.proj.weight"] = header.pop(name)
    else:
        start, end = entry["data_offsets"]
        body = body[:start] + b"\xff" * (end - start) + body[end:]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"{what} of {name} changed"


class _Runs:
    """Pickles to a call; loading it would run the call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _code(rng: random.Random, marker: Path) -> Any:
    """An object whose unpickling writes the marker file."""
    import torch

    touch = f"open({str(marker)!r}, 'w').close()"
    return rng.choice(
        (
            _Runs(os.system, f"touch {marker}"),
            _Runs(exec, touch),
            _Runs(eval, touch),
            _Runs(open, str(marker), "w"),
            _Runs(os.mkdir, str(marker)),
            _Runs(getattr, _Runs(__import__, "os"), "system"),
            _Runs(torch.save, {}, str(marker)),
            {"w": _Runs(exec, touch)},
            [_Runs(exec, touch)],
        )
    )


def spoil_pth(rng: random.Random, path: Path, marker: Path) -> str:
    import torch

    roll = rng.random()
    if roll < 0.08:
        return _no_file(rng, path)
    if roll < 0.2:
        return _bytes_spoilt(rng, path)
    if roll < 0.36:
        value = _code(rng, marker)
        kind = rng.choice(("pickle", "torch.save", "legacy", "entry", "protocol 0"))
        if kind == "pickle":
            path.write_bytes(pickle.dumps(value, protocol=rng.choice((2, 4, 5))))
        elif kind == "protocol 0":
            path.write_bytes(pickle.dumps(value, protocol=0))
        elif kind == "entry":
            state = torch.load(path, weights_only=True)
            torch.save({**state, "extra": value}, path)
        else:
            torch.save(value, path, _use_new_zipfile_serialization=kind != "legacy")
        return f"a pickle that would run code ({kind})"
    if roll < 0.46:
        return _bomb(rng, path)
    state = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(state))
    what, change = rng.choice(_STATES)
    result = change(rng, state, name)
    torch.save(state if result is None else result, path)
    return f"{what} ({name})"


def _set(value: Callable[[Any, Any], Any]) -> Callable[[random.Random, dict[Any, Any], str], None]:
    def change(rng: random.Random, state: dict[Any, Any], name: str) -> None:
        state[name] = value(rng, state[name])

    return change


def _add(key: Any) -> Callable[[random.Random, dict[Any, Any], str], None]:
    def change(rng: random.Random, state: dict[Any, Any], name: str) -> None:
        import torch

        state[key(name) if callable(key) else key] = torch.zeros(1)

    return change


def _wrapped(rng: random.Random, state: dict[Any, Any], name: str) -> Any:
    deep: Any = state
    for _ in range(rng.choice((1, 2, 100))):
        deep = {rng.choice(("trainer", "model", "state_dict", "x")): deep}
    return deep


_STATES: tuple[tuple[str, Callable[[random.Random, dict[Any, Any], str], Any]], ...] = (
    ("a layer of a huge number", _add("blocks.999999999.attn.proj.weight")),
    ("a level of a huge number", _add("encoder.down.999999999.block.0.conv1.weight")),
    ("a level of a huge number", _add("decoder.up.100000000.block.0.conv1.weight")),
    ("a block of a huge number", _add("encoder.down.0.block.88888888.conv1.weight")),
    ("a negative layer", _add("blocks.-1.attn.proj.weight")),
    ("a layer without a number", _add("blocks.x.attn.proj.weight")),
    ("an integer as key", _add(1)),
    ("a tuple as key", _add((1, 2))),
    ("an empty key", _add("")),
    ("a key of 100,000 letters", _add("x" * 100_000)),
    ("a key with line breaks", _add(lambda name: name + "\nTraceback")),
    ("an entry missing", lambda r, s, n: s.__delitem__(n)),
    ("no entries", lambda r, s, n: {}),
    ("a number as entry", _set(lambda r, t: r.choice((1, None, "x", [1], {"a": 1})))),
    ("an entry of dtype", _set(lambda r, t: t.to(r.choice(_dtypes())))),
    ("a 0-d entry", _set(lambda r, t: t.flatten()[0])),
    ("an empty entry", _set(lambda r, t: t.new_empty(0))),
    ("an entry of another shape", _set(lambda r, t: t.unsqueeze(0))),
    ("an entry cut", _set(lambda r, t: t[: t.shape[0] // 2] if t.ndim else t)),
    ("a sparse entry", _set(lambda r, t: t.to_sparse())),
    ("a huge expanded entry", _set(lambda r, t: t.flatten()[:1].expand(2**33))),
    ("NaN in an entry", _set(lambda r, t: t * float("nan"))),
    ("a list in place of the dictionary", lambda r, s, n: list(s.values())),
    ("a tensor in place of the dictionary", lambda r, s, n: s[n]),
    ("dictionaries around it", _wrapped),
)


def _dtypes() -> tuple[Any, ...]:
    import torch

    return torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.uint8


def _bomb(rng: random.Random, path: Path) -> str:
    kind = rng.choice(("data.pkl of 300 MB", "a gzip file", "an empty zip", "memo", "no data.pkl"))
    if kind == "data.pkl of 300 MB":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            with file.open("archive/data.pkl", "w", force_zip64=True) as inner:
                for _ in range(300):
                    inner.write(bytes(2**20))
            file.writestr("archive/version", "3")
    elif kind == "a gzip file":
        path.write_bytes(gzip.compress(bytes(10**7)))
    elif kind == "memo":
        # Lists that hold the previous one ten times.
        data = b"\x80\x02]q\x00"
        for n in range(1, 200):
            data += b"]q" + bytes([n]) + b"(" + (b"h" + bytes([n - 1])) * 10 + b"e"
        path.write_bytes(data + b".")
    else:
        with zipfile.ZipFile(path, "w") as file:
            if kind == "no data.pkl":
                file.writestr("archive/version", "3")
    return kind


def write_idx(folder: Path) -> None:
    """Two pairs of IDX files, ten and four images of 6x7 pixels; some are compressed."""
    folder.mkdir()
    for part, count in (("train", 10), ("held_out", 4)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 7, 6)
        (folder / part).write_bytes(gzip.compress(header + bytes(range(42)) * count))
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(i % 2 for i in range(count))
        (folder / f"{part}_labels").write_bytes(labels)


def spoil_idx(rng: random.Random, path: Path) -> str:
    """An IDX file with wrong sizes, of another kind, cut, or that unpacks to gigabytes."""
    roll = rng.random()
    if roll < 0.15:
        return _no_file(rng, path)
    if roll < 0.45:
        return _bytes_spoilt(rng, path)
    data = path.read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    data = bytearray(gzip.decompress(data) if packed else data)
    if roll < 0.75:
        at = rng.randrange(4, 4 + 4 * data[3], 4)
        size = rng.choice((0, 1, 3, 11, 2**16, 2**31, 2**32 - 1))
        data[at : at + 4] = struct.pack(">I", size)
        text = f"of size {size} at byte {at}"
    elif roll < 0.85:
        at, value = rng.choice((0, 2, 3)), rng.choice((0, 1, 2, 4, 8, 13, 255))
        data[at] = value
        text = f"of magic number {value} at byte {at}"
    elif roll < 0.93:
        data[-1] = 255
        text = "of 255 at its end"
    else:
        sizes = rng.choice(((10, 7, 2**24), (10, 2**31, 2**31), (2**31, 7, 6)))
        zeros = bytes(data[:4]) + struct.pack(">3I", *sizes) + bytes(2**26)
        data, packed, text = bytearray(zeros), True, f"64 MiB of zeros for sizes {sizes}"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    return text


def spoil_tokens(rng: random.Random, folder: Path) -> str:
    """A folder of token shards with a damaged manifest, a damaged shard, or one that lies."""
    manifest = folder / "manifest.json"
    roll = rng.random()
    if roll < 0.4:
        return f"a manifest with {spoil_json(rng, manifest)}"
    shard = rng.choice(sorted(folder.glob("*.tar")))
    if roll < 0.5:
        return f"{shard.name} that is {_no_file(rng, shard)}"
    if roll < 0.6:
        path = shard.with_name(f"{shard.name}.sha256")
        return f"{path.name} with {_bytes_spoilt(rng, path)}"
    text = _bytes_spoilt(rng, shard)
    if roll < 0.8:
        # The manifest agrees with the damage: what the shard holds must be looked at.
        values = json.loads(manifest.read_text())
        values["shards"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(values))
        text += ", as the manifest says"
    return f"{shard.name} with {text}"


def spoil_checkpoint(rng: random.Random, folder: Path, marker: Path) -> str:
    """A checkpoint to resume, or the best weights beside it."""
    import torch

    last, best = folder / "vae-last.pt", folder / "vae-best.safetensors"
    roll = rng.random()
    if roll < 0.15:
        return f"best weights: {spoil_safetensors(rng, best)}"
    if roll < 0.25:
        return f"checkpoint: {_bytes_spoilt(rng, last)}"
    if roll < 0.32:
        return f"checkpoint: {_no_file(rng, last)}"
    state = torch.load(last, weights_only=True)
    key = rng.choice(list(state))
    if roll < 0.4:
        state[key] = _code(rng, marker)
        torch.save(state, last)
        return f"a checkpoint whose {key} would run code"
    if roll < 0.6 and isinstance(state[key], dict) and state[key]:
        inner = rng.choice(list(state[key]))
        state[key][inner] = rng.choice(ODD)
        text = f"{key}[{inner!r}]"
    elif roll < 0.7:
        state["history"] = rng.choice(([], [{}], [{"held_out_mean": "x"}], [1], [{"epoch": 1}]))
        text = f"history {state['history']}"
    else:
        state[key] = rng.choice((*ODD, -1, 10**12))
        text = f"{key} = {state[key]!r}"[:90]
    torch.save(state, last)
    return f"a checkpoint with {text}"


def spoil_image(rng: random.Random, path: Path) -> str:
    roll = rng.random()
    if roll < 0.2:
        return _no_file(rng, path)
    if roll < 0.5:
        return _bytes_spoilt(rng, path)
    from PIL import Image

    def png(width: int, height: int) -> bytes:
        """A header of that size over the small image's data."""
        out = io.BytesIO()
        Image.new("RGB", (4, 4)).save(out, format="PNG")
        data = bytearray(out.getvalue())
        data[16:24] = struct.pack(">II", width, height)
        import zlib

        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        return bytes(data)

    what, data = rng.choice(
        (
            ("of 12,000 x 12,000 pixels", png(12000, 12000)),
            ("of 2^31 x 2^31 pixels", png(2**31 - 1, 2**31 - 1)),
            ("of 0 x 0 pixels", png(0, 0)),
            ("empty", b""),
            ("text", b"<svg></svg>"),
            ("a GIF header", b"GIF89a" + bytes(20)),
            ("bytes", rng.randbytes(500)),
        )
    )
    path.write_bytes(data)
    return what


# --- command lines --------------------------------------------------------------------------------

_WORDS = (
    "", "x", "-1", "0", "1", "3", "17", "999999999999", "1e400", "nan", "inf", "-inf", "0.5", "1_0",
    "/dev/null", "/dev/null/x", "/", ".", "..", "x" * 5000, "a\nb", "--", "None", "True", "digits",
    "float32", "float16", "fp8", "cpu", "cuda", "é", "[bold]", "$(touch x)", "1e12",
)  # fmt: skip
# Not spoilt: measurements take minutes; tracebacks are wanted with --debug.
_NOT_SPOILT = {"bench", "debug"}


def options_of(command: str) -> dict[str, bool]:
    """Names of a command's options; whether each is a flag."""
    from variant.cli.options import Command

    kinds = {_dashed(kind.__name__): kind for kind in get_args(Command)}
    return {
        field.name.replace("_", "-"): str(field.type) == "bool"
        for field in dataclasses.fields(kinds[command])
        if field.name not in _NOT_SPOILT
    }


def _dashed(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def command_line(rng: random.Random, root: Path, folder: Path) -> list[str]:
    """A command with good options of which one to three are spoilt."""
    model, run = str(root / "model"), str(folder / "run")
    recipe = {"recipe": str(root / "recipe.toml"), "out": run}
    weights = {"var": str(root / "var.pth"), "vae": str(root / "vae.pth")}
    commands: dict[str, dict[str, str]] = {
        "generate": {"model": model, "labels": "1", "out": str(folder / "out.png")},
        "plan": {"model": model},
        "info": {"model": model},
        "convert": {**weights, "out": str(folder / "converted")},
        "train": dict(recipe),
        "train-vae": dict(recipe),
    }
    command = rng.choice(list(commands))
    good = commands[command]
    options = options_of(command)
    for _ in range(rng.choice((1, 1, 2, 3))):
        option = rng.choice(list(options))
        good[option] = rng.choice(_WORDS)
        # A relative path stays within the case's folder.
        path = option in ("out", "model", "var", "vae", "to-var", "to-vae", "json", "recipe")
        if path and good[option] not in ("digits", "/", "/dev/null", "/dev/null/x"):
            good[option] = str(folder / good[option])
    words = [command]
    for option, value in good.items():
        words += [f"--{option}"]
        if not options[option] and rng.random() < 0.97:
            words.append(value)
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(("--help", "--unknown", "extra")))
    return words
