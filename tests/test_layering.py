"""Imports go one way only, cli -> ... -> models -> variant_kernels -> csrc, without a circle.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING. The exception is
cli/main.py, which imports a command's module when that command runs.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Packages and modules of `variant`, bottom up: one may import those before it, not those after.
VARIANT = (
    "errors",
    "paths",
    "differences",
    "named_functions",
    "torch_modes",
    "models",
    "tensor_files",
    "files",
    "folder_lock",
    "schedule_files",
    "engine",
    "data",
    "checkpoints",
    "training",
    "pretrained",
    "supernet",
    "live_weights",
    "accelerate_original",
    "evaluation",
    "bench",
    "search",
    "cli",
    "training.__main__",
)
# The same for `variant_kernels`. `_C` is the compiled extension.
KERNELS = (
    "_C",
    "wording",
    "arguments",
    "plans",
    "device_lock",
    "tuning_switch",
    "untraced",
    "tensors",
    "masks",
    "packed_linear",
    "linear",
    "products",
    "kv_quantization",
    "split_keys",
    "kv_cache",
    "cuda_ops.library",
    "library_ops.installed",
    "dispatch",
    "cpu_ops",
    "gelu",
    "cuda_ops",
    "triton_ops",
    "library_ops",
    "ops",
    "backends",
    "attention",
    "integrations",
    "__main__",
)
ORDERS = {"variant": VARIANT, "variant_kernels": KERNELS}
# The public faces of the packages, which load the rest lazily, and folders of data.
FACES = ("variant", "variant_kernels", "variant.assets")
# The commands' own imports, each inside its function.
LAZY = "variant.cli.main"


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def files(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    return paths


def imports(path, *, top_level_only=False):
    """Every module that a file imports; for other names, the module that defines them."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else str(node.module)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def position(order, package, module):
    """The index in ORDER of the longest entry that holds a module, or None."""
    inner = module.removeprefix(f"{package}.")
    names = [name for name in order if f"{inner}.".startswith(f"{name}.")]
    return order.index(max(names, key=len)) if names else None


def arrows():
    """module -> the modules of this project that it imports."""
    modules = {module_name(path): path for package in ORDERS for path in files(package)}
    graph = {}
    for name, path in modules.items():
        lazy = name == LAZY
        targets = {target for target in imports(path, top_level_only=lazy) if target in modules}
        # A package's __init__ runs before its modules: importing a.b.c imports a.b too.
        targets |= {t.rsplit(".", 1)[0] for t in targets if t.count(".") >= 2} & modules.keys()
        inside = {t for t in targets if name == t or name.startswith(f"{t}.")}
        graph[name] = targets - inside - set(FACES)
    return graph


def circle_of(graph):
    """The modules of one circle, or an empty list."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for target in sorted(graph[name]):
            circle = visit(target)
            if circle:
                return circle
        path.pop()
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name))), [])


def test_kernels_do_not_import_the_model():
    for path in files("variant_kernels"):
        for name in imports(path):
            assert name.split(".")[0] not in ("variant", "benchmarks", "tests"), f"{path}: {name}"


def test_the_package_does_not_import_its_tests_or_benchmarks():
    for path in files("variant"):
        for name in imports(path):
            assert name.split(".")[0] not in ("benchmarks", "tests"), f"{path}: {name}"


def test_packages_import_downwards_only():
    for package, order in ORDERS.items():
        for path in files(package):
            module = module_name(path)
            if module in FACES:
                continue
            own = position(order, package, module)
            assert own is not None, f"{path}: add its package to the order where it belongs"
            for name in imports(path, top_level_only=module == LAZY):
                target = position(order, package, name) if name.startswith(f"{package}.") else None
                assert target is None or target <= own, f"{path}: imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    assert circle_of(arrows()) == []


def test_a_circle_is_found():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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
