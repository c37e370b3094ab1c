"""The weights that a run starts from: files, model folders, packaged models."""

import dataclasses

import pytest
import torch
from small_models import open_recipe_source
from tiny_runs import (
    CPU,
    assert_same,
    quiet,
    resume,
    run_until,
    tiny_recipe,
    train_both,
    trained_vae,
)

from variant.checkpoints.model_folder import load_model
from variant.checkpoints.original_var import save_original
from variant.errors import UserError
from variant.models.var import VAR
from variant.training.initial_weights import find_start, find_vae, load_start, load_vae
from variant.training.recipe import load_recipe, starting_from
from variant.training.schedule import ScheduleSection
from variant.training.task import split_scales
from variant.training.var_task import VARTask, train_var


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """The model folder of a finished run of the small recipe."""
    folder = tmp_path_factory.mktemp("trained")
    train_both(tiny_recipe(folders), folder)
    return folder


def with_model(recipe, **changes):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))


def start(recipe):
    """A new transformer of the recipe with the weights that it starts from."""
    torch.manual_seed(5)
    module = VAR(recipe.var_config)
    load_start(module, recipe, find_start(recipe))
    return module


def test_a_run_starts_from_both_models_of_a_folder(recipe, trained, tmp_path):
    entry = with_model(recipe, weights="var.pth", weights_entry="ema")  # of a file, not of a model
    chosen = starting_from(entry, str(trained))
    var, vae, _ = load_model(trained)
    assert_same(dict(start(chosen).state_dict()), dict(var.state_dict()))
    found = load_vae(chosen, find_vae(chosen, tmp_path))
    assert_same(dict(found.state_dict()), dict(vae.state_dict()))
    before = (trained / "model.safetensors").read_bytes()
    assert train_var(chosen, tmp_path / "new", console=quiet(), device=CPU).steps == 8
    assert (trained / "model.safetensors").read_bytes() == before


def test_subnets_and_dropout_may_differ_from_the_start(recipe, trained):
    schedule = ScheduleSection(depths=(2, 3), bridge=2, joint=1, transition=0, refinement=0)
    chosen = dataclasses.replace(starting_from(recipe, str(trained)), schedule=schedule)
    start(with_model(chosen, cond_drop_rate=0.5, drop_path_rate=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 2}, "model.depth must be 3, as in the model; got 2"),
        ({"embed_dim": 64}, "model.embed_dim must be 32, as in the model; got 64"),
        ({"num_heads": 1}, "model.num_heads must be 2, as in the model; got 1"),
        ({"norm_eps": 1e-5}, "model.norm_eps must be 1e-06, as in the model; got 1e-05"),
        ({"mlp_ratio": 2.0, "shared_aln": True}, "model.mlp_ratio must .*; model.shared_aln must"),
        (
            {"depth": 2, "embed_dim": 64, "num_heads": 1, "norm_eps": 1e-5}
            | {"mlp_ratio": 2.0, "shared_aln": True},
            "model.depth must .*; model.norm_eps must [^;]*; got 1e-05 and 1 more$",
        ),
    ],
)
def test_a_transformer_of_other_sizes_names_the_keys(recipe, trained, tmp_path, changes, message):
    chosen = with_model(starting_from(recipe, str(trained)), **changes)
    with pytest.raises(UserError, match=f"cannot start from .*: {message}") as caught:
        train_var(chosen, tmp_path, console=quiet(), device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 16}, "vae.vocab_size must be 8, as in the model; got 16"),
        ({"patch_nums": (1, 3, 4)}, r"vae.patch_nums must be \[1, 2, 4\], .*; got \[1, 3, 4\]"),
        ({"z_channels": 8}, "vae.z_channels must be 4, as in the model; got 8"),
        ({"using_znorm": True}, "vae.using_znorm must be False, as in the model; got True"),
    ],
)
def test_a_vqvae_of_other_sizes_names_the_keys(recipe, trained, tmp_path, changes, message):
    other = dataclasses.replace(recipe, vae=dataclasses.replace(recipe.vae, **changes))
    with pytest.raises(UserError, match=f"cannot start from .*: {message}"):
        train_var(starting_from(other, str(trained)), tmp_path, console=quiet(), device=CPU)
    if "using_znorm" not in changes:  # the transformer's config has the other three
        with pytest.raises(UserError, match=message):
            start(starting_from(other, str(trained)))


def test_missing_and_foreign_starts_are_one_line(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nonesuch", "nonesuch: no such model"),
        (str(tmp_path / "x.pth"), "x.pth: no such file"),
        (str(tmp_path / "empty"), "empty: holds n"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            start(with_model(recipe, weights=name))
        assert "\n" not in str(caught.value)


def test_a_run_starts_from_the_average_in_a_trainer_s_file(recipe, trained, tmp_path):
    var, vae, _ = load_model(trained)
    path = tmp_path / "trainer.pth"
    average = {f"module.{key}": value + 1 for key, value in var.state_dict().items()}
    torch.save({"model": var.state_dict(), "model_ema": average}, path)
    for entry, added in (("model", 0), ("ema", 1)):
        module = start(with_model(recipe, weights=str(path), weights_entry=entry))
        assert torch.equal(module.head.weight, var.head.weight + added)
    with pytest.raises(UserError, match=r'has no weights "other"'):
        start(with_model(recipe, weights=str(path), weights_entry="other"))
    with pytest.raises(UserError, match=r"which has one set of weights; got 'ema'"):
        start(with_model(recipe, weights=str(trained), weights_entry="ema"))
    with pytest.raises(ValueError, match="weights_entry needs weights; got 'ema'"):
        with_model(recipe, weights_entry="ema")
    save_original(var, vae, tmp_path / "var.pth", tmp_path / "vae.pth")
    module = start(with_model(recipe, weights=str(tmp_path / "var.pth")))
    assert_same(dict(module.state_dict()), dict(var.state_dict()))


def test_a_resumed_run_does_not_read_its_start_again(recipe, trained, tmp_path, monkeypatch):
    var, vae, _ = load_model(trained)
    files = (tmp_path / "var.pth", tmp_path / "vae.pth")
    save_original(var, vae, *files)
    trained_vae(recipe, tmp_path)
    chosen = with_model(recipe, weights=str(files[0]))
    run_until(chosen, tmp_path, monkeypatch, train_var, VARTask)
    moved = files[0].rename(tmp_path / "moved.pth")
    same = with_model(recipe, weights=str(moved))
    save_original(start(same).apply(lambda part: None), vae, *files)
    other = VAR(recipe.var_config)
    save_original(other, vae, tmp_path / "other.pth", files[1])
    files[0].unlink()
    for weights in (str(tmp_path / "other.pth"), None):
        with pytest.raises(UserError, match="was trained with other weights to start from"):
            resume(with_model(recipe, weights=weights), tmp_path, train_var)
    run_until(chosen, tmp_path, monkeypatch, train_var, VARTask, step=4, resume=True)
    assert resume(same, tmp_path, train_var).steps == 8


def test_a_run_starts_from_the_packaged_digits(tmp_path):
    chosen = starting_from(load_recipe("digits"), "digits")
    module, vae = start(chosen), load_vae(chosen, find_vae(chosen, tmp_path))
    task = VARTask(module.eval(), vae.eval(), open_recipe_source(chosen), chosen, CPU, 1)
    with torch.no_grad():
        losses, _ = split_scales(task.evaluate(range(40), held_out=True))
    assert losses.keys() == {"full", "2", "4"}
    assert max(losses.values()) < 2.5  # new weights give the logarithm of 64, 4.2
