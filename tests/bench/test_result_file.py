"""The writer of result files: valid JSON, one case a line, whole or not at all."""

import json

import pytest

from variant.bench.result_file import result_text, write_result

RESULT = {
    "format": "variant-example-1",
    "environment": {"cpu": "A", "caches": {"L2": "1024K"}},
    "quick": False,
    "cases": [
        {"name": "one", "median": 1 / 3, "quartiles": (0.25, 2e-7 / 3), "flop": 2**60 + 1},
        {"name": "two", "contenders": {"cpu": {"median": 12345.678901}}, "ours": True},
    ],
    "memory": [],
    "note": None,
}


def test_each_case_is_a_line_and_the_text_is_json():
    text = result_text(RESULT)
    assert text.splitlines()[:6] == [
        "{",
        ' "format": "variant-example-1",',
        ' "environment": {"cpu": "A", "caches": {"L2": "1024K"}},',
        ' "quick": false,',
        ' "cases": [',
        '  {"name": "one", "median": 0.3333333, "quartiles": [0.25, 6.666667e-08], '
        '"flop": 1152921504606846977},',
    ]
    assert json.loads(text) == {
        **RESULT,
        "cases": [
            {"name": "one", "median": 0.3333333, "quartiles": [0.25, 6.666667e-8],
             "flop": 2**60 + 1},
            {"name": "two", "contenders": {"cpu": {"median": 12345.68}}, "ours": True},
        ],
    }  # fmt: skip


def test_a_text_that_was_read_is_written_again_unchanged():
    assert result_text(json.loads(result_text(RESULT))) == result_text(RESULT)


def test_what_is_not_finite_is_text_that_float_reads():
    given = {"a": float("inf"), "b": [{"c": float("-inf"), "d": float("nan")}]}
    text = result_text(given)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"a": "Infinity", "b": [{"c": "-Infinity", "d": "NaN"}]}
    assert float(read["a"]) == given["a"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_result(path, RESULT)
    before = path.read_text()
    with pytest.raises(TypeError):
        write_result(path, {**RESULT, "note": object()})
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
