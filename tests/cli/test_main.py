"""The command line: printed text, written files, and errors for bad input."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import load_golden
from PIL import Image
from small_models import small_model

import variant
from variant.cli.main import main
from variant.cli.options import TrainVae
from variant.cli.train import folder_of, resume_command


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    return str(folder)


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_writes_a_grid_of_every_depth_and_prints_the_table(model, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    code, printed, _ = run(
        capsys, "generate", "--model", model, "--labels", 0, 3, 4, "--all-depths", "--out", out
    )
    assert code == 0
    sheet = Image.open(out)
    step = 66 + 4  # 6 pixels enlarged elevenfold, and the gap
    assert sheet.size == (56 + 3 * step + 4, 3 * step + 4)
    rows = re.findall(
        r"│\s+(\d)\s+│\s+([\d.]+)\s+│\s+[\d.]+\s+│\s+(\d+) KiB │\s+(\d+) KiB", printed
    )
    assert [row[0] for row in rows] == ["4", "3", "2"]
    assert all(planned == allocated for _, _, planned, allocated in rows)
    assert "ms per image" in printed


def test_generate_writes_one_file_per_image_the_same_for_the_same_seed(model, tmp_path, capsys):
    for name in ("a", "b"):
        code, printed, _ = run(
            capsys, "generate", "--model", model, "--labels", 2, 1, "--count", 2,
            "--depth", 2, "--seed", 5, "--top-k", 9, "--out", tmp_path / name,
        )  # fmt: skip
        assert code == 0
        assert f"wrote 4 images to {tmp_path / name}" in printed
    files = sorted((tmp_path / "a").iterdir())
    assert [f.name for f in files] == [
        "00000_class2.png", "00001_class2.png", "00002_class1.png", "00003_class1.png",
    ]  # fmt: skip
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    images = small_model().generate([2, 2, 1, 1], depth=2, seed=5, top_k=9, top_p=0.96).images
    pixels = torch.from_numpy(np.array(Image.open(files[3]))).long().permute(2, 0, 1)
    assert torch.equal(pixels, (images[3] * 255).round().long())


def test_plan_prints_the_contracts_table(capsys):
    code, printed, _ = run(capsys, "plan", "--model", "var-d30", "--batch", 64)
    assert code == 0
    numbers = [re.findall(r"[\d,.]+", line) for line in printed.splitlines() if "MiB │" in line]
    assert [[n[0], n[2], n[3]] for n in numbers] == [
        ["30", "19,125", "12,390"],
        ["16", "11,394", "6,720"],
        ["8", "6,977", "3,480"],
        ["4", "4,768", "1,860"],
        ["2", "3,664", "1,860"],
    ]
    code, printed, _ = run(capsys, "plan", "--memory", 24)
    assert code == 0
    assert "yes" in printed


def test_plan_marks_depths_that_do_not_fit(model, capsys):
    code, printed, _ = run(capsys, "plan", "--model", "var-d30", "--batch", 512, "--memory", 48)
    assert code == 0
    assert re.search(r"│\s+30 │.*│\s+no │", printed)
    code, printed, _ = run(capsys, "plan", "--model", model, "--batch", 1)
    assert code == 0
    assert "bridge 1" in printed


def test_info_describes_a_model(model, capsys):
    code, printed, _ = run(capsys, "info", "--model", model)
    assert code == 0
    assert "4 layers, width 32, 2 heads, 5 classes; 3 scales (1, 2, 3), 14 tokens" in printed
    assert "[0, 2, 3]" in printed


def test_convert_works_in_both_directions(tmp_path, capsys):
    golden = load_golden("shared_aln")
    var, vae, folder = tmp_path / "var.pth", tmp_path / "vae.pth", tmp_path / "folder"
    torch.save(golden.var_state, var)
    torch.save(golden.vae_state, vae)
    assert run(capsys, "convert", "--var", var, "--vae", vae, "--out", folder)[0] == 0
    back = tmp_path / "var2.pth", tmp_path / "vae2.pth"
    code, printed, _ = run(
        capsys, "convert", "--model", folder, "--to-var", back[0], "--to-vae", back[1]
    )
    assert code == 0
    assert "which the original VAR code loads" in printed
    for path, state in zip(back, (golden.var_state, golden.vae_state), strict=True):
        written = torch.load(path, weights_only=True)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)


def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    command = ("generate", "--model", model, "--out", out)
    for words, message in (
        ((*command, "--labels", 5), r"labels must be in \[0, 5\); got 5"),
        ((*command, "--depth", 9), r"depth must be an integer in \[2, 4\] .*; got 9"),
        ((*command, "--depth", 2, "--bridge", 7), r"bridge must be an integer in \[0, 3\]; got 7"),
        ((*command, "--count", 0), "--count must be at least 1; got 0"),
        ((*command, "--cfg", -1), r"cfg must be in \[0, 10000\]"),
        ((*command, "--bridge", 99), r"bridge must be an integer in \[0, 3\]; got 99"),
        (("plan", "--memory", "nan"), "--memory must be positive and finite"),
        (
            ("convert", "--model", model, "--to-var", "x.pth", "--to-vae", "x.pth"),
            "must be two files",
        ),
        ((*command, "--top-p", 2), r"top_p must be in \[0, 1\]"),
        ((*command, "--depth", 2, "--all-depths"), "exclude each other"),
        (("generate", "--model", tmp_path / "none"), "none: no such model"),
        (("generate", "--model", model, "--out", tmp_path / "x.jpg"), "folder or end in .png"),
        (("generate", "--model", model, "--out", tmp_path / "file" / "x"), "cannot be written"),
        (("generate", "--model", model, "--out", ""), "must name a folder"),
        (("plan", "--model", "var-d31"), "var-d31: no such model"),
        (("plan", "--batch", 0), "--batch must be at least 1"),
        (("plan", "--bridge", 11), r"bridge must be an integer in \[0, 10\]; got 11"),
        (("plan", "--page-size", 0), "page_size must be an integer"),
        (("info", "--model", tmp_path), "has no config.json"),
        (("convert", "--var", "a", "--vae", "b"), "give --out FOLDER, or --to-var and --to-vae"),
        (("train", "--recipe", "nonsense"), "nonsense: no such recipe"),
    ):
        code, printed, error = run(capsys, *words)
        assert code == 1, words
        assert re.search(message, error), (words, error)
        assert error.startswith("variant: error: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error + printed
    assert not out.exists()


def test_file_names_may_contain_brackets_and_dots(model, tmp_path, capsys):
    (tmp_path / "out.v2").mkdir()
    for name in ("o[red]y", "o[/x]", "out.v2"):
        code, printed, _ = run(
            capsys, "generate", "--model", model, "--labels", 1, "--out", tmp_path / name
        )
        assert code == 0
        assert f"wrote 1 images to {tmp_path / name}" in printed
        assert len(list((tmp_path / name).iterdir())) == 1


def test_a_folder_without_a_model_does_not_hide_a_packaged_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert run(capsys, "info", "--model", "digits")[0] == 0


def test_debug_shows_the_traceback(model, capsys):
    code, _, error = run(capsys, "generate", "--model", model, "--labels", 5, "--debug")
    assert code == 1
    assert "Traceback" in error


def test_too_little_memory_is_one_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("variant.engine.engine.free_bytes", lambda device: 10)
    code, _, error = run(capsys, "generate", "--model", model, "--out", tmp_path / "out")
    assert code == 1
    assert "are free; use a smaller depth" in error


@pytest.mark.parametrize("command", ["generate", "plan", "train", "train-vae", "convert", "info"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: variant {command}" in capsys.readouterr().out


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--colour", "red"])
    assert stop.value.code == 2


def test_help_does_not_import_torch():
    script = "import sys; import variant.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_version_is_printed(capsys):
    for word in ("--version", "-V"):
        assert run(capsys, word)[:2] == (0, f"variant {variant.__version__}\n")


def test_all_public_names_can_be_imported():
    assert all(getattr(variant, name).__name__ == name for name in variant.__all__)
    assert set(variant.__all__) <= set(dir(variant))


def test_a_stopped_run_prints_the_command_that_resumes_it():
    command = TrainVae(recipe="my recipes/tiny.toml", seed=3)
    assert folder_of(command) == Path("runs/tiny")
    assert resume_command("train-vae", command) == (
        "variant train-vae --recipe 'my recipes/tiny.toml' --out runs/tiny --seed 3 --resume"
    )
