"""Which tests' branches are recorded: the list names tests that exist, and loses no branch."""

import ast
import sys

import coverage

from tests import recording
from tests.recording import ROOT, read_records, superfluous, unrecorded_functions


def test_every_function_of_the_list_exists():
    functions: dict[str, set[str]] = {}
    for name in unrecorded_functions():
        file, _, function = name.partition("::")
        if file not in functions:
            tree = ast.parse((ROOT / file).read_text())
            functions[file] = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        assert function.rpartition("::")[2] in functions[file], f"{recording.LIST.name}: {name}"


def test_every_branch_is_taken_by_a_recorded_function():
    first, second, third = (0, 1, 2), (0, 2, 3), (1, 1, 2)
    branches = {"slow": {first, second}, "slower": {first, third}, "quick": {second, third}}
    seconds = {"slow": 2.0, "slower": 3.0, "quick": 0.1, "slow too": 1.0}
    # Without "slower" only "slow" takes the first branch; "quick" would save no time.
    assert superfluous(branches, seconds) == ["slower", "slow too"]
    # The same with a branch that is taken while modules are imported.
    assert superfluous(branches | {"": {first}}, seconds) == ["slower", "slow", "slow too"]


def test_records_are_read(tmp_path, monkeypatch):
    module = tmp_path / "module.py"
    module.write_text("def sign(x):\n    if x < 0:\n        return -1\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    record = coverage.Coverage(data_file=tmp_path / "data", branch=True, include=[str(module)])
    before = sys.gettrace()
    record.start()
    record.switch_context("tests/a.py::test_a")
    import module as imported  # pyright: ignore[reportMissingImports]

    imported.sign(1)
    record.switch_context("tests/a.py::test_b")
    imported.sign(-1)
    record.stop()
    record.save()
    sys.settrace(before)
    (tmp_path / "seconds.1").write_text("0.5 tests/a.py::test_a\n0.25 tests/a.py::test_b\n")
    (tmp_path / "seconds.2").write_text("0.5 tests/a.py::test_b\n")
    branches, seconds = read_records(tmp_path)
    assert seconds == {"tests/a.py::test_a": 0.5, "tests/a.py::test_b": 0.75}
    lines = {name: {branch[1:] for branch in found} for name, found in branches.items()}
    assert (2, 4) in lines["tests/a.py::test_a"] - lines["tests/a.py::test_b"]
    assert (2, 3) in lines["tests/a.py::test_b"] - lines["tests/a.py::test_a"]
