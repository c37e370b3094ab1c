"""The bounds of branch coverage: which counts pass, which fail, and what is printed."""

import json

import pytest
from branch_coverage import main


def report(folder, **files):
    """A report of coverage.py with (branches taken, branches) of files of the package p."""
    entries = {
        f"p/{name}.py": {"summary": {"covered_branches": taken, "num_branches": every}}
        for name, (taken, every) in files.items()
    }
    entries["other/x.py"] = {"summary": {"covered_branches": 0, "num_branches": 50}}
    path = folder / "report.json"
    path.write_text(json.dumps({"files": entries}))
    return str(path)


@pytest.mark.parametrize(("bound", "status"), [("75", 0), ("75.1", 1), ("0", 0), ("100", 1)])
def test_the_share_is_of_all_branches_of_the_package(tmp_path, capsys, bound, status):
    path = report(tmp_path, a=(1, 2), b=(5, 6), c=(0, 0))
    assert main([path, f"p={bound}"]) == status
    printed = capsys.readouterr().out
    assert f"p: 75.0 % of 8 branches (at least {bound} %)" in printed
    assert ("below the bound: p" in printed) == bool(status)
    assert ("p/a.py" in printed) == (float(bound) > 50)
    assert "p/c.py" not in printed


def test_one_package_below_its_bound_is_enough_to_fail(tmp_path, capsys):
    path = report(tmp_path, a=(1, 1))
    assert main([path, "p=100", "other=1"]) == 1
    assert "below the bound: other" in capsys.readouterr().out


def test_a_package_without_data_fails(tmp_path, capsys):
    assert main([report(tmp_path, a=(1, 1)), "q=50"]) == 2
    assert "q: no file of it was measured" in capsys.readouterr().out
