"""The configurations of a recipe: names, bridges, schedules by scale, and what a step trains."""

import dataclasses
import re
from collections import Counter

import pytest
import torch
from tiny_runs import CPU, metrics, quiet, resume, run_until, tiny_recipe, trained_vae

from variant.errors import UserError
from variant.models.var import VAR
from variant.schedule_files import save_schedule
from variant.training.configurations import Configurations, schedule_name
from variant.training.recipe import load_recipe
from variant.training.resume_rules import compare_recipes, compare_schedules
from variant.training.schedule import choose_bridge, choose_depth
from variant.training.var_task import VARTask, train_var
from variant_kernels import DepthSchedule

PHASES = {"joint": 1, "transition": 2, "refinement": 1}


def with_schedule(recipe, **values):
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, **values))


def with_depth(recipe, depth):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, depth=depth))


@pytest.mark.parametrize(
    ("depths", "name"),
    [((8, 8, 8, 8, 4, 2), "8x4-4-2"), ((4,), "4"), ((8, 4), "8-4"), ((2, 2, 2), "2x3")],
)
def test_a_schedule_is_named_by_its_depths(depths, name):
    assert schedule_name(depths) == name


def test_the_evaluation_has_the_full_network_then_depths_then_schedules(recipe):
    chosen = with_schedule(recipe, depths=(2,), schedules=((3, 3, 2),), bridges=(0, 2))
    evaluated = Configurations(chosen, 2).evaluated()
    assert {part.name: part.schedule.depths for part in evaluated} == {
        "full": (3, 3, 3),
        "2": (3, 2, 2),  # the model's bridge is 1, whatever the steps draw
        "3x2-2": (3, 3, 2),
    }
    assert evaluated[0].is_full
    assert not evaluated[1].is_full


def test_bridges_are_drawn_uniformly_and_apart_from_the_subnet():
    steps = 6000
    pairs = Counter(
        (choose_depth(5, step, 1.0, (2, 4)), choose_bridge(5, step, (1, 2, 3)))
        for step in range(steps)
    )
    # Five standard deviations of a binomial: 0.024.
    assert len(pairs) == 6
    assert all(count / steps == pytest.approx(1 / 6, abs=0.024) for count in pairs.values())
    assert [choose_bridge(5, step, (4,)) for step in range(9)] == [4] * 9
    again = [choose_bridge(5, step, (1, 2, 3)) for step in reversed(range(50))][::-1]
    assert again == [choose_bridge(5, step, (1, 2, 3)) for step in range(50)]


def test_every_step_has_one_configuration_of_the_recipe(recipe):
    chosen = with_schedule(
        with_depth(recipe, 4),
        depths=(2, 3), bridges=(0, 2), schedules=((4, 3, 2),),
        joint=100, transition=0, refinement=0, joint_probability=0.75,
    )  # fmt: skip
    configurations = Configurations(chosen, 30)
    steps = [configurations.of_step(step) for step in range(3000)]
    counts = Counter((part.name, part.schedule.depths) for part in steps)
    expected = {("full", (4, 4, 4)): 0.25, ("4-3-2", (4, 3, 2)): 0.25}
    for depth in (2, 3):
        expected[f"{depth}", (depth,) * 3] = 0.125
        expected[f"{depth}", (4, 4, depth)] = 0.125
    assert counts.keys() == expected.keys()
    for key, share in expected.items():
        assert counts[key] / 3000 == pytest.approx(share, abs=0.04)  # five standard deviations
    other = Configurations(dataclasses.replace(chosen, seed=1), 30)
    assert [other.of_step(step).name for step in range(50)] != [part.name for part in steps[:50]]


def test_a_schedule_trains_as_masked_layers_do(recipe):
    """Against every layer on all tokens, whose results inactive scales do not take."""
    chosen = with_schedule(with_depth(recipe, 4), schedules=((4, 3, 2),))
    torch.manual_seed(0)
    module = VAR(chosen.var_config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    schedule = Configurations(chosen, 2).by_scale[4, 3, 2].schedule
    assert schedule.layers == ((0, 1, 2, 3), (0, 2, 3), (0, 3))
    labels_B, teacher = torch.tensor([0, 1]), torch.randn(2, 20, 4)
    given = module(labels_B, teacher, schedule)

    layout = module.layout
    scale_L = torch.cat([torch.full((n,), k) for k, n in enumerate(layout.tokens)])
    cond_BC = module.class_emb(labels_B)
    start = cond_BC.unsqueeze(1) + module.pos_start
    x_BLC = torch.cat((start, module.word_embed(teacher)), 1) + module.position_embedding()
    for layer, block in enumerate(module.layers()):
        runs_L = torch.tensor([layer in schedule.layers[k] for k in scale_L.tolist()])
        x_BLC = torch.where(runs_L[None, :, None], block(x_BLC, cond_BC, layout), x_BLC)
    expected = module.head(module.head_nm(x_BLC, cond_BC))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    given.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_layers_of_a_schedule_are_recorded_in_the_model(recipe):
    chosen = with_schedule(with_depth(recipe, 4), depths=(2,), schedules=((4, 3, 3), (3, 3, 2)))
    assert chosen.var_config.subnets == {2: (0, 3), 3: (0, 2, 3)}


def test_without_given_phases_the_last_depth_of_a_schedule_counts(recipe):
    values = dict.fromkeys(PHASES)
    chosen = with_schedule(with_depth(recipe, 8), depths=(), schedules=((8, 8, 4),), **values)
    assert chosen.schedule.phase_lengths.total == 32  # table 7, depth 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedules": ((3, 2),)}, r"schedules must have 3 depths each, .* got \[3, 2\]"),
        ({"schedules": ((2, 3, 3),)}, r"depths that never rise; got \[2, 3, 3\]"),
        ({"schedules": ((9, 2, 2),)}, r"schedule.schedules: depth must be an integer in \[2, 3\]"),
        ({"schedules": ((3, 3, 2), (3, 3, 2))}, "schedules must not repeat"),
        ({"schedules": ((),)}, "schedules must have 3 depths each"),
        ({"bridges": (1, 4)}, r"schedule.bridges must be in \[0, 3\]; got 4"),
        ({"bridges": (1, 1)}, "bridges must not repeat"),
        ({"final_probability": 1.5}, "final_probability must be <= 1; got 1.5"),
    ],
)
def test_mistakes_are_named(recipe, values, message):
    with pytest.raises(ValueError, match=message):
        with_schedule(recipe, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bridges": (1, 2)}, r"schedule.bridges \[\] -> \[1, 2\]"),
        ({"schedules": ((3, 2, 2),)}, r"schedule.schedules \[\] -> \[\[3, 2, 2\]\]"),
    ],
)
def test_a_run_goes_on_with_its_own_subnets_only(recipe, values, message):
    with pytest.raises(UserError, match=f"FILE: was written with other settings: {message}"):
        compare_recipes(recipe, with_schedule(recipe, **values), "var", "FILE")


@pytest.mark.parametrize(("epochs", "is_allowed"), [(0.5, True), (1.0, True), (1.5, False)])
def test_the_final_probability_may_change_until_the_transition(recipe, epochs, is_allowed):
    chosen = with_schedule(recipe, final_probability=0.5)
    assert compare_recipes(recipe, chosen, "var", "FILE") == [
        "schedule.final_probability 1.0 -> 0.5"
    ]
    if is_allowed:
        compare_schedules(recipe, chosen, "var", round(epochs * 100), 100, "FILE")
    else:
        with pytest.raises(UserError, match=r"final_probability 1; got 1, 2 and 0.5"):
            compare_schedules(recipe, chosen, "var", round(epochs * 100), 100, "FILE")


def test_with_the_same_probability_at_both_ends_every_phase_may_change(recipe):
    flat = with_schedule(recipe, final_probability=0.2)
    compare_schedules(flat, with_schedule(flat, joint=0), "var", 250, 100, "FILE")


def test_a_recipe_of_all_kinds_of_subnets_trains_and_resumes(folders, tmp_path, monkeypatch):
    recipe = with_schedule(
        tiny_recipe(folders),
        schedules=((3, 3, 2), (3, 2, 2)), bridges=(0, 1, 2), final_probability=0.8,
    )  # fmt: skip
    trained_vae(recipe, tmp_path / "whole")
    trained = []
    forward = VAR.forward

    def spy(self, labels, x_teacher, schedule=None, **rest):
        if self.training:
            trained.append(schedule)
        return forward(self, labels, x_teacher, schedule, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(VAR, "forward", spy)
        summary = train_var(recipe, tmp_path / "whole", console=quiet(), device=CPU)
    configurations = Configurations(recipe, 2)
    assert trained == [configurations.of_step(step).schedule for step in range(8)]
    assert set(summary.held_out_loss) == {"full", "2", "3x2-2", "3-2x2"}

    trained_vae(recipe, tmp_path / "parted")
    run_until(recipe, tmp_path / "parted", monkeypatch, train_var, VARTask)
    resume(recipe, tmp_path / "parted", train_var)
    states = [torch.load(tmp_path / part / "var-last.pt") for part in ("whole", "parted")]
    for name, weight in states[0]["module"].items():
        assert torch.equal(weight, states[1]["module"][name])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parted")


LAYERS = ((0, 1, 2, 3), (0, 1, 3), (0, 3))


def test_layers_by_scale_have_a_name_of_their_own(recipe):
    others = (*LAYERS[:1], (0, 2, 3), (0, 3))
    schedules = ((4, 3, 2), LAYERS, others)
    chosen = with_schedule(with_depth(recipe, 4), depths=(2,), schedules=schedules)
    configurations = Configurations(chosen, 2)
    names = [part.name for part in configurations.evaluated()]
    assert names[:3] == ["full", "2", "4-3-2"]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"4-3-2-layers[0-9a-f]{6}", name) for name in names[3:])
    assert configurations.by_scale[LAYERS].schedule.layers == LAYERS
    assert chosen.var_config.subnets.keys() == {2, 3}  # those of the depths alone


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (((4, (0, 3), (0, 1, 3)),), "depths that never rise"),
        (((4, (0, 1, 3), (0, 2, 3)),), r"schedules: the layers of scale 2 must be a subset"),
        (((4, (0, 1, 3), (0, 2)),), "must start with 0 and end with 3"),
    ],
)
def test_bad_layers_by_scale_are_refused(recipe, schedules, message):
    with pytest.raises(ValueError, match=message):
        with_schedule(with_depth(recipe, 4), schedules=schedules)


def test_the_file_or_the_name_of_a_schedule_stands_for_its_layers(tmp_path):
    file = tmp_path / "schedule.json"
    layers = ((*range(8),),) * 4 + ((0, 1, 2, 5, 7), (0, 7))
    save_schedule(file, DepthSchedule.from_depths(layers))
    given = [f'schedule.schedules=["{file}", "8x4-4-2"]']
    recipe = load_recipe("digits", overrides=given)
    assert recipe.schedule.schedules == (layers, (8, 8, 8, 8, 4, 2))
    assert load_recipe("digits", overrides=[f"schedule.schedules={file}"]).schedule.schedules == (
        layers,
    )
    file.unlink()
    with pytest.raises(UserError, match=r"schedule\.json: no such file"):
        load_recipe("digits", overrides=given)
    save_schedule(file, DepthSchedule.full(7, 6))
    with pytest.raises(UserError, match="schedule of 8 layers and 6 scales; got one of 7 and 6"):
        load_recipe("digits", overrides=given)


def test_a_run_trains_a_schedule_of_layers_and_resumes(folders, tmp_path, monkeypatch):
    layers = ((0, 1, 2), (0, 2), (0, 2))
    recipe = with_schedule(tiny_recipe(folders), depths=(), schedules=(layers,))
    trained_vae(recipe, tmp_path)
    run_until(recipe, tmp_path, monkeypatch, train_var, VARTask)
    summary = resume(recipe, tmp_path, train_var)
    name = Configurations(recipe, 2).by_scale[layers].name
    assert set(summary.held_out_loss) == {"full", name}
