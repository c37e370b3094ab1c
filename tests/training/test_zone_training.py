"""Zone weights are trained over a frozen full network."""

import dataclasses

import pytest
import torch
from tiny_runs import (
    CPU,
    OPTIM,
    assert_same,
    metrics,
    quiet,
    resume,
    run_until,
    tiny_recipe,
    train_both,
)

from variant.errors import UserError
from variant.models.zones import is_zone_key
from variant.supernet import VARiant
from variant.training.initial_weights import find_start
from variant.training.recipe import starting_from
from variant.training.var_task import VARTask, train_var

KINDS = {
    "adaln": {"zone_weights": "adaln"},
    "lora": {"zone_weights": "lora", "lora_rank": 4},
    "copies": {"zone_weights": "copies"},
}


@pytest.fixture(scope="module")
def start(folders, tmp_path_factory):
    """A recipe of zone weights, started from a model of which only the full network was trained."""
    recipe, folder = tiny_recipe(folders), tmp_path_factory.mktemp("start")
    full = dataclasses.replace(recipe.schedule, depths=(), joint=6, transition=0, refinement=0)
    recipe = dataclasses.replace(
        recipe,
        optim=dataclasses.replace(OPTIM, learning_rate=3e-3),
        data=dataclasses.replace(recipe.data, mixup=0.0, copies=2),
        schedule=full,
    )
    train_both(recipe, folder)
    return starting_from(recipe, str(folder)), folder


def zone_recipe(start, kind, **changes):
    recipe, _ = start
    schedule = dataclasses.replace(
        recipe.schedule, depths=(2,), joint=0, refinement=6, **KINDS[kind], **changes
    )
    return dataclasses.replace(recipe, schedule=schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_2_improves_and_the_full_network_stays_bit_by_bit(start, kind, tmp_path):
    console = quiet()
    train_var(zone_recipe(start, kind), tmp_path, console=console, device=CPU)
    assert "parameters are trained, the full network is frozen" in console.file.getvalue()
    before, after = (VARiant.from_pretrained(folder) for folder in (start[1], tmp_path))
    state = after.var.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.var.state_dict().items())
    for depth in (None, 2):
        ours, theirs = (m.generate([0, 1], depth=depth, seed=3) for m in (before, after))
        if depth is None:
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.images, theirs.images)
    entries = metrics(tmp_path)
    assert {name for entry in entries for name in entry["train"]} == {"2"}
    assert len({entry["held_out"]["full"] for entry in entries}) == 1
    losses = [entry["held_out"]["2"] for entry in entries]
    assert min(losses) < losses[0]
    # Below the loss without training: that of the full network's own layers.
    shared = dataclasses.replace(start[0].schedule, depths=(2,), joint=0, refinement=1)
    frozen = dataclasses.replace(
        start[0], schedule=shared, optim=dataclasses.replace(OPTIM, learning_rate=1e-12)
    )
    untrained = train_var(frozen, tmp_path / "untrained", console=quiet(), device=CPU)
    assert min(losses) < untrained.held_out_loss["2"]
    torch.testing.assert_close(entries[0]["held_out"]["full"], untrained.held_out_loss["full"])


def test_only_zone_weights_have_optimiser_state(start, tmp_path):
    train_var(zone_recipe(start, "lora"), tmp_path, console=quiet(), device=CPU)
    saved = torch.load(tmp_path / "var-last.pt", weights_only=True)
    own = [value for key, value in saved["module"].items() if is_zone_key(key)]
    moments = saved["optimizer"]["state"].values()
    assert sorted(m["exp_avg"].numel() for m in moments) == sorted(v.numel() for v in own)


def test_a_resumed_run_has_the_same_weights(start, tmp_path, monkeypatch):
    recipe = zone_recipe(start, "lora")
    train_var(recipe, tmp_path / "whole", console=quiet(), device=CPU)
    run_until(recipe, tmp_path / "cut", monkeypatch, train_var, VARTask, step=3)
    resume(recipe, tmp_path / "cut", train_var)
    whole, cut = (VARiant.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert_same(whole.var.state_dict(), cut.var.state_dict())


def test_a_model_with_zone_weights_is_trained_further(start, tmp_path):
    recipe = zone_recipe(start, "lora")
    train_var(recipe, tmp_path / "first", console=quiet(), device=CPU)
    further = starting_from(recipe, str(tmp_path / "first"))
    module = VARiant.from_pretrained(tmp_path / "first").var
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    for weight in module.parameters():
        weight.data.zero_()
    find_start(further).load_into(module, further)
    assert_same(module.state_dict(), expected)
    for changes, key in (
        ({"lora_rank": 5}, "schedule.lora_rank must be 4, as in the model; got 5"),
        ({"zone_weights": "copies", "lora_rank": 0}, "schedule.zone_weights must be 'lora'"),
        ({"zone_weights": "shared", "lora_rank": 0}, "schedule.zone_weights must be 'lora'"),
        ({"depths": (3,), "zone_weights": "shared", "lora_rank": 0}, "the subnets must be those"),
    ):
        other = dataclasses.replace(
            further, schedule=dataclasses.replace(further.schedule, **changes)
        )
        with pytest.raises(UserError, match=f"cannot start from .*{key}"):
            train_var(other, tmp_path / "other", console=quiet(), device=CPU)


def test_a_recipe_without_a_trained_model_is_refused(start, tmp_path):
    recipe = zone_recipe(start, "lora")
    random = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights=None))
    with pytest.raises(UserError, match=r"model\.weights must name a trained model with zone_wei"):
        train_var(random, tmp_path, console=quiet(), device=CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint": 1}, r"joint and transition must be 0; got \(1, 0\)"),
        ({"final_probability": 0.8}, "final_probability must be 1; got 0.8"),
        ({"depths": ()}, "depths or schedules must not be empty"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, such as 16"),
        ({"zone_weights": "copies"}, 'lora_rank must be 0 with zone_weights "copies"; got 4'),
        ({"bridge": 3}, "bridge and schedule.bridges must be below 3"),
        ({"bridges": (1, 3)}, "bridge and schedule.bridges must be below 3"),
        ({"schedules": ((3, 3, 3),)}, "schedules must end in a subnet"),
    ],
)
def test_schedules_without_zone_tokens_are_refused(start, changes, message):
    recipe = zone_recipe(start, "lora")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, **changes))


def test_the_papers_phases_are_the_refinement_alone(start):
    section = zone_recipe(start, "lora").schedule
    paper = dataclasses.replace(section, joint=None, transition=None, refinement=None)
    assert (
        paper.phase_lengths.joint,
        paper.phase_lengths.transition,
        paper.phase_lengths.refinement,
    ) == (0, 0, 15)
    assert paper.probability(0) == 1


def test_compiled_blocks_are_refused(start):
    recipe = zone_recipe(start, "lora")
    section = dataclasses.replace(recipe.compile, blocks=True)
    with pytest.raises(ValueError, match=r"compile\.blocks must be false with zone_weights"):
        dataclasses.replace(recipe, compile=section)
