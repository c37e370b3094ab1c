"""Recipes: the packaged ones, and the errors of invalid ones."""

import dataclasses

import numpy as np
import pytest

from variant.differences import differences
from variant.errors import UserError
from variant.models.ranges import (
    Count,
    CountOrZero,
    Positive,
    Share,
    ShareBelowOne,
    range_text,
)
from variant.training.memory_plan import fastest, training_rows
from variant.training.recipe import load_recipe, recipe_names
from variant.training.schedule import Phases

BASE = """
name = "tiny"
description = "for tests"
[model]
depth = 4
embed_dim = 32
num_heads = 2
num_classes = 10
[vae]
vocab_size = 16
z_channels = 4
ch = 32
ch_mult = [1, 1]
patch_nums = [1, 2, 4]
[vae_training]
weights = "vae.safetensors"
[data]
kind = "digits"
[optim]
batch_size = 8
learning_rate = 1e-3
[schedule]
depths = [2]
bridge = 1
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_under_their_own_name(name):
    assert load_recipe(name).name == name


def test_the_paper_recipe_has_the_values_of_tables_6_and_7():
    recipe = load_recipe("imagenet-var-d30-paper")
    assert recipe.model.depth == 30
    assert recipe.schedule.depths == (16,)
    assert recipe.schedule.bridge == 6
    assert recipe.schedule.joint_probability == 0.2
    assert recipe.schedule.phase_lengths == Phases(5, 15, 5)
    optim = recipe.optim
    assert (optim.batch_size, optim.weight_decay, optim.clip) == (1024, 0.05, 1.0)
    assert (optim.precision, optim.schedule, optim.warmup) == ("fp16", "constant", 0.0)
    data = recipe.data
    assert (data.randaugment_ops, data.randaugment_magnitude) == (2, 9)
    assert data.mixup > 0
    assert data.hflip > 0


@pytest.mark.parametrize(("depth", "total"), [(16, 25), (8, 28), (4, 32), (2, 35)])
def test_without_explicit_phases_those_of_table_7_are_used(tmp_path, depth, total):
    text = BASE.replace("depth = 4", "depth = 30").replace("depths = [2]", f"depths = [{depth}]")
    assert load_recipe(write(tmp_path, text)).schedule.phase_lengths.total == total


def test_codebook_scales_and_subnets_come_from_the_other_sections(tmp_path):
    config = load_recipe(write(tmp_path, BASE)).var_config
    assert (config.vocab_size, config.vae_channels, config.patch_nums) == (16, 4, (1, 2, 4))
    assert config.subnets == {2: (0, 3)}
    assert config.bridge == 1


def test_a_recipe_gives_plain_values_and_accepts_another_seed(tmp_path):
    path = write(tmp_path, BASE)
    recipe = load_recipe(path, seed=5)
    assert recipe.seed == 5
    assert dataclasses.replace(recipe, seed=0) == load_recipe(path)
    assert recipe.to_dict()["schedule"]["depths"] == [2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depth = 4", "depht = 4", "model.depht: unknown key"),
        ("depth = 4\n", "", "model.depth: missing"),
        ("learning_rate = 1e-3", 'learning_rate = "fast"', "optim.learning_rate: .*got 'fast'"),
        ("learning_rate = 1e-3", "learning_rate = -1", "optim.learning_rate must be > 0; got -1"),
        (
            'kind = "digits"',
            'kind = "video"',
            "data.kind: .*'folder', 'idx' or 'tokens'.*got 'video'",
        ),
        ('kind = "digits"', 'kind = "folder"', "train and held_out must name folders"),
        ("bridge = 1", "bridge = 4", r": schedule.bridge must be an integer in \[0, 3\]; got 4"),
        ("depths = [2]", "depths = [5]", r"depths must be among \[2, 4, 8, 16\]"),
        ("depths = [2]", "depths = [2, 2]", "depths must not repeat"),
        ("bridge = 1", "bridge = 1\njoint = 3", "must be given together or not at all"),
        ("ch = 32", "ch = 20", ": vae.ch times each of ch_mult must be a multiple of 32"),
        ('weights = "vae.safetensors"', "epochs = 3", ": vae_training.weights, or epochs and"),
        ("batch_size = 8", "batch_size = 8\naccumulate = 3", "accumulate must divide batch_size"),
        ('kind = "digits"', 'kind = "digits"\ncopies = 2\nmixup = 0.2', "copies must be 0 with"),
        ('kind = "digits"', 'kind = "digits"\nhflip = 0.5', 'hflip is not for kind "digits"; got'),
        ("depth = 4", "depth = 1000", r": model.depth must be an integer in \[1, 256\]; got 1000"),
        ("num_heads = 2", "num_heads = 3", r": model.embed_dim / model.num_heads must be a mult"),
        ("depth = 4", "depth = 4\nmlp_ratio = 0.3", r": model.mlp_ratio times model.embed_dim"),
        ("ch = 32", "ch = 32\nquant_resi = 7", r": vae.quant_resi must be a finite number"),
        ("depth = 4", "depth = = 4", "is not valid TOML"),
        ("learning_rate = 1e-3", "learning_rate = inf", "learning_rate must be finite; got inf"),
        ("1e-3", "1e-3\nweight_decay = inf", "optim.weight_decay must be finite; got inf"),
        ("1e-3", "1e-3\nweight_decay = nan", "optim.weight_decay must be finite; got nan"),
        ("1e-3", "1e-3\nclip = 1e999", "optim.clip must be finite; got inf"),
        ("1e-3", "1e-3\nbetas = [nan, 0.5]", "optim.betas.0 must be finite; got nan"),
        ("1e-3", "2020-01-01", "learning_rate: Input should be a valid number; got '2020-01-01'"),
        ("bridge = 1", "bridge = 1\njoint_probability = nan", "joint_probability must be finite"),
        ("depth = 4", "depth = 4\nnorm_eps = inf", "model.norm_eps must be finite; got inf"),
        ('kind = "digits"', 'kind = "digits"\nrotate = inf', "data.rotate must be finite"),
        (
            'kind = "digits"',
            'kind = "digits"\nworkers = 100000',
            "data.workers must be <= 1,024; got 100000",
        ),
        (
            'name = "tiny"',
            f'name = "tiny"\nseed = {2**63}',
            f"seed must be below 2.63; got {2**63}",
        ),
        (
            'name = "tiny"',
            'name = "tiny"\nseed = 0x' + "f" * 9000,
            "recipe.toml: Exceeds the limit",
        ),
        (
            'name = "tiny"',
            f'name = "tiny"\na{".a" * 20000} = 1',
            "has a line of more than 100 dots",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, old, new, message):
    assert old in BASE
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, BASE.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_all_mistakes_of_all_sections_are_named_at_once(tmp_path):
    text = BASE.replace("learning_rate = 1e-3", "learning_rate = -1\nwarmup = 1.0\nclipp = 2")
    text = text.replace("bridge = 1", "bridge = 1\nfinal_probability = 2\njoint_probability = 1.5")
    text = text.replace("depth = 4", 'depth = 0\nembed_dim = "wide"').replace("embed_dim = 32", "")
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    _, _, message = str(caught.value).partition(": ")
    for problem in (
        "model.depth must be >= 1; got 0",
        "model.embed_dim: Input should be a valid integer; got 'wide'",
        "optim.learning_rate must be > 0; got -1",
        "optim.warmup must be < 1; got 1.0",
        "optim.clipp: unknown key",
        "schedule.joint_probability must be <= 1; got 1.5",
        "schedule.final_probability must be <= 1; got 2",
    ):
        assert problem in message
        message = message.replace(problem, "")
    assert not message.strip("; ")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("optim", {"warmup": 1.0}, "warmup must be < 1; got 1.0"),
        ("optim", {"betas": (0.5, -0.1)}, "betas must be >= 0; got -0.1"),
        ("optim", {"clip": float("inf")}, "clip must be finite; got inf"),
        ("optim", {"clip": float("nan")}, "clip must be finite; got nan"),
        ("schedule", {"joint": -1, "transition": 1, "refinement": 1}, "joint must be >= 0; got -1"),
        ("eval", {"limit": -1}, "limit must be >= 0; got -1"),
        ("model", {"depth": 0}, "depth must be >= 1; got 0"),
        ("model", {"cond_drop_rate": 1.5}, "cond_drop_rate must be <= 1; got 1.5"),
        ("output", {"checkpoint_every": 0}, "checkpoint_every must be >= 1; got 0"),
    ],
)
def test_sections_built_by_code_have_the_same_ranges(tmp_path, section, values, message):
    recipe = load_recipe(write(tmp_path, BASE))
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(getattr(recipe, section), **values)


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Count, ">= 1"), (CountOrZero | None, ">= 0"), (Positive, "> 0"), (Share, "in [0, 1]"),
        (tuple[ShareBelowOne, ShareBelowOne], "in [0, 1)"), (int | None, ""),
    ],
)  # fmt: skip
def test_a_range_has_a_text(hint, text):
    assert range_text(hint) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = true", "seed: .*valid integer; got True"),
        ("seed = 1.0", "seed: .*valid integer; got 1.0"),
        ('seed = "1"', "seed: .*valid integer; got '1'"),
        (f"seed = {2**63}", f"seed must be below 2.63; got {2**63}"),
        ("seed = 0x" + "f" * 9000, "recipe.toml: Exceeds the limit"),
        ("a = " + "[" * 9000, "nested too deeply"),
        ('"a\\nb" = 1', "a b: unknown key"),
        ("a" + ".a" * 20000 + " = 1", "has a line of more than 100 dots"),
        ("a = '" + "y" * 2**18 + "'", "is no recipe: it has 262,[0-9]+ characters"),
        ("a = 1\0", "is not valid TOML"),
    ],
    ids=lambda text: text[:10],
)
def test_hostile_text_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, f"{text}\n{BASE}"))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_packaged_ones():
    with pytest.raises(
        UserError, match=r"nonesuch: no such recipe. Packaged: digits, fashion-mnist, .*imagenet"
    ):
        load_recipe("nonesuch")


@pytest.mark.parametrize(
    ("name", "gpus", "memory", "part", "gibibytes"),
    [
        ("imagenet-var-d30", 8, 80, 32, 51),
        ("imagenet-var-d30-8x40gb", 8, 40, 16, 32),
        ("imagenet-var-d30-1x80gb", 1, 80, 16, 60),
        ("imagenet-var-d16", 1, 80, 128, 51),
    ],
)
def test_the_parts_of_a_batch_are_the_fastest_that_fit_the_gpus(
    name, gpus, memory, part, gibibytes
):
    recipe = load_recipe(name)
    assert recipe.optim.batch_size / gpus / recipe.optim.accumulate == part
    rows = training_rows(
        recipe.var_config, recipe.vae, gpus=gpus, batch=1024, width=2, memory=memory * 2**30
    )
    best = fastest(rows, memory * 2**30)
    assert best.parts == recipe.optim.accumulate
    assert best.checkpointing == recipe.memory.checkpointing
    assert best.mode == ("single" if gpus == 1 else recipe.parallel.mode)
    assert round(best.total / 2**30) == gibibytes


@pytest.mark.parametrize("name", ["imagenet-var-d30-8x40gb", "imagenet-var-d30-1x80gb"])
def test_recipes_of_other_gpus_differ_in_their_parts_only(name):
    ours, other = load_recipe("imagenet-var-d30").to_dict(), load_recipe(name).to_dict()
    keys = {key for key, _, _ in differences(ours, other)}
    assert keys <= {"name", "description", "optim.accumulate", "parallel.mode"}


def test_imagenet_var_d30_differs_from_the_paper_in_its_schedule_only():
    paper, ours = (load_recipe(f"imagenet-var-d30{end}").to_dict() for end in ("-paper", ""))
    keys = {key for key, _, _ in differences(paper, ours)}
    phases = {"schedule.joint", "schedule.transition", "schedule.refinement"}
    assert keys == {"name", "description", "schedule.joint_probability"} | phases


def test_the_adversary_of_imagenet_vqvae_has_llamagens_fixed_weight():
    adversary = load_recipe("imagenet-vqvae").vae_training.adversary
    assert (adversary.weight, adversary.adaptive) == (0.5, False)


def test_fashion_mnist_has_130_tokens_of_32_pixels():
    recipe = load_recipe("fashion-mnist")
    assert recipe.vae.image_size == 32
    assert recipe.vae.downsample == 4
    assert recipe.vae.patch_nums == (1, 2, 3, 4, 6, 8)
    assert recipe.var_config.layout.total == 130
    assert recipe.data.kind == "idx"


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"recipe.toml: cannot be read as text in UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/dev/zero", "."])
def test_a_path_that_is_no_recipe_is_one_short_line(name):
    message = r"file name too long|null byte|must be a regular file; it is a (device|folder)"
    with pytest.raises(UserError, match=message) as e:
        load_recipe(name)
    assert len(str(e.value)) < 400


def test_long_values_are_not_quoted_whole(tmp_path):
    with pytest.raises(UserError, match="seed: Input should be a valid integer") as e:
        load_recipe(write(tmp_path, f"seed = '{'y' * 10**5}'\n{BASE}"))
    assert len(str(e.value)) < 1200


def test_numbers_keep_every_bit(tmp_path):
    for rate in (0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1 / 3, 2**-40 + 2**-80):
        text = BASE.replace("1e-3", repr(rate))
        assert load_recipe(write(tmp_path, text)).optim.learning_rate == rate


def test_a_seed_is_an_integer_of_64_bits(tmp_path):
    path = write(tmp_path, BASE)
    assert load_recipe(path, seed=np.int64(7)).seed == 7
    with pytest.raises(UserError, match=r"load_recipe: seed must be an integer in \[0, 2.63 - 1\]"):
        load_recipe(path, seed=2**63)
    with pytest.raises(TypeError, match=r"load_recipe: seed must be an integer .*; got True"):
        load_recipe(path, seed=True)
