"""Set-up of runs: refused folders and settings, and the conditions of resuming."""

import copy
import dataclasses
import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import open_recipe_data
from tiny_runs import (
    CPU,
    OPTIM,
    assert_same,
    quiet,
    resume,
    rewrite,
    run_until,
    tiny_recipe,
    train_both,
    trained_vae,
    with_precision,
)

from variant.data.sources import data_inputs
from variant.engine import memory
from variant.errors import UserError
from variant.models.vqvae import VQVAE
from variant.training.recipe import load_recipe
from variant.training.run_setup import FILE_CONTENTS, FILE_TIMES, resume_hint
from variant.training.vae_task import VAETask, train_vae
from variant.training.var_task import VARTask, train_var

# Damaged bits that are drawn.
DRAWS = 12 if os.environ.get("VARIANT_NIGHTLY") else 4


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe, tmp_path):
    trained_vae(recipe, tmp_path)
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
    trained_vae(recipe, tmp_path)
    with pytest.raises(UserError, match=r'optim.precision "fp16" needs a GPU'):
        train_var(with_precision(recipe, "fp16"), tmp_path, console=quiet(), device=CPU)


def test_models_larger_than_the_memory_are_refused_before_they_are_built(
    recipe, tmp_path, monkeypatch
):
    large = dataclasses.replace(recipe.vae, vocab_size=2**24, z_channels=2**12)
    wide = dataclasses.replace(recipe.model, num_classes=2**24, embed_dim=2**15, num_heads=2**9)
    for train, part, changes in (
        (train_vae, "vae", {"vae": large}),
        (train_var, "weights", {"model": wide}),
    ):
        with pytest.raises(UserError, match=r"tiny: the weights need [\d,]{7,} MiB, but"):
            train(dataclasses.replace(recipe, **changes), tmp_path / part, device=CPU)
    needed = 4 * sum(value.numel() for value in VQVAE(recipe.vae).parameters())
    for free in (needed - 1, 4 * needed - 1, 4 * needed):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        if free == 4 * needed:
            train_vae(recipe, tmp_path, console=quiet(), device=CPU)
            continue
        what = "the weights" if free < needed else "weights, gradients and AdamW's two moments"
        with pytest.raises(UserError, match=f"tiny: {what} need . MiB"):
            train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_batch_larger_than_the_data_is_refused(recipe, tmp_path):
    optim = dataclasses.replace(OPTIM, batch_size=64)
    with pytest.raises(UserError, match=r"optim.batch_size must be at most .* \(24\); got 64"):
        train_vae(
            dataclasses.replace(
                recipe, vae_training=dataclasses.replace(recipe.vae_training, optim=optim)
            ),
            tmp_path,
            console=quiet(),
            device=CPU,
        )


def test_an_epoch_may_have_fewer_steps_than_a_pass_and_no_more(recipe, tmp_path):
    def with_steps(steps):
        optim = dataclasses.replace(OPTIM, steps_per_epoch=steps)
        return dataclasses.replace(
            recipe, vae_training=dataclasses.replace(recipe.vae_training, optim=optim)
        )

    with pytest.raises(
        UserError, match=r"optim.steps_per_epoch must be at most 2, .* images; got 3"
    ):
        train_vae(with_steps(3), tmp_path, console=quiet(), device=CPU)
    assert train_vae(with_steps(1), tmp_path, console=quiet(), device=CPU).steps == 2


def test_missing_and_broken_image_folders_are_one_line(recipe, tmp_path):
    def run(**changes):
        section = dataclasses.replace(recipe.data, **changes)
        train_vae(
            dataclasses.replace(recipe, data=section), tmp_path / "o", console=quiet(), device=CPU
        )

    with pytest.raises(UserError, match=r"^data\.train: .*nowhere: no such folder of images"):
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
    trained_vae(recipe, tmp_path)
    with pytest.raises(UserError, match=r"written with other settings: seed 0 -> 3; resume with"):
        train_vae(recipe, tmp_path, resume=True, seed=3, console=quiet(), device=CPU)
    whole = (tmp_path / "vae-last.pt").read_bytes()
    (tmp_path / "vae-last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a readable checkpoint|damaged"):
        train_vae(recipe, tmp_path, resume=True, console=quiet(), device=CPU)


def test_a_vqvae_is_not_trained_further_under_its_transformer(recipe, tmp_path):
    train_both(recipe, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    longer = dataclasses.replace(recipe.vae_training, epochs=3)
    longer = dataclasses.replace(recipe, vae_training=longer)
    with pytest.raises(UserError, match=r"holds a transformer \(var-last\.pt\).* another folder"):
        resume(longer, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resume(recipe, tmp_path).steps == 4  # nothing to do
    (tmp_path / "copy").mkdir()
    for name in ("vae-last.pt", "vae-best.safetensors"):
        shutil.copy(tmp_path / name, tmp_path / "copy")
    assert resume(longer, tmp_path / "copy").steps == 6


def test_weights_whose_checkpoint_was_removed_are_kept(recipe, tmp_path):
    trained_vae(recipe, tmp_path)
    (tmp_path / "vae-last.pt").unlink()
    before = (tmp_path / "vae-best.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"without its checkpoint \(vae-best\.safetensors\)"):
        train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert (tmp_path / "vae-best.safetensors").read_bytes() == before


def test_resuming_with_another_vqvae_is_refused(recipe, tmp_path, monkeypatch):
    trained_vae(recipe, tmp_path / "vae")
    path = tmp_path / "vae" / "vae-best.safetensors"
    named = dataclasses.replace(
        recipe, vae_training=dataclasses.replace(recipe.vae_training, weights=str(path))
    )
    run_until(named, tmp_path, monkeypatch, train_var, VARTask)
    last = tmp_path / "var-last.pt"
    saved = torch.load(last, weights_only=True)["inputs"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()  # an earlier version recorded the file
    rewrite(last, inputs={**saved, "vae_sha256": sha256})
    run_until(named, tmp_path, monkeypatch, train_var, VARTask, step=4, resume=True)
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="was trained with another VQ-VAE ") as caught:
        resume(named, tmp_path, train_var)
    assert "\n" not in str(caught.value)


def replace_images(folder, recipe, names):
    """A copy of the images with some of them replaced by others of their sizes in bytes."""
    shutil.copytree(Path(recipe.data.train).parent, folder)
    for name in names:
        path = folder / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # in the checksum of the last chunk, which readers of images pass over
        path.write_bytes(data)
    places = {part: str(folder / part) for part in ("train", "held_out")}
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **places))


def test_resuming_with_replaced_images_of_their_sizes_is_refused(recipe, tmp_path, monkeypatch):
    run_until(recipe, tmp_path / "run", monkeypatch)
    name = "train/class1/3.png"
    moved = replace_images(tmp_path / "moved", recipe, [name])
    assert data_inputs(open_recipe_data(moved)) == data_inputs(open_recipe_data(recipe))
    with pytest.raises(UserError, match=rf"other images: the contents of {name} were replaced"):
        resume(moved, tmp_path / "run")
    many = [f"held_out/class{label}/{index}.png" for label in (0, 1) for index in range(3)]
    more = replace_images(tmp_path / "more", recipe, [name, *many])
    with pytest.raises(UserError, match=r"vae-last.pt: .* of .*, .* and 2 more were replaced"):
        resume(more, tmp_path / "run")


def test_other_times_of_the_same_images_are_a_warning(recipe, tmp_path, monkeypatch, recwarn):
    run_until(recipe, tmp_path / "run", monkeypatch)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    same = replace_images(tmp_path / "same", recipe, [])  # copied with its times
    touched = replace_images(tmp_path / "touched", recipe, [])
    os.utime(tmp_path / "touched" / "train" / "class0" / "5.png", (1e9, 1e9))
    recwarn.clear()
    assert resume(same, tmp_path / "run").steps == 4
    assert not [each for each in recwarn if "modification times" in str(each.message)]
    with pytest.warns(RuntimeWarning, match=r"30 of them were compared and have the same contents"):
        assert resume(touched, tmp_path / "again").steps == 4


def test_a_checkpoint_without_stamps_of_files_is_resumed(recipe, tmp_path, monkeypatch, recwarn):
    """Of an earlier version; what is written next has them."""
    run_until(recipe, tmp_path / "run", monkeypatch)
    last = tmp_path / "run" / "vae-last.pt"
    inputs = torch.load(last, weights_only=True)["inputs"]
    stamps = {name: inputs.pop(name) for name in (FILE_CONTENTS, FILE_TIMES)}
    rewrite(last, inputs=inputs)
    moved = replace_images(tmp_path / "moved", recipe, ["train/class1/3.png"])
    recwarn.clear()
    assert resume(moved, tmp_path / "run").steps == 4
    assert not [each for each in recwarn if "modification times" in str(each.message)]
    written = torch.load(last, weights_only=True)["inputs"]
    assert written[FILE_CONTENTS].keys() == stamps[FILE_CONTENTS].keys()
    assert written[FILE_CONTENTS] != stamps[FILE_CONTENTS]


def test_resuming_with_other_data_is_refused(recipe, tmp_path, monkeypatch, folders):
    run_until(recipe, tmp_path, monkeypatch)
    extra = folders / "train" / "class0" / "extra.png"
    extra.write_bytes((folders / "train" / "class0" / "0.png").read_bytes())
    try:
        with pytest.raises(
            UserError, match=r"images \(it was 24, now it is 25\); other image files"
        ):
            resume(recipe, tmp_path)
    finally:
        extra.unlink()
    first = folders / "train" / "class0" / "0.png"
    renamed = first.rename(first.with_name("zero.png"))
    try:
        with pytest.raises(UserError, match="trained with other image files or labels"):
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


@pytest.mark.parametrize("resumes", [False, True])
def test_a_second_training_in_the_folder_is_refused(recipe, tmp_path, monkeypatch, resumes):
    refused = []

    def second(self, *args):
        for train in (train_vae, train_var):
            with pytest.raises(UserError, match="another training is writing") as caught:
                train(recipe, tmp_path, resume=resumes, console=quiet(), device=CPU)
            refused.append(str(caught.value))
        return original(self, *args)

    original = VAETask.name_of_step
    monkeypatch.setattr(VAETask, "name_of_step", second)
    assert train_vae(recipe, tmp_path, console=quiet(), device=CPU).steps == 4
    assert len(refused) == 8
    assert all(f"(process {os.getpid()})" in text and "\n" not in text for text in refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "vae-best.safetensors",
        "vae-last.pt",
        "vae-metrics.jsonl",
        "vae-steps.jsonl",
    ]


def test_a_run_removes_the_temporary_files_of_killed_ones(recipe, tmp_path):
    for name in (".vae-last.pt.9.tmp", ".var-best.safetensors.9.tmp", ".model.safetensors.9.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".notes.9.tmp").write_text("")
    train_vae(recipe, tmp_path, console=quiet(), device=CPU)
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.9.tmp"]


def test_a_refused_run_leaves_nothing(recipe, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no VQ-VAE"):
        train_var(recipe, tmp_path / "a" / "run", console=quiet(), device=CPU)
    monkeypatch.setattr(VAETask, "loss", lambda self, *args: self.module.missing)
    with pytest.raises(AttributeError):
        train_vae(recipe, tmp_path / "a" / "run", console=quiet(), device=CPU)
    assert not any(tmp_path.iterdir())


def test_damaged_best_weights_are_found_at_resume_and_by_the_next_training(
    recipe, tmp_path, monkeypatch
):
    trained_vae(recipe, tmp_path)
    best = tmp_path / "vae-best.safetensors"
    whole = best.read_bytes()
    draw = random.Random(0)
    for _ in range(DRAWS):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        best.write_bytes(damaged)
        for train in (train_var, train_vae):
            with pytest.raises(UserError, match=r"vae-best.safetensors: is .*damaged") as caught:
                train(recipe, tmp_path, resume=train is train_vae, console=quiet(), device=CPU)
            assert "\n" not in str(caught.value)
    best.write_bytes(whole)
    assert resume(recipe, tmp_path).steps == 4


def test_a_flipped_bit_in_a_checkpoint_is_found(recipe, tmp_path, monkeypatch):
    run_until(recipe, tmp_path, monkeypatch)
    last = tmp_path / "vae-last.pt"
    whole = last.read_bytes()
    draw = random.Random(1)
    for _ in range(2 * DRAWS):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        last.write_bytes(damaged)
        with pytest.raises(UserError, match=r"vae-last.pt: is damaged") as caught:
            resume(recipe, tmp_path)
        assert "\n" not in str(caught.value)


LOG = {"meters": {}, "steps": 1, "seconds": 1.0, "flop": 9, "waited": 0.5, "waited_before": 0.0}
EPOCH = {
    "epoch": 1,
    "step": 2,
    "seconds": 1.0,
    "train": {"loss": 1.0},
    "held_out": {"reconstruction": 1.0},
    "held_out_mean": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": []}, "history"),
        ({"history": [{}]}, r"history\[0\]: epoch"),
        ({"history": [{**EPOCH, "epoch": 2}]}, r"history\[0\]: epoch"),
        ({"history": [{**EPOCH, "epoch": True}]}, r"history\[0\]: epoch"),
        ({"history": [{**EPOCH, "step": 0}]}, r"history\[0\]: step"),
        ({"history": [{**EPOCH, "step": 1}]}, "its epochs do not end every 2 steps"),
        ({"history": [{**EPOCH, "held_out_mean": "x"}]}, r"history\[0\]: held_out_mean"),
        ({"history": [{**EPOCH, "held_out_mean": float("nan")}]}, "held_out_mean"),
        ({"history": [{**EPOCH, "held_out": {}}]}, r"history\[0\]: held_out"),
        ({"history": [{**EPOCH, "train": [1.0]}]}, r"history\[0\]: train"),
        ({"history": [{**EPOCH, "seconds": 10**400}]}, r"history\[0\]: seconds"),
        ({"history": [{**EPOCH, "more": 1}]}, r"history\[0\] is no epoch"),
        ({"history": [EPOCH, {**EPOCH, "epoch": 2}]}, "history has 2 epochs, but step 3 is in"),
        ({"history": [3]}, r"history\[0\] is no epoch"),
        ({"history": [{**EPOCH, "held_out_by_scale": {"2": 3}}]}, "held_out_by_scale"),
        ({"history": [{**EPOCH, "held_out_by_scale": {"2": [float("nan")]}}]}, "held_out_by_scale"),
        ({"log": 3}, "log: its entries"),
        ({"log": {"meters": {}}}, "log: its entries"),
        ({"log": {**LOG, "steps": 1.0}}, "log: steps"),
        ({"log": {**LOG, "waited": float("nan")}}, "log: waited"),
        ({"log": {**LOG, "meters": {"loss/loss": [1.0]}}}, "log: 'loss/loss'"),
        ({"log": {**LOG, "meters": {"loss/loss": [float("inf"), 1.0]}}}, "log: 'loss/loss'"),
        ({"log": {**LOG, "meters": {"loss/loss": [1.0, -1.0]}}}, "log: 'loss/loss'"),
        ({"history": {}}, "history missing or of another type"),
        ({"step": -1}, "step is -1, of 4 steps"),
        ({"step": 10**12}, "step is 1000000000000, of 4 steps"),
        ({"step": 5}, "step is 5, of 4 steps"),
        ({"step": True}, "step missing or of another type"),
        ({"step": 1.5}, "step missing or of another type"),
        ({"step": 2}, "sums has 1 step; the epoch has 2"),
        ({"step": 1}, r"history\[0\]: step"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 10**30}, "total_steps is 10"),
        ({"seconds": float("nan")}, "seconds is out of range"),
        ({"seconds": -1.0}, "seconds is out of range"),
        ({"sums": {"loss": 3}}, "sums: 'loss'"),
        ({"sums": {"loss": (float("inf"), 1)}}, "sums: 'loss'"),
        ({"sums": {1: (1.0, 1)}}, "sums: 1"),
        ({"best_sha256": 3}, "best_sha256 missing or of another type"),
        ({"module": {"x": 3}}, "module: 'x' is no tensor"),
        ({"module": {3: torch.zeros(1)}}, "module: 3 is no tensor"),
        ({"optimizer": {}}, "optimizer has no state or no param_groups"),
        ({"optimizer": {"state": {0: 3}, "param_groups": []}}, "optimizer: state"),
        ({"optimizer": {"state": {}, "param_groups": [3]}}, "optimizer: param_groups"),
        ({"scaler": {"scale": "x"}}, "scaler: 'scale' is no number"),
        ({"inputs": {"num_train": torch.zeros(3)}}, "inputs: 'num_train'"),
        ({"inputs": {}}, "trained with another number of training images"),
        ({"recipe": {}}, "recipe: name: missing"),
        ({"recipe": {"seed": []}}, "recipe: name: missing"),
        ({"random": {"python": 3}}, "is damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_entries_of_a_checkpoint_are_one_line(
    stopped, contents, recipe, tmp_path, changes, message
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "vae-last.pt", contents, **changes)
    with pytest.raises(UserError, match=message) as caught:
        resume(recipe, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "vae-last.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moments: moments.pop("step"), "must have tensors step, .*; has exp_avg Tensor"),
        (lambda moments: moments.update(step=3), "must have tensors .*step int"),
        (lambda moments: moments.update(step=torch.tensor(4.0)), "step is 4.0, of 3"),
        (lambda moments: moments.update(step=torch.tensor(float("nan"))), "step is not finite"),
        (lambda moments: moments["exp_avg"].fill_(float("nan")), "exp_avg is not finite"),
        (lambda moments: moments.update(exp_avg=torch.zeros(1)), r"exp_avg is \(1,\)"),
        (lambda moments: moments.update(more=torch.zeros(1)), "must have tensors .*more Tensor"),
    ],
)
def test_wrong_moments_in_a_checkpoint_are_one_line(
    stopped, contents, recipe, tmp_path, change, message
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    optimizer = copy.deepcopy(contents["optimizer"])
    change(optimizer["state"][0])
    rewrite(tmp_path / "vae-last.pt", contents, optimizer=optimizer)
    with pytest.raises(UserError, match=f"vae-last.pt: is damaged: optimizer: {message}"):
        resume(recipe, tmp_path)


def test_the_optimiser_s_settings_are_those_of_the_recipe(stopped, recipe, tmp_path):
    for name in ("whole", "changed"):
        shutil.copytree(stopped, tmp_path / name)
    optimizer = torch.load(tmp_path / "whole" / "vae-last.pt", weights_only=True)["optimizer"]
    for group in optimizer["param_groups"]:
        group |= {"weight_decay": 9.0, "betas": (0.0, 0.0), "maximize": True, "fused": True}
    rewrite(tmp_path / "changed" / "vae-last.pt", optimizer=optimizer)
    states = []
    for name in ("whole", "changed"):
        resume(recipe, tmp_path / name)
        states.append(torch.load(tmp_path / name / "vae-last.pt", weights_only=True))
    assert_same(states[0]["module"], states[1]["module"])


@pytest.fixture(scope="module")
def stopped(folders, tmp_path_factory):
    """The folder of a VQ-VAE's training that was stopped after step 3 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        run_until(tiny_recipe(folders), folder, patch)
    return folder


@pytest.fixture(scope="module")
def contents(stopped):
    """What the checkpoint in that folder holds, which must not be changed."""
    return torch.load(stopped / "vae-last.pt", weights_only=True)
