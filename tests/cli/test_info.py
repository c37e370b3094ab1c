"""``variant info``."""

import json
import shutil

import pytest


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


@pytest.mark.parametrize(
    ("training", "printed"),
    [
        ({"held_out": {"full": 3.5, "depth_2": 4}}, "training held_out: full 3.5000, depth_2 4\n"),
        ({"held_out": {"full": None, "x": "y"}}, "training held_out: full None, x y\n"),
        ({"held_out": {"full": {"by scale": [1, 2]}}}, "training held_out: full by scale [1, 2]\n"),
        ({"held_out": {"full": 10**400}}, f"training held_out: full 1{'0' * 400}\n"),
        ({"note": "\x1b[31mred\x07\nline"}, "training note: \\x1b[31mred\\x07 line\n"),
        ([1, 2], ""),
        ("text", ""),
    ],
    ids=["numbers", "none", "nested", "large", "escapes", "list", "text"],
)  # fmt: skip
def test_the_record_of_a_training_may_hold_any_values(training, printed, model, tmp_path, run):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "training": training}))
    code, text, error = run("info", "--model", folder)
    assert (code, error) == (0, "")
    assert "".join(text.partition("training ")[1:]) == printed
    # The model card lists them too.
    assert run("convert", "--model", folder, "--out", tmp_path / "copy")[0] == 0
