"""Imports point one way: cli -> engine, train -> models -> variant_kernels -> csrc."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Modules of `variant` from bottom to top; a module may import those before it, not those after.
ORDER = (
    "errors",
    "kv_dtype",
    "config",
    "memory",
    "presets",
    "schedule",
    "augment",
    "sampling",
    "quantizer",
    "vqvae",
    "transformer",
    "planning",
    "mapped",
    "model_card",
    "packing",
    "weights",
    "capture",
    "steps",
    "engine",
    "kv_error",
    "checkpoint",
    "original",
    "supernet",
    "live",
    "recipe",
    "data",
    "digits",
    "train_start",
    "train",
    "train_vae",
    "train_var",
    "bench",
    "commands",
    "cli",
)


def imports(path):
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package):
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_kernels_have_never_heard_of_the_model():
    for path in files("variant_kernels"):
        for name in imports(path):
            assert name.split(".")[0] not in ("variant", "benchmarks", "tests"), f"{path}: {name}"


def test_the_package_does_not_import_its_tests_or_benchmarks():
    for path in files("variant"):
        for name in imports(path):
            assert name.split(".")[0] not in ("benchmarks", "tests"), f"{path}: {name}"


def test_modules_of_variant_import_downwards_only():
    place = {name: index for index, name in enumerate(ORDER)}
    for path in files("variant"):
        module = path.relative_to(ROOT / "variant").parts[0].removesuffix(".py")
        if module in ("__init__", "recipes", "assets"):
            continue
        assert module in place, f"{path}: add it to ORDER where it belongs"
        # A command's type annotations name cli's classes; nothing of cli runs there.
        skip = {"cli"} if module == "commands" else set()
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "variant" and len(parts) > 1 and parts[1] in place.keys() - skip:
                assert place[parts[1]] <= place[module], f"{path}: imports {name}"


def test_plans_touch_no_tensor():
    names = {name for path in files("variant_kernels/plans") for name in imports(path)}
    assert not {name for name in names if name.split(".")[0] in ("torch", "numpy")}


def test_the_extension_includes_no_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    assert sources
    for path in sources:
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert "torch" not in line, f"{path}: {line}"
                assert "ATen" not in line, f"{path}: {line}"
