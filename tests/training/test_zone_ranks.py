"""Several processes train the zone weights that one process trains, with a teacher too."""

import dataclasses

import pytest
import torch
from rank_jobs import Job, run
from test_distributed import ALL, in_mode, losses, tensors_in, train_on_two
from tiny_runs import OPTIM, tiny_recipe

from variant.checkpoints.model_folder import save_model
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import is_zone_key
from variant.supernet import VARiant
from variant.training.ema import EMASection
from variant.training.optim import OptimSection
from variant.training.recipe import starting_from

pytestmark = pytest.mark.timeout(900)
# Teachers and modes on two processes: each once unless all are asked for.
RUNS = [("none", "fsdp2"), ("ema", "ddp")]
RUNS += [("none", "ddp"), ("ema", "fsdp2")] if ALL else []


@pytest.fixture(scope="module")
def recipes(folders, tmp_path_factory):
    """By teacher, recipes of zone weights of two depths over a network of random weights."""
    recipe, replace = tiny_recipe(folders), dataclasses.replace
    schedule = replace(recipe.schedule, depths=(), joint=1, transition=0, refinement=0)
    recipe = replace(
        recipe,
        model=replace(recipe.model, depth=4, cond_drop_rate=0.3, drop_path_rate=0.3),
        optim=OptimSection(**{**dataclasses.asdict(OPTIM), "accumulate": 2, "learning_rate": 1e-2}),
        schedule=schedule,
    )
    torch.manual_seed(0)
    folder, var = tmp_path_factory.mktemp("start"), VAR(recipe.var_config)
    with torch.no_grad():
        for weight in var.blocks.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    save_model(folder, var, VQVAE(recipe.vae))
    schedule = replace(
        schedule, depths=(2, 3), joint=0, refinement=2, zone_weights="lora", lora_rank=2
    )
    recipe = starting_from(replace(recipe, schedule=schedule), str(folder))
    taught = replace(schedule, teacher_weight=0.7)
    return {
        "none": recipe,
        "frozen": replace(recipe, schedule=replace(taught, teacher="frozen")),
        "ema": replace(recipe, schedule=replace(taught, teacher="ema"), ema=EMASection(0.5)),
    }


@pytest.fixture(scope="module")
def trained(recipes, tmp_path_factory):
    """The results of one process by teacher, of two by teacher and mode, and their folder."""
    root = tmp_path_factory.mktemp("zones")
    one = {name: run(Job(recipe, root / f"one {name}")) for name, recipe in recipes.items()}
    jobs = {
        (name, mode): Job(in_mode(recipes[name], mode), root / f"{name} {mode}")
        for name, mode in RUNS
    }
    results, _ = train_on_two(list(jobs.values()), root / "jobs")
    return one, dict(zip(jobs, results, strict=True)), root


@pytest.mark.parametrize(("teacher", "mode"), RUNS)
def test_two_processes_have_the_losses_of_one(recipes, trained, teacher, mode):
    ones, two, root = trained
    one, (first, second) = ones[teacher], two[teacher, mode]
    assert set(one["names"].values()) == {"2", "3"}
    assert one["ended"] == first["ended"] == second["ended"] == "finished", first["ended"]
    assert losses(first) == losses(second)
    assert losses(first) == pytest.approx(losses(one), rel=1e-5)
    assert first["held_out"] == pytest.approx(one["held_out"], rel=1e-5)
    before = VARiant.from_pretrained(recipes[teacher].model.weights).var.state_dict()
    after = VARiant.from_pretrained(root / f"{teacher} {mode}").var.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert any(v.any() for k, v in after.items() if k.endswith("lora_B"))


def test_both_teachers_are_the_frozen_network(trained):
    one = trained[0]
    assert losses(one["frozen"]) == losses(one["ema"])
    # The first step has the same weights and a divergence more.
    assert losses(one["ema"])[0] > losses(one["none"])[0]


@pytest.mark.parametrize("mode", [mode for teacher, mode in RUNS if teacher == "ema"])
def test_two_processes_have_the_averages_of_one(trained, mode):
    root = trained[2]
    one = torch.load(root / "one ema" / "var-last.pt", weights_only=True)
    two = tensors_in(root / f"ema {mode}")
    assert one["ema"]
    assert all(map(is_zone_key, one["ema"]))
    for name, average in one["ema"].items():
        torch.testing.assert_close(two[f"ema.{name}"], average, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(average, one["module"][k]) for k, average in one["ema"].items())
