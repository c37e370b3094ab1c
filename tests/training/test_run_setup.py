"""Set-up of runs: refused folders and settings, and the conditions of resuming."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import open_recipe_data
from tiny_runs import CPU, OPTIM, quiet, resume, rewrite, run_until, train_both, with_precision

from variant.data.sources import data_inputs
from variant.errors import UserError
from variant.training.recipe import load_recipe
from variant.training.run_setup import resume_hint
from variant.training.vae_task import train_vae
from variant.training.var_task import VARTask, train_var


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe, tmp_path):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)


def test_a_model_folder_without_a_run_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for train in (train_vae, train_var):
        with pytest.raises(UserError, match=r"holds a model .config.json. but no training run"):
            train(recipe, tmp_path, console=quiet(), device=CPU)


def test_an_output_that_cannot_be_written_is_one_line(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train_vae(recipe, tmp_path / "file" / "run", console=quiet(), device=CPU)


def test_fp16_without_a_gpu_is_refused(recipe, tmp_path):
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match='precision "fp16" needs a GPU'):
        train_var(with_precision(recipe, "fp16"), tmp_path, console=quiet(), device=CPU)


def test_a_batch_larger_than_the_data_is_refused(recipe, tmp_path):
    optim = dataclasses.replace(OPTIM, batch_size=64)
    with pytest.raises(UserError, match=r"batch_size must be at most .* \(24\); got 64"):
        train_vae(
            dataclasses.replace(
                recipe, vae_training=dataclasses.replace(recipe.vae_training, optim=optim)
            ),
            tmp_path,
            console=quiet(),
            device=CPU,
        )


def test_missing_and_broken_image_folders_are_one_line(recipe, tmp_path):
    def run(**changes):
        section = dataclasses.replace(recipe.data, **changes)
        train_vae(
            dataclasses.replace(recipe, data=section), tmp_path / "o", console=quiet(), device=CPU
        )

    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        run(train=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="one sub-folder of images per class; it has none"):
        run(train=str(tmp_path / "empty"))
    (tmp_path / "bad" / "class0").mkdir(parents=True)
    (tmp_path / "bad" / "class0" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"must have the classes of .*class1"):
        run(held_out=str(tmp_path / "bad"))
    (tmp_path / "bad" / "class1").mkdir()
    (tmp_path / "bad" / "class1" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x.png: is not a readable image"):
        run(held_out=str(tmp_path / "bad"))


def test_runs_are_refused_before_weights_are_read_and_copies_encoded(recipe, tmp_path, monkeypatch):
    train_both(recipe, tmp_path)

    def fail(*args, **rest):
        raise AssertionError("too late")

    monkeypatch.setattr("variant.training.var_task.load_vae", fail)
    monkeypatch.setattr(VARTask, "_encode_copies", fail)
    (tmp_path / "file").write_text("")
    for out, optim, message in (
        (tmp_path, {}, "already holds a run"),
        (tmp_path / "new", {"precision": "fp16"}, 'precision "fp16" needs a GPU'),
        (tmp_path / "new", {"batch_size": 99}, "batch_size must be at most"),
        (tmp_path / "file" / "run", {}, "cannot be written"),
    ):
        chosen = dataclasses.replace(recipe, optim=dataclasses.replace(OPTIM, **optim))
        with pytest.raises(UserError, match=message):
            train_var(chosen, out, console=quiet(), device=CPU)


def test_resuming_needs_a_run_of_the_same_recipe(recipe, tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        train_vae(recipe, tmp_path, resume=True, console=quiet(), device=CPU)
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    with pytest.raises(UserError, match=r"written with other settings: seed 0 -> 3; resume with"):
        train_vae(recipe, tmp_path, resume=True, seed=3, console=quiet(), device=CPU)
    whole = (tmp_path / "vae-last.pt").read_bytes()
    (tmp_path / "vae-last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a readable checkpoint|damaged"):
        train_vae(recipe, tmp_path, resume=True, console=quiet(), device=CPU)


def test_resuming_with_another_vqvae_is_refused(recipe, tmp_path, monkeypatch):
    train_vae(recipe, tmp_path / "vae", console=quiet(), device=CPU)
    path = tmp_path / "vae" / "vae-best.safetensors"
    named = dataclasses.replace(
        recipe, vae_training=dataclasses.replace(recipe.vae_training, weights=str(path))
    )
    run_until(named, tmp_path, monkeypatch, train_var, VARTask)
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="was trained with another VQ-VAE weights") as caught:
        resume(named, tmp_path, train_var)
    assert "\n" not in str(caught.value)


def test_resuming_with_other_data_is_refused(recipe, tmp_path, monkeypatch, folders):
    run_until(recipe, tmp_path, monkeypatch)
    extra = folders / "train" / "class0" / "extra.png"
    extra.write_bytes((folders / "train" / "class0" / "0.png").read_bytes())
    try:
        with pytest.raises(UserError, match=r"another number of training images.*was 24.*is 25"):
            resume(recipe, tmp_path)
    finally:
        extra.unlink()
    first = folders / "train" / "class0" / "0.png"
    renamed = first.rename(first.with_name("zero.png"))
    try:
        with pytest.raises(UserError, match="trained with another image files or labels"):
            resume(recipe, tmp_path)
    finally:
        renamed.rename(first)


def test_digits_have_a_digest_of_their_own():
    inputs = data_inputs(open_recipe_data(load_recipe("digits")))
    assert inputs["num_train"] + inputs["num_held_out"] == 1797
    assert len(inputs["data_sha256"]) == 64


def test_a_damaged_or_foreign_checkpoint_is_one_line(recipe, tmp_path, monkeypatch):
    run_until(recipe, tmp_path, monkeypatch)
    last, best = tmp_path / "vae-last.pt", tmp_path / "vae-best.safetensors"
    whole, whole_best = last.read_bytes(), best.read_bytes()
    state = torch.load(last, weights_only=True)
    module = dict(state["module"])
    module.popitem()
    optimizer = {**state["optimizer"], "param_groups": []}
    for changes, message in (
        ({"format": "other"}, "is not a checkpoint of this program"),
        ({"kind": "var"}, "is not a checkpoint of this program"),
        ({"history": None}, "is damaged: history missing"),
        ({"step": "two"}, "is damaged: step missing or of another type"),
        ({"module": module}, "does not hold the weights of this VQVAE"),
        ({"optimizer": optimizer}, "is damaged"),
        ({"random": {}}, "is damaged"),
    ):
        rewrite(last, **changes)
        with pytest.raises(UserError, match=message) as caught:
            resume(recipe, tmp_path)
        assert "\n" not in str(caught.value)
        last.write_bytes(whole)
    best.write_bytes(whole_best[:-100])
    with pytest.raises(UserError, match=r"vae-best.safetensors: is missing or damaged"):
        resume(recipe, tmp_path)
    best.unlink()
    with pytest.raises(UserError, match=r"vae-best.safetensors: is missing or damaged"):
        resume(recipe, tmp_path)
    best.write_bytes(whole_best)
    assert resume(recipe, tmp_path).steps == 4


def test_the_resume_command_is_quoted_and_contains_the_seed(recipe, tmp_path, monkeypatch):
    digits = load_recipe("digits")
    folder = Path("a b")
    assert resume_hint("variant train", digits, folder) == (
        "variant train --recipe digits --out 'a b' --resume"
    )
    assert "--seed 7 --resume" in resume_hint("x", dataclasses.replace(digits, seed=7), folder)
    changed = dataclasses.replace(digits, optim=OPTIM)
    assert resume_hint("x", changed, folder) == "the same command and --resume"
    printed = run_until(recipe, tmp_path, monkeypatch, resume_command="variant train-vae --out q")
    assert "Resume with: variant train-vae --out q" in printed
