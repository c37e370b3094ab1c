"""``variant info``."""

import json


def test_describes_a_model(model, run):
    code, printed, _ = run("info", "--model", model)
    assert code == 0
    assert "4 layers, width 32, 2 heads, 5 classes; 3 scales (1, 2, 3), 14 tokens" in printed
    assert "[0, 2, 3]" in printed


def test_json_holds_the_description_and_nothing_else_is_printed(model, run):
    code, printed, error = run("info", "--model", model, "--json", "-", "--kv-dtype", "fp8")
    assert code == 0
    assert error == f"info: reading {model}\n"
    described = json.loads(printed)
    assert described["tokens"] == 14
    assert described["var"]["depth"] == 4
    assert [row["layers"] for row in described["depths"]] == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]
    assert [error["depth"] for error in described["kv_error"]] == [4, 3, 2]


def test_a_folder_without_a_model_does_not_hide_a_packaged_one(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert run("info", "--model", "digits")[0] == 0
