"""What a command may write: never over a file of another kind, never two results over one file."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from variant.cli import bench, evaluate, evaluate_depths, search_record
from variant.cli.generate import check_target
from variant.cli.options import Eval, Search
from variant.cli.output import RESULT, check_json, console, table
from variant.cli.pyplot import pyplot
from variant.errors import UserError
from variant.files import save_safetensors


def contents(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "notes.json"])
@pytest.mark.parametrize(
    "words",
    [
        ("info",),
        ("plan",),
        ("plan", "--train"),
        ("generate", "--out", "o.png"),
        ("sample", "--num", 1),
        ("eval", "--reference", "digits", "--features", "classifier:digits"),
        ("search", "--data", "digits"),
        ("bench", "--runs", 1),
        ("warm", "--device", "cpu"),
    ],
    ids=lambda words: "-".join(map(str, words[:2])),
)
def test_json_replaces_no_other_file(words, name, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "notes.json").write_text('{"format": "mine"}')
    before = contents(tmp_path)
    code, _, error = run(*words, "--model", "model", "--json", f"model/{name}")
    assert code == 1
    assert f"{words[0]}: --json must name a new file or one that --json wrote" in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ("info",),
        ("plan",),
        ("plan", "--train"),
        ("generate", "--labels", 1, "--out", "o.png", "--overwrite"),
        ("sample", "--num", 2, "--labels", 1, "--out", "s"),
        ("sample", "--num", 2, "--labels", 1, "--out", "s.npz"),
        ("warm", "--device", "cpu"),
    ],
    ids=lambda words: "-".join(map(str, words[:2])),
)
def test_json_replaces_its_own_results_and_empty_files(words, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("result.json").touch()
    for _ in range(2):
        assert run(*words, "--model", model, "--json", "result.json")[0] == 0
        assert json.loads(Path("result.json").read_text())["format"].startswith("variant-")
    check_json("plan", Path("result.json"))


def test_formats_of_slow_commands_are_those_of_results():
    for name in (bench.FORMAT, evaluate.FORMAT, evaluate_depths.FORMAT, search_record.FORMAT):
        assert RESULT.match(f'{{\n "format": "{name}",'.encode())
    for name in ("variant-1", "variant-schedule-1", "variant-generate-1", "variant-sample-1"):
        assert not RESULT.match(f'{{\n "format": "{name}",'.encode())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--out", "s.npz", "--json", "s.npz"), "--json and --out must differ"),
        (("sample", "--out", "s.npz", "--json", "s.json"), "--json and the .json beside --out"),
        (("sample", "--out", "s", "--json", "s"), "--json and --out must differ"),
        (("sample", "--out", "s", "--json", "x/../s/sample.json"), "no file that --out writes"),
        (("sample", "--out", "s", "--json", "s/000001_class-1.png"), "no file that --out writes"),
        (("sample", "--out", "s", "--json", "s/part-00000.tar"), "no file that --out writes"),
        (("search", "--data", "digits", "--out", "s", "--json", "s/losses-1.safetensors"),
         "no file that --out writes"),
        (("search", "--data", "digits", "--out", "s", "--plot", "s/search.json"),
         "--plot must be no file that --out writes"),
        (("search", "--data", "digits", "--plot", "a.png", "--json", "./a.png"), "must differ"),
        (("eval", "--reference", "digits", "--plot", "a.png", "--json", "./a.png"), "must differ"),
        (("eval", "--reference", "digits", "--features", "classifier:digits",
          "--weights", "c.safetensors", "--json", "c.json"), "the classifier's record must differ"),
        (("eval", "--reference", "digits", "--features", "classifier:digits",
          "--json", "runs/digits/classifier.json"), "the classifier's record must differ"),
    ],
)  # fmt: skip
def test_one_file_is_not_written_twice(words, message, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(*words, "--model", model)
    assert code == 1
    assert message in error, error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--model", "{model}", "--labels", 1),
        ("search", "--model", "{model}", "--data", "digits"),
        ("eval", "--model", "{model}", "--reference", "digits"),
        ("tokenize", "--data.copies", 0, "--vae-training.weights", "digits"),
        ("train", "--recipe", "digits"),
        ("train-vae", "--recipe", "digits"),
    ],
    ids=lambda words: words[0],
)
def test_out_is_no_folder_of_something_else(words, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_text("weights of a user")
    Path("folder/z.json").write_text('{\n "format": "variant-generated-1"')  # of --json
    words = [str(word).format(model=model) for word in words]
    before = contents(tmp_path)
    code, _, error = run(*words, "--out", "folder")
    assert code == 1
    assert "folder" in error
    assert "model.safetensors" in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_images_go_beside_results_and_hidden_files_and_images(tmp_path):
    for name, text in ((".x", ""), ("r.json", '{\n "format": "variant-generated-1"'), ("b", None)):
        folder = tmp_path / (name + "_")
        folder.mkdir()
        if text is None:
            (folder / "00000_class1.png").touch()
            (folder / "notes.txt").touch()
        else:
            (folder / name).write_text(text)
        assert not check_target(folder)


def test_a_comparison_does_not_replace_what_it_compares(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        text = f'{{\n "format": "{evaluate.FORMAT}",\n "metrics": []\n}}\n'
        Path(f"{name}.json").write_text(text)
    before = contents(tmp_path)
    code, _, error = run("eval", "--compare", "a.json", "b.json", "--json", "./a.json")
    assert code == 1
    assert "eval: --json and --compare a.json must differ" in error
    assert contents(tmp_path) == before


def test_sample_replaces_no_file_beside_its_npz(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text("{}")
    before = contents(tmp_path)
    code, _, error = run("sample", "--model", model, "--num", 2, "--out", "s.npz")
    assert code == 1
    assert 's.json: its "format" must be' in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("ending", ["", ".docx", ".json"])
@pytest.mark.parametrize("kind", [Search, Eval])
def test_the_ending_of_a_plot_is_checked_before_the_work(
    kind, ending, model, tmp_path, run, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    command = kind.__name__.lower()
    source = ("--data" if kind is Search else "--reference", "digits")
    code, _, error = run(command, "--model", model, *source, "--plot", f"p{ending}")
    assert code == 1
    assert f"{command}: --plot must end in .png, .pdf, .svg; got p{ending}" in error
    assert not any(tmp_path.iterdir())


def test_a_plot_is_written_whole_or_not_at_all(tmp_path):
    pytest.importorskip("matplotlib")
    from variant.cli.pyplot import save_plot

    plt = pyplot("eval")
    path = tmp_path / "p.PNG"
    path.write_text("before")

    class Failing:
        def savefig(self, target, **options):
            Path(target).write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save_plot(plt, Failing(), path)
    assert path.read_text() == "before"
    save_plot(plt, plt.figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["p.PNG"]


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_a_plot_replaces_no_other_file(tmp_path, ending):
    pytest.importorskip("matplotlib")
    from variant.cli.pyplot import check_plot, save_plot

    plt, path = pyplot("eval"), tmp_path / f"p{ending}"
    plt.figure().savefig(path)  # of another program
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"eval: --plot must name a new file .*p{ending} holds"):
        check_plot("eval", path)
    assert path.read_bytes() == before
    save_plot(plt, plt.figure(), path)
    check_plot("eval", path)  # its own


def test_convert_writes_nothing_if_one_output_cannot_be_written(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for words in (
        ("--to-var", "a.pth", "--to-vae", "file/b.pth"),
        ("--to-var", "a.pth", "--to-vae", "/dev/b.pth"),
        ("--to-var", "a.pth", "--to-vae", "b.pth", "--out", "file/model"),
    ):
        code, _, error = run("convert", "--model", model, *words)
        assert code == 1
        assert "cannot be written" in error
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_of_files_are_printed_as_they_are(model, tmp_path, run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # rich prints an emoji for :b: and :x:.
    _, printed, _ = run("generate", "--model", model, "--labels", 1, "--out", "a:b:c")
    assert printed.startswith(f"generate: {model}, ")
    assert "to a:b:c\n" in printed
    console().print("a:x:b [red]c")
    assert capsys.readouterr().out == "a:x:b [red]c\n"


def test_a_converted_model_replaces_outputs_only_when_asked(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("convert", "--model", model, "--to-var", "v.pth", "--to-vae", "q.pth")
    assert run(*words)[0] == 0
    code, _, error = run(*words)
    assert code == 1
    assert "--overwrite replaces it" in error
    assert run(*words, "--overwrite")[0] == 0
    assert torch.load("v.pth", weights_only=True)


@pytest.mark.parametrize("width", [10, 40, 62, 65, 80])
def test_a_narrow_terminal_cuts_no_number_of_a_table(width, capsys):
    rows = table("digits", "depth", "ms per image", "K/V planned", "K/V allocated", "of paper's")
    cells = "8x4-4-2", "1,234.56", "12,345.67", "704", "67.7%"
    rows.add_row(*cells)
    out = console()
    out.width = width
    out.print(rows)
    printed = capsys.readouterr().out
    assert [cell for cell in cells if f" {cell} " not in printed] == []
    assert "allocated" in printed
    assert out.width == width


def test_a_wide_terminal_changes_no_table(capsys):
    rows = table("digits", "depth", "ms per image")
    rows.add_row("8", "1.00")
    console().print(rows)
    assert len(max(capsys.readouterr().out.splitlines(), key=len)) == len(
        "┏━━━━━━━┳━━━━━━━━━━━━━━┓"
    )


def test_outputs_of_a_conversion_are_not_in_each_other(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ("--out", "a.pth", "--to-var", "a.pth", "--to-vae", "b.pth"),
        ("--out", "a.pth/model", "--to-var", "b.pth", "--to-vae", "./a.pth"),
        ("--to-var", "a.pth", "--to-vae", "a.pth/b.pth"),
    ):
        code, _, error = run("convert", "--model", model, *words)
        assert code == 1
        assert "a.pth is a folder of --" in error
        assert list(tmp_path.iterdir()) == []


def test_no_text_of_a_file_drives_the_terminal(capsys):
    rows = table("title \x1b[1m", "column")
    rows.add_row("cell \x1b]0;\x07")
    console().print("line \x1b[31m\r\nnext \u202e é 数")
    console().print(rows)
    printed = capsys.readouterr().out
    assert printed.startswith("line \\x1b[31m\\r\nnext \\u202e é 数\ntitle \\x1b[1m\n")
    assert "cell \\x1b]0;\\x07" in printed
    assert "\x1b" not in printed


def test_a_name_is_refused_if_its_temporary_file_would_be_too_long(tmp_path):
    longest = 0
    for length in range(200, 256):
        path = tmp_path / ("n" * length)
        with suppress(UserError):
            check_json("plan", path)
            save_safetensors(path, {})  # what takes most
            longest = length
    assert longest == 255 - 24
    with pytest.raises(UserError, match="File name too long"):
        check_json("plan", tmp_path / ("n" * (longest + 1)))


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--out", "x.png"),
        ("sample", "--num", 1, "--out", "x"),
        ("eval", "--reconstruct", "digits", "--reference", "digits"),
        ("search", "--out", "x"),
        ("warm",),
    ],
    ids=lambda words: words[0],
)
def test_a_device_without_values_is_refused_by_the_option(words, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(*words, "--device", "meta")
    assert code == 1
    assert error == (
        f'variant: error: {words[0]}: --device "meta" cannot be used: it holds no values; give '
        '"cpu"\n'
    )
    assert list(tmp_path.iterdir()) == []
