"""``variant convert CHECKPOINT``: the model folder of a training run's checkpoint."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from rank_jobs import Job
from safetensors.torch import load_file, save_file
from test_distributed import in_mode, train_on_two
from tiny_runs import assert_same, tiny_recipe, train_both

from variant import VARiant
from variant.cli.main import main
from variant.training.checkpoint_folder import read_into, stored_tensors
from variant.training.checkpoint_schedule import OutputSection
from variant.training.ema import EMASection

STEP, LAST = "var-step-00000002", "var-step-00000004"


def short_recipe(folders):
    """A recipe of four steps."""
    recipe = tiny_recipe(folders)
    schedule = dataclasses.replace(recipe.schedule, transition=1, refinement=0)
    return dataclasses.replace(recipe, schedule=schedule)


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """A folder with the run of one process and that of two, each with an average."""
    root, replace = tmp_path_factory.mktemp("runs"), dataclasses.replace
    recipe = replace(
        short_recipe(folders),
        ema=EMASection(0.5),
        output=OutputSection(checkpoint_steps=2, keep=2),
    )
    train_both(recipe, root / "one")
    ignored = shutil.ignore_patterns("var-*", "config*", "model*")
    shutil.copytree(root / "one", root / "two", ignore=ignored)
    results, _ = train_on_two([Job(in_mode(recipe, "fsdp2"), root / "two")], root / "jobs")
    assert results[0][0]["ended"] == "finished"
    return root


def convert(capsys, *words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["convert", *map(str, words)])
    return code, capsys.readouterr().err


def saved_weights(path, kind):
    """The weights ("module") or averages ("ema") in a checkpoint."""
    if path.is_file():
        return torch.load(path, weights_only=True)[kind]
    stored = stored_tensors(path)
    tensors = {
        name: torch.empty(value.shape, dtype=value.dtype)
        for name, value in stored.items()
        if name.startswith(f"{kind}.")
    }
    read_into(path, tensors)
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("source", "checkpoint"),
    [
        ("one", "one/var-last.pt"),
        ("one/var-last.pt", "one/var-last.pt"),
        (f"one/{STEP}.pt", f"one/{STEP}.pt"),
        ("two", f"two/{LAST}"),
        (f"two/{STEP}", f"two/{STEP}"),
    ],
)
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_checkpoint_becomes_a_model_folder(runs, tmp_path, capsys, source, checkpoint, weights):
    out = tmp_path / "model"
    assert convert(capsys, runs / source, "--weights", weights, "--out", out) == (0, "")
    model = VARiant.from_pretrained(str(out))
    kind = "ema" if weights == "ema" else "module"
    expected = dict(saved_weights(runs / checkpoint, kind))
    found = model.var.state_dict()
    assert_same({key: found[key] for key in expected}, expected)
    whole = saved_weights(runs / checkpoint, "module")
    assert found.keys() == whole.keys()
    trained = VARiant.from_pretrained(str(runs / source.split("/")[0]))
    assert model.var.config == trained.var.config
    assert model.var.config.class_names == ("class0", "class1")
    assert_same(dict(model.vae.state_dict()), dict(trained.vae.state_dict()))
    training = json.loads((out / "config.json").read_text())["training"]
    assert training["steps"] == (2 if STEP in checkpoint else 4)
    assert ("average" in training["weights"]) == (weights == "ema")
    assert model.generate(["class1"], seed=0, depth=2).images.shape == (1, 3, 8, 8)


def test_a_choice_that_was_not_made_is_a_warning(runs, tmp_path):
    with pytest.warns(UserWarning, match="took the weights; the checkpoint also has their moving"):
        assert main(["convert", str(runs / "one"), "--out", str(tmp_path / "model")]) == 0


def test_files_of_the_original_are_written_too(runs, tmp_path, capsys):
    files = [tmp_path / "var.pth", tmp_path / "vae.pth"]
    words = ("--weights", "ema", "--to-var", files[0], "--to-vae", files[1])
    assert convert(capsys, runs / "two", *words) == (0, "")
    averages = saved_weights(runs / "two" / LAST, "ema")
    state = torch.load(files[0], weights_only=True)
    assert_same({key: state[key] for key in averages}, averages)


def test_what_cannot_be_converted_is_one_line(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "one", run)
    shutil.copytree(runs / "two" / STEP, tmp_path / "moved")
    other = tmp_path / "other.safetensors"
    weights = load_file(run / "vae-best.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, other)
    (tmp_path / "empty").mkdir()
    last, out = run / "var-last.pt", tmp_path / "out"
    for words, message in (
        ((tmp_path / "none",), "none: no such checkpoint"),
        ((tmp_path / "empty",), "holds no checkpoint of a transformer: neither var-last.pt"),
        ((run / "vae-last.pt",), 'must be "variant-train-3" and "var"'),
        ((last, "--weights", "best"), 'the weights must be "model" or "ema"; got \'best\''),
        ((last, "--model", "digits"), "a checkpoint is read alone"),
        ((last, "--num-heads", "2"), "--num-heads is for --var and --vae; the checkpoint holds it"),
        ((last, "--vae", run / "var-best.safetensors"), "does not hold"),
        ((last, "--vae", other), "was trained with another VQ-VAE than"),
        ((tmp_path / "moved",), "holds no VQ-VAE; train one first"),
    ):
        code, error = convert(capsys, *words, "--out", out)
        assert code == 1, words
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    vae = run / "vae-best.safetensors"
    assert convert(capsys, tmp_path / "moved", "--vae", vae, "--out", out)[0] == 0
    data = bytearray(last.read_bytes())
    data[len(data) // 3] ^= 4
    last.write_bytes(data)
    code, error = convert(capsys, last, "--out", tmp_path / "damaged")
    assert (code, "var-last.pt: is damaged" in error) == (1, True)


def test_a_run_without_an_average_has_none(folders, tmp_path, capsys):
    train_both(short_recipe(folders), tmp_path / "run")
    words = (tmp_path / "run", "--weights", "ema", "--out", tmp_path / "out")
    code, error = convert(capsys, *words)
    assert (code, "has no moving average of the weights" in error) == (1, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
