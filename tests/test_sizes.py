"""Classes stay short enough to be read in one sitting, shipped models small enough to install."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_CLASS_LINES = 320
MAX_MODEL_BYTES = 6_000_000


def class_lengths(source):
    """(name, lines) of every class, nested ones too, decorators not counted."""
    nodes = ast.walk(ast.parse(source))
    return [(n.name, n.end_lineno - n.lineno + 1) for n in nodes if isinstance(n, ast.ClassDef)]


def test_no_class_is_too_long():
    paths = [
        path for name in ("variant", "variant_kernels") for path in (ROOT / name).rglob("*.py")
    ]
    lengths = [(path, *item) for path in paths for item in class_lengths(path.read_text())]
    assert len(lengths) > 50
    too_long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path, name, lines in lengths
        if lines > MAX_CLASS_LINES
    ]
    assert not too_long, f"at most {MAX_CLASS_LINES} lines: {too_long}"


def test_a_long_class_is_found():
    source = "class Outer:\n    class Inner:\n        x = 1\n" + "    y = 2\n" * 400
    assert class_lengths(source) == [("Outer", 403), ("Inner", 2)]


def test_shipped_models_are_small():
    files = sorted((ROOT / "variant" / "assets").rglob("*.safetensors"))
    assert {path.parent.name for path in files} >= {"digits", "fashion-mnist"}
    assert not {
        path.parent.name: path.stat().st_size
        for path in files
        if path.stat().st_size > MAX_MODEL_BYTES
    }
