"""Schedules by scale: their files and names, and every function that takes one."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from small_models import small_model
from zone_models import zone_model

import variant
from variant.engine.planning import plan_row, schedule_row
from variant.errors import UserError
from variant.schedule_files import layers_by_scale, load_schedule, save_schedule
from variant.training.recipe import load_recipe
from variant_kernels import DepthSchedule

# Layers that no depth of the small model has: 4, 3 (0, 1, 3) and 2 layers.
LAYERS = [[0, 1, 2, 3], [0, 1, 3], [0, 3]]
SCHEDULE = DepthSchedule.from_depths(LAYERS)
GOOD = {"format": "variant-schedule-1", "full_depth": 4, "layers": LAYERS}


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture
def file(tmp_path):
    save_schedule(tmp_path / "schedule.json", SCHEDULE, {"model": "small"})
    return str(tmp_path / "schedule.json")


def test_a_file_gives_back_its_schedule(file, small):
    assert load_schedule(file) == load_schedule(file, small.var.config) == SCHEDULE
    assert json.loads(Path(file).read_text())["about"] == {"model": "small"}
    assert DepthSchedule.from_dict(SCHEDULE.to_dict()) == SCHEDULE
    assert DepthSchedule.from_depths([8] * 4 + [4, 2]).name == "8x4-4-2"


def test_a_name_takes_the_layers_that_the_model_records(small, tmp_path, monkeypatch):
    config = small.var.config
    assert load_schedule("4-3-2", config).layers == ((0, 1, 2, 3), (0, 2, 3), (0, 3))
    assert load_schedule("4x3", config) == DepthSchedule.full(4, 3)
    monkeypatch.chdir(tmp_path)  # a file of that name comes first
    save_schedule(tmp_path / "4-3-2", SCHEDULE)
    assert load_schedule("4-3-2", config) == SCHEDULE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("4-3", "one depth for each of the 3 scales of the model; it has 2"),
        ("4x9999", "it has 1025"),
        ("3-4-2", "must be a subset"),
        ("4-3-1", "must be an integer in [2, 4]"),
        ("5x3", "must be an integer in [2, 4]"),
        ("4x0-3x3", "4x0 must be a depth at one scale or more"),
        ("4x3-3x0", "3x0 must be a depth at one scale or more"),
        ("4x00-4x3", "4x00 must be a depth at one scale or more"),
        ("nothing.json", "no such file"),
    ],
)
def test_bad_names_are_refused_in_one_line(small, name, message):
    with pytest.raises(UserError, match=rf"^{name}: .*{re.escape(message)}") as caught:
        load_schedule(name, small.var.config)
    assert "\n" not in str(caught.value)


def test_a_recipe_refuses_a_depth_at_no_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert layers_by_scale("4x2-3") == [4, 4, 3]
    with pytest.raises(UserError, match=r"^4x3-3x0: 3x0 must be a depth at one scale or more"):
        layers_by_scale("4x3-3x0")


def test_a_recipe_names_the_file_of_a_schedule_of_another_model(tmp_path):
    for full_depth, scales in ((7, 6), (8, 5)):
        path = tmp_path / f"{full_depth}.json"
        save_schedule(path, DepthSchedule.full(full_depth, scales))
        message = f"{re.escape(str(path))}: it must be a schedule of 8 layers and 6 scales; got one"
        message += f" of {full_depth} and {scales}$"
        with pytest.raises(UserError, match=rf"^digits: schedule\.schedules: {message}") as caught:
            load_recipe("digits", overrides=(f'schedule.schedules=["{path}"]',))
        assert "\n" not in str(caught.value)
    save_schedule(path, DepthSchedule.from_depths([8] * 5 + [[0, 7]]))
    recipe = load_recipe("digits", overrides=(f'schedule.schedules=["{path}"]',))
    assert recipe.schedule.schedules[0][-1] == (0, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "values must be of type Mapping"),
        ({"format": "variant-plan-1"}, '"format" must be "variant-schedule-1"'),
        ({"layers": None}, "layers must be a list of 1 to 1024 lists"),
        ({"layers": []}, "layers must be a list of 1 to 1024 lists"),
        ({"layers": [[0, 3]] * 1025}, "layers must be a list of 1 to 1024 lists"),
        ({"layers": [3]}, r"layers\[0\] must be a list of integers; got 3"),
        ({"layers": [[0, 1.5, 3]]}, r"layers\[0\]\[1\] must be an integer; got 1.5"),
        ({"layers": [[0, True, 3]]}, r"layers\[0\]\[1\] must be an integer; got True"),
        ({"layers": [[0, 2, 1, 3]]}, r"layers\[0\], a list of layers, must be ascending"),
        ({"layers": [[1, 3]]}, r"layers\[0\], a list of layers, must start with 0"),
        ({"layers": [[0, 3], [0, 1, 3]]}, r"scale 1 must be a subset .* layers \[1\] are new"),
        ({"full_depth": 10**9}, r"full_depth must be an integer in \[1, 1024\]"),
        ({"full_depth": "4"}, "full_depth must be an integer"),
        ({"more": 1}, "unknown key 'more'"),
        ({"full_depth": 5, "layers": [[0, 4]] * 3}, "must be a schedule of 4 layers and 3 scales"),
        ({"layers": [LAYERS[0]] * 2}, "must be a schedule of 4 layers and 3 scales; got one of 4"),
    ],
)
def test_bad_files_are_refused_in_one_line(small, tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, **change} if isinstance(change, dict) else change))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*{message}") as caught:
        load_schedule(path, small.var.config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layers",
    [
        [list(range(200_000))],  # not the last layer
        [[0, *[1] * 200_000, 3]],  # repeats
    ],
)
def test_a_message_does_not_list_thousands_of_layers(small, tmp_path, layers):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, "layers": layers}))
    with pytest.raises(UserError) as caught:
        load_schedule(path, small.var.config)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="are new") as new:
        DepthSchedule.from_depths([[0, 1023], list(range(1024))], full_depth=1024)
    assert len(str(new.value)) < 400


def test_what_is_no_file_of_a_schedule_is_refused(tmp_path, small):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("{")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "text", "bytes", "missing", "."):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}: "):
            load_schedule(tmp_path / name, small.var.config)
    for source in (3, None, b"4-3-2", SCHEDULE):
        with pytest.raises(TypeError, match="load_schedule: source must be of type str"):
            load_schedule(source)
    with pytest.raises(TypeError, match="config must be of type VARConfig"):
        load_schedule("4-3-2", small)


def test_the_engine_runs_every_scales_layers(small, file):
    schedule = variant.load_schedule(file)
    for model in (small, zone_model("lora")):
        result = model.generate([1, 2], depth=schedule, seed=0)
        assert result.stats.depths == (4, 3, 2)
        assert result.stats.kv_planned_bytes == result.stats.kv_allocated_bytes
        engine, labels_B = model.engine(), torch.tensor([1, 2])
        cached = engine.forced_logits(labels_B, result.tokens, depth=schedule)
        forward = model.var(labels_B, model.vae.teacher_input(result.tokens), schedule)
        assert (cached - forward).abs().max() < 1e-4 * forward.abs().max()


def test_a_depth_may_change_from_any_scale_of_a_schedule(small):
    result = small.generate(
        [1], depth=SCHEDULE, seed=0, on_scale=lambda scale, _: [0, 3] if scale == 0 else None
    )
    assert result.stats.depths == (4, 2, 2)
    assert result.stats.postponed == ()


@pytest.mark.parametrize("options", [{"bridge": 1}, {"depth": DepthSchedule.full(4, 2)}])
def test_a_schedule_that_does_not_fit_is_refused(small, options):
    with pytest.raises(ValueError, match=r"generate: (bridge must be None|depth must be a sched)"):
        small.generate([1], **{"depth": SCHEDULE, **options})


def test_the_plan_of_a_schedule_is_that_of_its_depth_and_bridge(small):
    config = small.var.config
    for depth in (2, 3):
        schedule = small.var.schedule(depth, 1)
        assert schedule_row(config, schedule, 8, "float32") == plan_row(
            config, depth, 1, 8, "float32"
        )


def test_what_json_cannot_hold_is_named_and_leaves_no_file(tmp_path):
    schedule = DepthSchedule(4, 3, 2, 1)
    for about in ({"x": object()}, {"x": {(1, 2): 3}}):
        with pytest.raises(TypeError, match=r"^save_schedule: about must hold"):
            save_schedule(tmp_path / "a.json", schedule, about)
    message = r"^save_schedule: about\['cost'\]\[1\] must be finite, .*; got nan"
    with pytest.raises(ValueError, match=message):
        save_schedule(tmp_path / "a.json", schedule, {"cost": [1.0, float("nan")]})
    assert list(tmp_path.iterdir()) == []
