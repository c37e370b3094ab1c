"""The mutants of a file: which places change, to what, and which tests each needs."""

import difflib
import importlib

import pytest

pytest.importorskip("libcst", reason="needs the development tools: make dev")

from tests.mutation import changes, collected
from tests.mutation.forked import Reach

SOURCE = '''\
"""A module."""

LIMIT = 3


def below(value: int | None, most: "int | str" = 7) -> bool:
    """Whether value is below most and not 0."""
    if value is None:
        raise ValueError(f"below: value must be an integer; got {value!r}")
    return value < most and not value == 0


def pairs(one, other):
    return zip(one, other, strict=True)


def sample_inputs():
    return 1 + 2
'''


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    (tmp_path / "mutated_module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return changes.mutants_of("mutated_module")


def test_mutants_are_in_functions_only_and_never_in_annotations_or_text(mutants):
    shown = {(mutant.line, str(mutant)) for mutant in mutants}
    assert shown == {
        (6, "7 -> 8"),
        (8, "is -> is not"),
        (10, "< most -> <= most"),
        (10, "value < most and not value == 0 -> value < most or not value == 0"),
        (10, "not value == 0 -> value == 0"),
        (10, "== 0 -> != 0"),
        (10, "0 -> 1"),
    }


def test_each_mutant_changes_one_line_and_is_python(mutants):
    for mutant in mutants:
        compile(mutant.source, "mutated", "exec")
        lines = difflib.ndiff(SOURCE.splitlines(), mutant.source.splitlines())
        assert sum(line.startswith("+ ") for line in lines) == 1


def test_a_module_without_a_file_is_refused():
    with pytest.raises(ModuleNotFoundError, match="no file of module no_such_module"):
        changes.mutants_of("no_such_module")


def test_functions_take_the_code_of_a_mutant(mutants):
    module = importlib.reload(importlib.import_module("mutated_module"))
    by_text = {str(mutant): mutant for mutant in mutants}
    [(function, code)] = collected.changes_of([module.below], by_text["< most -> <= most"])
    assert not module.below(7)
    # A default value is made by the import: no code of a function differs.
    assert collected.changes_of([module.below], by_text["7 -> 8"]) == []
    function.__code__ = code
    assert module.below(7)
    assert not module.below(8)


def test_a_mutant_takes_the_tests_of_its_line_else_of_its_function(mutants):
    default, check = (next(m for m in mutants if str(m) == name) for name in ("7 -> 8", "0 -> 1"))
    assert (default.function, check.function) == ((6, 10), (6, 10))
    seconds = {"slow": 3.0, "quick": 1.0, "other": 2.0}
    reach = Reach(
        seconds, {6: [], 8: ["slow", "quick", "other"], 10: ["slow", "quick"]}, frozenset({6})
    )
    assert reach.tests_of(check) == ["quick", "slow"]
    assert reach.tests_of(default) == ["quick", "other", "slow"]
    assert Reach(seconds, {6: []}, frozenset({6})).tests_of(check) == []
    assert Reach(seconds, {6: [], 8: []}, frozenset({6, 8})).tests_of(check) == [
        "quick", "other", "slow",
    ]  # fmt: skip
