"""Several processes train the zone weights that one process trains."""

import dataclasses

import pytest
import torch
from rank_jobs import Job, run
from test_distributed import in_mode, losses, train_on_two
from tiny_runs import OPTIM, tiny_recipe

from variant.checkpoints.model_folder import save_model
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant.training.optim import OptimSection
from variant.training.recipe import Recipe, starting_from

MODES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def start(folders, tmp_path_factory) -> Recipe:
    """A recipe of zone weights of two depths, over a network of random weights."""
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
    return starting_from(replace(recipe, schedule=schedule), str(folder))


def test_two_processes_have_the_losses_of_one(start, tmp_path):
    one = run(Job(start, tmp_path / "one"))
    assert set(one["names"].values()) == {"2", "3"}
    jobs = [Job(in_mode(start, mode), tmp_path / mode) for mode in MODES]
    folder = start.model.weights
    results, _ = train_on_two(jobs, tmp_path / "jobs")
    for mode, (first, second) in zip(MODES, results, strict=True):
        assert first["ended"] == second["ended"] == "finished", first["ended"]
        assert losses(first) == losses(second)
        assert losses(first) == pytest.approx(losses(one), rel=1e-5)
        assert first["held_out"] == pytest.approx(one["held_out"], rel=1e-5)
        before = VARiant.from_pretrained(folder).var.state_dict()
        after = VARiant.from_pretrained(tmp_path / mode).var.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert any(not torch.equal(v, torch.zeros_like(v)) for k, v in after.items()
                   if k.endswith("lora_B"))  # fmt: skip
