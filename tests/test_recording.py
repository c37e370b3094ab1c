"""Which tests' branches are recorded: the list names tests that exist, and loses no branch."""

import ast
import json

from coverage import CoverageData

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
    first, second, third = ("a", 1, 2), ("a", 2, 3), ("b", 1, 2)
    branches = {"slow": {first, second}, "slower": {first, third}, "quick": {second, third}}
    seconds = {"slow": 2.0, "slower": 3.0, "quick": 0.1, "slow too": 1.0}
    # Without "slower" only "slow" takes the first branch; "quick" would save no time.
    assert superfluous(branches, seconds) == ["slower", "slow too"]
    # The same with a branch that is taken while modules are imported.
    assert superfluous(branches | {"": {first}}, seconds) == ["slower", "slow", "slow too"]


def test_records_are_read(tmp_path):
    # Not by a second Coverage: that of the test process would not save its record then.
    data = CoverageData(str(tmp_path / "data"))
    for context, arcs in (("", [(2, 3)]), ("a.py::test_a", [(2, 4)]), ("a.py::test_b", [(1, 2)])):
        data.set_context(context)
        data.add_arcs({str(ROOT / "module.py"): arcs})
    data.write()
    report = {"files": {"module.py": {"executed_branches": [[2, 3], [2, 4]]}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "seconds.1").write_text("0.5 a.py::test_a\n0.25 a.py::test_b\n")
    (tmp_path / "seconds.2").write_text("0.5 a.py::test_b\n")
    branches, seconds = read_records(tmp_path)
    assert seconds == {"a.py::test_a": 0.5, "a.py::test_b": 0.75}
    # The step from line 1 to line 2 is no branch.
    assert branches == {"": {("module.py", 2, 3)}, "a.py::test_a": {("module.py", 2, 4)}}
