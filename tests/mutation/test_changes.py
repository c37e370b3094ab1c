"""The mutants of a file: which places change, to what, and that each is one change."""

import difflib

import pytest

pytest.importorskip("libcst", reason="needs the development tools: make dev")

from tests.mutation import changes

SOURCE = '''\
"""A module."""

LIMIT = 3


def below(value: int | None, most: "int | str" = 7) -> bool:
    """Whether value is below most and not 0."""
    if value is None:
        raise ValueError(f"below: value must be an integer; got {value!r}")
    return value < most and not value == 0


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
