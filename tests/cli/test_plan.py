"""``variant plan``."""

import json
import re
import subprocess
import sys

import pytest
from zone_models import KINDS, zone_model

from variant.cli.plan import unit_of
from variant.models.parameter_count import zone_parameters


def test_the_contracts_table(run):
    code, printed, _ = run("plan", "--model", "var-d30", "--batch", 64)
    assert code == 0
    numbers = [re.findall(r"[\d,.]+", line) for line in printed.splitlines() if "MiB │" in line]
    assert [[n[0], n[2], n[3]] for n in numbers] == [
        ["30", "19,125", "12,390"],
        ["16", "11,394", "6,720"],
        ["8", "6,977", "3,480"],
        ["4", "4,768", "1,860"],
        ["2", "3,664", "1,860"],
    ]
    # The last scales decide the peak: wider bridges at depths 16 and 8 cost no memory.
    assert "bridge 6: 8 at depth 16, 7 at depth 8, 6 at depth 4, 6 at depth 2." in printed
    code, printed, _ = run("plan", "--memory", 24)
    assert code == 0
    assert "yes" in printed


def test_marks_depths_that_do_not_fit(model, run):
    code, printed, _ = run("plan", "--model", "var-d30", "--batch", 512, "--memory", 48)
    assert code == 0
    assert re.search(r"│\s+30 │.*│\s+no │", printed)
    code, printed, _ = run("plan", "--model", model, "--batch", 1)
    assert code == 0
    assert "bridge 1" in printed


def test_no_cell_of_a_small_model_is_zero(model, run):
    for name in (model, "digits"):
        code, printed, _ = run("plan", "--model", name, "--batch", 1)
        assert code == 0
        cells = re.findall(r"│\s+([\d,.]+)(?: \w+)?(?= │)", printed)
        assert len(cells) > 20
        assert "0" not in cells


def test_the_unit_shows_two_digits_of_the_smallest_size():
    assert unit_of([0, 10 * 2**20, 2**40]) == (2**20, "MiB")
    assert unit_of([10 * 2**20 - 1, 2**40]) == (2**10, "KiB")
    assert unit_of([100, 2**40]) == (1, "bytes")
    assert unit_of([0]) == (1, "bytes")


def test_an_unknown_model_names_the_presets(run):
    code, _, error = run("plan", "--model", "foo")
    assert code == 1
    assert "foo: no such model" in error
    assert all(name in error for name in ("var-d16", "var-d36-512", "digits"))


def test_json_holds_the_table_and_nothing_else_is_printed(run, tmp_path):
    words = ("plan", "--model", "var-d30", "--batch", 64, "--memory", 48)
    code, printed, error = run(*words, "--json", "-")
    assert (code, error) == (0, "")
    plan = json.loads(printed)
    assert plan["format"] == "variant-plan-1"
    assert [row["depth"] for row in plan["depths"]] == [30, 16, 8, 4, 2]
    assert plan["depths"][0]["planned_bytes"] == 12390 * 2**20
    assert len(plan["bridges"]) == 5 * 11
    free = {row["depth"]: row["largest_free_bridge"] for row in plan["depths"]}
    assert free == {30: 10, 16: 8, 8: 7, 4: 6, 2: 6}
    sizes = {(row["depth"], row["bridge"]): row["planned_bytes"] for row in plan["bridges"]}
    for depth, bridge in free.items():
        assert sizes[depth, bridge] == sizes[depth, 6]
        assert bridge == 10 or sizes[depth, bridge + 1] > sizes[depth, 6]
    code, tables, _ = run(*words, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "12,390" in tables
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_does_not_import_torch():
    script = (
        "import sys; from variant.cli.main import main; "
        "code = main(['plan', '--model', 'digits', '--json', '-']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_training_of_d30_on_eight_gpus(run):
    words = ("plan", "--train", "--model", "var-d30", "--gpus", 8, "--memory", 80)
    code, printed, _ = run(*words)
    assert code == 0
    assert (
        'The fastest that fits 80 GiB: parallel.mode = "fsdp2", optim.accumulate = 4, '
        'memory.checkpointing = "none" (32 images at once' in " ".join(printed.split())
    )
    code, printed, _ = run(*words, "--json", "-")
    result = json.loads(printed)
    assert code == 0
    assert result["format"] == "variant-train-plan-1"
    assert result["batch"] == 1024
    assert len(result["rows"]) == 6
    assert result["fastest"] in result["rows"]
    assert result["fastest"]["total"] < 0.94 * result["memory_bytes"]


def test_a_training_plan_without_memory_lists_parts_and_one_that_fits_nothing_says_so(run):
    code, printed, _ = run("plan", "--train", "--model", "digits", "--batch", 16)
    assert code == 0
    assert "fastest" not in printed
    assert printed.count("single") == 9  # 1, 4 and 16 parts
    code, printed, _ = run("plan", "--train", "--model", "var-d30", "--memory", 24)
    assert code == 0
    assert "Nothing fits 24 GiB" in printed


def test_a_training_plan_of_a_small_model_is_in_mebibytes(run):
    words = ("plan", "--train", "--model", "digits", "--batch", 16, "--memory", 1)
    _, printed, _ = run(*words)
    row = next(line for line in printed.splitlines() if line.startswith("│single│     none│"))
    total = float(row.split("│")[13])
    assert 10 < total < 100
    assert f"16 images at once, {total:.0f} MiB)." in printed
    assert "\nMiB on each GPU." in printed
    _, printed, _ = run(*words, "--json", "-")
    fastest = json.loads(printed)["fastest"]
    assert fastest["total"] / 2**20 == pytest.approx(total, abs=0.06)


def test_gpus_must_divide_the_batch_and_need_train(run):
    code, _, error = run("plan", "--train", "--gpus", 3)
    assert code == 1
    assert "plan: --batch must be a multiple of --gpus (3); got 1024" in error
    code, _, error = run("plan", "--gpus", 2)
    assert code == 1
    assert "plan: --gpus needs --train" in error


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_plan_of_zone_weights_is_refused_by_name(kind, tmp_path, run):
    zone_model(kind).save_pretrained(tmp_path)
    code, printed, error = run("plan", "--train", "--model", tmp_path)
    assert code == 1
    assert not printed
    assert f'zone weights ("{KINDS[kind]["zone_weights"]}")' in error
    assert "plan: --train plans steps that train every weight" in error


def test_zone_weights_are_counted(tmp_path, run):
    model = zone_model("lora")
    model.save_pretrained(tmp_path)
    code, printed, _ = run("plan", "--model", tmp_path, "--batch", 1, "--json", tmp_path / "p.json")
    assert code == 0
    assert "are zone weights (lora). Merged with" in printed
    plan = json.loads((tmp_path / "p.json").read_text())
    counts = {d: zone_parameters(model.var.config, d) for d in (2, 3)}
    itemsize = 2  # bfloat16, the default
    assert plan["zone_weight_bytes"] == {str(d): itemsize * n for d, n in counts.items()}
    merged = {row["depth"]: row["merged_zone_bytes"] for row in plan["depths"]}
    assert merged == {4: 0, 3: 3 * 12 * 32**2 * itemsize, 2: 2 * 12 * 32**2 * itemsize}
    code, printed, _ = run("info", "--model", tmp_path)
    assert code == 0
    assert f"zone weights: lora of rank 3 and adaLN; parameters: depth 2: {counts[2]:,}" in printed


def test_the_plan_of_a_schedule(run, tmp_path):
    words = ("plan", "--model", "var-d30", "--batch", 64, "--json", tmp_path / "plan.json")
    code, printed, _ = run(*words, "--schedule", "30x6-16x4")
    assert code == 0
    assert "Schedule 30x6-16x4: 6,720 MiB of K/V, 59.0% of the paper's scheme, 54.2%" in printed
    values = json.loads((tmp_path / "plan.json").read_text())
    row = next(row for row in values["depths"] if row["depth"] == 16)
    assert values["schedule"]["planned_bytes"] == row["planned_bytes"]
    assert len(values["schedule"]["layers"]) == 10
    code, _, error = run(*words, "--schedule", "30x6-16x3")
    assert code == 1
    assert "30x6-16x3: must have one depth for each of the 10 scales" in error
    assert run(*words, "--schedule", "30x10", "--train")[0] == 1
