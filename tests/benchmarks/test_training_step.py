"""The training-step benchmark: its result file, and its errors of one line."""

import json

from benchmarks.training_step import main

SMALL = ("--model", "digits", "--batch", "2", "--device", "cpu", "--dtype", "float32")


def test_every_depth_takes_a_step_and_is_compared_with_full_depth(tmp_path, capsys):
    file = tmp_path / "steps.json"
    code = main([*SMALL, "--depths", "8", "2", "--bridge", "4", "--runs", "2", "--json", str(file)])
    assert code == 0
    written = json.loads(file.read_text())
    full, subnet = written["steps"]
    assert [full["implementation"], subnet["implementation"]] == ["depth 8", "depth 2"]
    assert full["ratio_to_peer"] == 1
    assert subnet["loss"] != full["loss"] > 0
    assert subnet["quartiles"][0] <= subnet["median"] <= subnet["quartiles"][1]
    assert subnet["rounds"] == 2
    assert full["speed_up"] == full["ceiling"] == 1
    assert subnet["ceiling"] > 1
    printed = capsys.readouterr()
    share = subnet["speed_up"] / subnet["ceiling"]
    assert f"{share:.0%} of {subnet['ceiling']:.2f} by products" in printed.out.splitlines()[1]
    assert printed.err.startswith("building digits")
    assert [path.name for path in tmp_path.iterdir()] == ["steps.json"]


def test_a_depth_that_the_model_lacks_is_one_line(tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert main([*SMALL, "--depths", "9", "--bridge", "4", "--json", str(file)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("benchmarks.training_step: --depths 9: ")
    assert not file.exists()
