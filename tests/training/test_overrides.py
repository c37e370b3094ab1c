"""Values for single keys of a recipe, given on a command line."""

import dataclasses
import shlex
from typing import Literal

import pytest
from tiny_runs import CPU, quiet, resume, run_until

from variant.errors import UserError
from variant.models.ranges import Count, CountOrZero, Positive
from variant.training.overrides import (
    key_hints,
    override,
    override_words,
    plain_value,
    split_overrides,
)
from variant.training.recipe import Recipe, load_recipe
from variant.training.recipe_reference import recipe_toml
from variant.training.vae_task import VAETask, train_vae


@pytest.mark.parametrize(
    ("words", "rest", "overrides"),
    [
        ("--out x --optim.clip 2e-4 --seed 3", "--out x --seed 3", ["optim.clip=2e-4"]),
        ("--schedule.depths 8 4 --resume", "--resume", ["schedule.depths=8 4"]),
        ("--optim.learning_rate=1 --data.shift -1", "", ["optim.learning_rate=1", "data.shift=-1"]),
        ("--vae-training.optim.clip 2 a", "", ["vae_training.optim.clip=2 a"]),
        ("train --out a.b", "train --out a.b", []),
        ("--data.train=--odd", "", ["data.train=--odd"]),
        ("--model.weights 'my file.pth'", "", ["model.weights=my file.pth"]),
    ],
)  # fmt: skip
def test_overrides_are_options_with_a_dot(words, rest, overrides):
    assert split_overrides(shlex.split(words)) == (shlex.split(rest), overrides)
    again = split_overrides(override_words(overrides))
    assert again == ([], overrides)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.clip --out x", "--optim.clip needs a value"),
        ("--optim.final-ratio 1 --optim.final_ratio 2", "--optim.final_ratio is given twice"),
    ],
)
def test_an_override_has_one_value(words, message):
    with pytest.raises(ValueError, match=message):
        split_overrides(words.split())


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (Count, "3", 3), (Count, "3.5", 3.5), (Count, "x", "x"), (Count, "true", "true"),
        (Positive, "2e-4", 2e-4), (Positive, "2", 2), (Positive, ".5", 0.5), (Positive, "x", "x"),
        (CountOrZero | None, "none", None), (CountOrZero | None, "7", 7), (Count, "none", "none"),
        (str, "3", "3"), (str | None, "none", None), (str, "a = 1\nb = 2", "a = 1\nb = 2"),
        (bool, "true", True), (bool, "1", 1), (bool, "yes", "yes"),
        (Literal["fp32", "bf16"], "bf16", "bf16"), (Literal["a"] | int, "4", 4),
        (Literal["a"] | int, "a", "a"),
        (tuple[int, ...], "8 4", [8, 4]), (tuple[int, ...], "8,4", [8, 4]),
        (tuple[int, ...], "[8, 4]", [8, 4]), (tuple[int, ...], "[]", []),
        (tuple[int, ...], "5", [5]), (tuple[tuple[int, ...], ...], "[[8, 4]]", [[8, 4]]),
        (tuple[float, float], "0.9 0.99", [0.9, 0.99]), (tuple[int, ...], "[1", "[1"),
    ],
)  # fmt: skip
def test_the_type_of_the_key_decides_how_a_value_is_read(hint, text, value):
    read = plain_value(hint, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lerning_rate", "--optim.learning-rate"),
        ("optim.lr_schedule", "--optim.schedule"),
        ("schedule.depth", "--schedule.depths"),
        ("optimiser.clip", "--optim.clip"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key, nearest):
    with pytest.raises(UserError, match=f"no such key of a recipe; perhaps you meant {nearest};"):
        load_recipe("digits", overrides=[f"{key}=1"])


def test_a_key_like_no_other_has_no_suggestion():
    with pytest.raises(UserError, match=r"--zzzz.qqqq: no such key of a recipe; docs"):
        load_recipe("digits", overrides=["zzzz.qqqq=1"])
    pattern = r"--aaaa.qq: no such key of a recipe; --zzzz.qqqq: no such key of a recipe; docs"
    with pytest.raises(UserError, match=pattern):
        load_recipe("digits", overrides=["aaaa.qq=1", "seed=1", "zzzz.qqqq=1"])
    with pytest.raises(UserError, match=r"--optim: no such key of a recipe"):  # a section
        load_recipe("digits", overrides=["optim=1"])


def test_every_key_can_be_overridden_with_its_own_value(tmp_path):
    """Each printed line of a recipe, given as an override of another recipe, gives the same one."""
    recipe = load_recipe("imagenet-var-d16")
    overrides, unset, section = [], set(), ""
    for line in recipe_toml(recipe).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif " = " in line and not line.startswith("#"):
            key, _, value = line.partition(" = ")
            overrides.append(f"{section}{key}={value.strip(chr(34))}")
        elif " (not set" in line:
            unset.add(section + line.split()[1])
    given = {text.partition("=")[0] for text in overrides}
    keys = {key for key, _ in key_hints(Recipe) if not key.startswith("vae_training.optim.")}
    assert keys == given | unset
    other = dataclasses.replace(recipe, seed=5, name="other")
    path = tmp_path / "other.toml"
    path.write_text(recipe_toml(other))
    assert load_recipe(path, overrides=overrides) == recipe


def test_overrides_are_typed_and_checked_with_the_rest():
    recipe = load_recipe("digits", overrides=["optim.learning_rate=2e-4", "schedule.depths=4"])
    assert recipe.optim.learning_rate == 2e-4
    assert recipe.schedule.depths == (4,)
    with pytest.raises(UserError, match=r"digits: optim.clip must be > 0; got -1; schedule.bri"):
        load_recipe("digits", overrides=["optim.clip=-1", "schedule.bridge=x"])


def test_none_removes_a_value_and_a_section_can_be_new():
    values = {"a": 1, "model": {"weights": "x"}}
    changed = override(values, ["model.weights=none", "eval.limit=3"], Recipe)
    assert changed == {"a": 1, "model": {}, "eval": {"limit": 3}}
    assert values["model"] == {"weights": "x"}


def test_a_resumed_run_needs_the_same_overrides(recipe, tmp_path, monkeypatch):
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_toml(recipe))
    changed = load_recipe(path, overrides=["vae_training.reconstruction=2.0"])
    out = tmp_path / "run"
    run_until(changed, out, monkeypatch, train_vae, VAETask)
    with pytest.raises(UserError, match=r"vae_training.reconstruction 2.0 -> 1.0; resume with"):
        train_vae(load_recipe(path), out, resume=True, console=quiet(), device=CPU)
    assert resume(changed, out).steps == 4
