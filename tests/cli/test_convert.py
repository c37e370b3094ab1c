"""``variant convert``: what it writes, and what it never overwrites."""

import hashlib
import os
import re
import shutil
import warnings

import pytest
import torch
from golden_models import load_golden
from safetensors.torch import load_file
from small_models import small_model

from variant import VARiant
from variant.cli.main import main
from variant.cli.messages import one_line_warnings
from variant.cli.options import Convert

pytestmark = pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with the files of an original model and a model folder."""
    golden = load_golden("plain")
    torch.save(golden.var_state, tmp_path / "var.pth")
    torch.save(golden.vae_state, tmp_path / "vae.pth")
    small_model().save_pretrained(tmp_path / "model", {"training": {"recipe": "r"}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    code = main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def digests(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


FILES = ("--var", "var.pth", "--vae", "vae.pth")
MODEL = ("--model", "model")


def refused(capsys, place, message, *words):
    before = digests(place)
    code, printed, error = run(capsys, *words)
    assert code == 1, (words, printed)
    assert re.search(message, error), (words, error)
    assert error.startswith("variant: error: ")
    assert error.count("\n") == 1
    assert digests(place) == before, "nothing was written"


def test_the_command_that_destroyed_its_inputs_writes_nothing(place, capsys):
    refused(capsys, place, "give --var and --vae, or --model, to read", *MODEL, *FILES)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_an_input_is_never_overwritten(place, capsys, overwrite, link):
    var, model = "var.pth", "model"
    if link is not None:
        link("var.pth", "link.pth")
        var, model = "link.pth", "linked"
        os.symlink("model", "linked")
    message = "would overwrite the input"
    for words in (
        (*FILES, "--to-var", var, "--to-vae", "new.pth"),
        (*FILES, "--to-var", "new.pth", "--to-vae", place / "." / "vae.pth"),
        ("--var", var, "--vae", "vae.pth", "--to-var", "var.pth", "--to-vae", "new.pth"),
        (*MODEL, "--out", model),
        ("--model", model, "--out", "model"),
        (*MODEL, "--to-var", "model/model.safetensors", "--to-vae", "new.pth"),
    ):
        refused(capsys, place, message, *words, *overwrite)
    shutil.copytree("model", "hub")
    os.rename("var.pth", "hub/pytorch_model.bin")
    os.remove("hub/model.safetensors")
    with open("hub/config.json", "w") as file:
        file.write("{}")
    hub = ("--var", "hub", "--vae", "vae.pth")
    refused(capsys, place, message, *hub, "--out", "hub", *overwrite)


def test_existing_files_need_overwrite(place, capsys):
    (place / "old.pth").write_text("precious")
    (place / "old.safetensors").write_text("precious")
    shutil.copytree("model", "other")
    message = "exists; --overwrite replaces it"
    refused(capsys, place, message, *FILES, "--out", "other")
    refused(capsys, place, message, *MODEL, "--to-var", "old.pth", "--to-vae", "new.pth")
    refused(capsys, place, message, *MODEL, "--to-var", "new.pth", "--to-vae", "old.safetensors")
    assert run(capsys, *FILES, "--out", "other", "--overwrite")[0] == 0
    assert VARiant.from_pretrained("other").var.config.depth == 6
    words = (*MODEL, "--to-var", "old.pth", "--to-vae", "old.safetensors", "--overwrite")
    assert run(capsys, *words)[0] == 0
    assert torch.load("old.pth", weights_only=True)["head.bias"].shape == (24,)
    assert "quant_conv.bias" in load_file("old.safetensors")


def test_what_is_no_file_of_weights_is_refused(place, capsys):
    (place / "settings.json").write_text("{}")
    (place / "folder.pth").mkdir()
    endings = r"must end in \.pth, \.pt, \.safetensors"
    for overwrite in ((), ("--overwrite",)):
        for name in ("settings.json", "model/config.json", "x", "x.bin", "x.PTH"):
            to = ("--to-var", name, "--to-vae", "new.pth")
            refused(capsys, place, endings, *MODEL, *to, *overwrite)
        to = ("--to-var", "folder.pth", "--to-vae", "new.pth")
        refused(capsys, place, "folder.pth is a folder", *MODEL, *to, *overwrite)
        out = ("--out", "settings.json")
        refused(
            capsys, place, "must be a folder; settings.json is a file", *FILES, *out, *overwrite
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --var and --vae, or --model"),
        (("--var", "var.pth", "--out", "x"), "give --var and --vae, or --model"),
        (("--vae", "vae.pth", "--out", "x"), "give --var and --vae, or --model"),
        (FILES, "give --out FOLDER, or --to-var and --to-vae, to write"),
        (MODEL, "give --out FOLDER, or --to-var and --to-vae, to write"),
        ((*MODEL, "--to-var", "x.pth"), "--to-var and --to-vae go together"),
        ((*MODEL, "--to-vae", "x.pth"), "--to-var and --to-vae go together"),
        ((*MODEL, "--to-var", "x.pth", "--to-vae", "./x.pth"), "must be two files"),
        (
            (*MODEL, "--out", "x", "--to-var", "x/model.safetensors", "--to-vae", "y.pth"),
            "--out writes x/model.safetensors too",
        ),
        ((*MODEL, "--out", "x", "--norm-eps", "1e-5"), "--norm-eps is for --var and --vae"),
        ((*MODEL, "--out", "x", "--weights", "ema"), "--weights is for --var and --vae"),
        ((*FILES, "--out", "x", "--num-heads", "3"), "have num_heads 2, but --num-heads has 3"),
        ((*FILES, "--out", "x", "--norm-eps", "-1"), "convert: --norm-eps must be a finite number"),
        ((*FILES, "--out", "x", "--weights", "ema"), "has no average"),
        (("--var", "none.pth", "--vae", "vae.pth", "--out", "x"), "none.pth: no such file"),
        (("--model", "none", "--out", "x"), "none: no such model"),
        ((*FILES, "--out", "var.pth/x"), "cannot be written"),
    ],
)
def test_bad_requests_are_one_line(place, capsys, words, message):
    refused(capsys, place, re.escape(message), *words)


@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors"])
def test_the_ending_chooses_the_format_and_the_files_are_read_again(place, capsys, ending):
    to = ("--to-var", f"new/var.{ending}", "--to-vae", f"new/vae.{ending}")
    code, printed, _ = run(capsys, *FILES, *to)
    assert code == 0
    assert f"wrote new/var.{ending} and new/vae.{ending}" in printed
    again = ("--var", f"new/var.{ending}", "--vae", f"new/vae.{ending}")
    assert run(capsys, *again, "--out", "again")[0] == 0
    for name, state in (
        ("var", load_golden("plain").var_state),
        ("vae", load_golden("plain").vae_state),
    ):
        path = place / "new" / f"{name}.{ending}"
        assert (path.read_bytes()[:2] == b"PK") == (ending != "safetensors")
        written = (
            load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)
        )
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)
    model = VARiant.from_pretrained("again")
    for key, value in model.var.state_dict().items():
        assert torch.equal(value, load_golden("plain").var_state[key])


def test_settings_and_the_choice_of_weights_are_options(place, capsys):
    state = load_golden("plain").var_state
    average = state | {"head.bias": state["head.bias"] + 1}
    torch.save({"model": state, "ema": average}, "var.pth")
    texts = {
        "weights": "ema",
        "num-heads": "2",
        "norm-eps": "1e-5",
        "cond-drop-rate": "0.2",
        "drop-path-rate": "0.3",
        "quant-resi": "0.25",
        "using-znorm": "True",
        "beta": "2",
        "patch-nums": "1 2 3 4 5 6 8",
    }
    options = [word for name, text in texts.items() for word in (f"--{name}", *text.split())]
    assert run(capsys, *FILES, "--out", "new", *options)[0] == 0
    model = VARiant.from_pretrained("new")
    assert torch.equal(model.var.head.bias, average["head.bias"])
    config = model.var.config
    assert (config.norm_eps, config.cond_drop_rate, config.drop_path_rate) == (1e-5, 0.2, 0.3)
    config = model.vae.config
    assert (config.quant_resi, config.using_znorm, config.beta) == (0.25, True, 2)


def test_the_warning_names_the_options(place, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with one_line_warnings("convert"):
            code, _, error = run(capsys, *FILES, "--out", "new")
    assert code == 0
    (line,) = [line for line in error.splitlines() if "assumed" in line]
    assert re.search("give --norm-eps, .*--beta if they are wrong", line)
    # As the options are given.
    assert "assumed --norm-eps 1e-06, --cond-drop-rate 0.1, " in line
    assert "--using-znorm False, --beta 0.25, " in line


def test_a_model_folder_can_be_written_in_another_dtype(place, capsys):
    assert run(capsys, *MODEL, "--dtype", "bfloat16", "--out", "half")[0] == 0
    model = VARiant.from_pretrained("half")
    assert model.var.head.weight.dtype == torch.bfloat16
    assert model.extra == {"training": {"recipe": "r"}}
    assert model.var.config == VARiant.from_pretrained("model").var.config


def test_a_readme_of_the_user_is_kept(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "README.md").write_text("my words")
    assert run(capsys, *FILES, "--out", "mine")[0] == 0
    assert (place / "mine" / "README.md").read_text() == "my words"


def test_names_that_are_no_text_and_odd_files_in_the_folder(place, capsys):
    for out in ("out\udcff", "pipe", "folder"):
        (place / out).mkdir()
    os.mkfifo(place / "pipe" / "README.md")
    (place / "folder" / "README.md").mkdir()
    (place / "loop.pth").symlink_to("loop.pth")
    refused(capsys, place, "README.md is a folder", *MODEL, "--out", "folder")
    VARiant.from_pretrained("model").save_pretrained("out\udcff")
    assert run(capsys, *MODEL, "--out", "pipe")[0] == 0
    for out in ("out\udcff", "pipe"):
        assert same_weights(place / out, place / "model")
    assert (place / "pipe" / "README.md").is_fifo(), "what is not ours is kept"
    assert run(capsys, *MODEL, "--to-var", "loop.pth", "--to-vae", "vae2.pth")[0] == 0
    assert (place / "loop.pth").is_file()


def same_weights(one, other):
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_examples_of_the_help_can_be_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    golden = load_golden("plain")
    torch.save(golden.var_state, "var_d16.pth")
    torch.save(golden.vae_state, "vae_ch160v4096z32.pth")
    before = digests(tmp_path)
    text = " ".join(Convert.__doc__.split())
    examples = re.findall(r"Example: variant convert (.*?)(?= Example:|$)", text)
    assert len(examples) == 2
    for example in examples:
        assert run(capsys, *example.split())[0] == 0, example
    after = digests(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {"exported/var.pth", "exported/vae.pth", "models/var-d16/config.json"} <= after.keys()
