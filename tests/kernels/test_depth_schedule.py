"""Depth schedules: their plain values, names, limits, and the check against a model."""

import re

import pytest

from variant_kernels.plans.cache_plan import PageAllocator
from variant_kernels.plans.depth_schedule import DepthSchedule, check_schedule, schedule_name

SCHEDULE = DepthSchedule.from_depths([[0, 1, 2, 3], [0, 1, 3], [0, 3]])
VALUES = {
    "format": "variant-schedule-1",
    "full_depth": 4,
    "layers": [[0, 1, 2, 3], [0, 1, 3], [0, 3]],
}


def test_plain_values_give_back_the_schedule():
    assert SCHEDULE.to_dict() == VALUES
    assert DepthSchedule.from_dict({**VALUES, "about": object()}) == SCHEDULE
    one = {"format": "variant-schedule-1", "full_depth": 1, "layers": [[0]]}
    assert DepthSchedule.from_dict(one) == DepthSchedule(1, 1, 1, 0)
    longest = {**VALUES, "layers": [[0, 3]] * 1024}
    assert DepthSchedule.from_dict(longest).num_scales == 1024


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "variant-schedule-2"}, ValueError,
         '"format" must be "variant-schedule-1"; got \'variant-schedule-2\''),
        ({"format": None}, ValueError, '"format" must be "variant-schedule-1"; got None'),
        ({"b": 1, "a": 1}, ValueError, "unknown key 'a'"),
        ({"full_depth": ..., "layers": ...}, ValueError, "missing key 'full_depth'"),
        ({"layers": ..., "a": 1}, ValueError, "missing key 'layers'"),
        ({"full_depth": 0}, ValueError, "full_depth must be an integer in [1, 1024]; got 0"),
        ({"layers": 3}, TypeError, "layers must be a list of 1 to 1024 lists of layers, one for "
         "each scale; got 3 (int)"),
        ({"layers": []}, ValueError, "layers must be a list of 1 to 1024 lists of layers, one for "
         "each scale; got [] (list)"),
        ({"layers": [[0, 3]] * 1025}, ValueError, "layers must be a list of 1 to 1024 lists"),
        ({"layers": [[0, 3], [0, 1, 3]]}, ValueError, "the layers of scale 1 must be a subset of "
         "those of scale 0, whose K/V they read; layers [1] are new"),
    ],
)  # fmt: skip
def test_other_values_are_refused(change, error, message):
    values = {key: value for key, value in {**VALUES, **change}.items() if value is not ...}
    with pytest.raises(error, match=re.escape(f"DepthSchedule.from_dict: {message}")):
        DepthSchedule.from_dict(values)


def test_names_count_equal_depths_in_a_row():
    assert schedule_name([8, 8, 8, 8, 4, 2]) == "8x4-4-2"
    assert schedule_name([8]) == "8"
    assert schedule_name([4, 4, 2, 2]) == "4x2-2x2"


def test_schedules_are_equal_if_depth_and_layers_are():
    longer = DepthSchedule.from_depths([[0, 1], [0, 1]], full_depth=2)
    assert longer != DepthSchedule.from_depths([[0, 1]], full_depth=2)
    assert DepthSchedule.from_depths([[0, 1, 2, 3], [0, 2, 3], [0, 3]]) != SCHEDULE
    assert SCHEDULE != 3
    assert repr(SCHEDULE) == "DepthSchedule(full_depth=4, depths=[4, 3, 2])"


def test_the_first_and_the_last_layer_and_scale():
    assert DepthSchedule(4, 1, 2, 0).layers == ((0, 3),)
    assert [SCHEDULE.last_scale(layer) for layer in range(4)] == [2, 1, 0, 2]
    assert SCHEDULE.is_active(3, 2)
    assert not SCHEDULE.is_active(1, 2)
    for call in (SCHEDULE.last_scale, lambda layer: SCHEDULE.is_active(layer, 0)):
        for layer in (-1, 4):
            with pytest.raises(ValueError, match=rf"layer must be .* in \[0, 3\]; got {layer}"):
                call(layer)
    for scale in (-1, 3):
        with pytest.raises(ValueError, match=rf"scale must be .* in \[0, 2\]; got {scale}"):
            SCHEDULE.is_active(0, scale)
    with pytest.raises(ValueError, match="must start with 0 and end with 0; got "):
        DepthSchedule.from_depths([[]])


@pytest.mark.parametrize("scales", [3, None])
def test_a_schedule_must_fit_the_model(scales):
    assert check_schedule("op", SCHEDULE, None, 4, scales) is SCHEDULE
    message = f"op: depth must be a schedule of 5 layers and {scales or 3} scales; got one of 4 and"
    with pytest.raises(ValueError, match=f"^{message} 3$"):
        check_schedule("op", SCHEDULE, None, 5, scales)
    with pytest.raises(ValueError, match=r"^op: bridge must be None with a schedule.*; got 2$"):
        check_schedule("op", SCHEDULE, 2, 4, scales)


def test_a_schedule_must_have_the_scales_of_the_model():
    with pytest.raises(ValueError, match=r"^op: plan must be .* 4 layers and 2 scales; got one"):
        check_schedule("op", SCHEDULE, None, 4, 2, "plan")
    assert check_schedule("op", SCHEDULE, None, 4, None) is SCHEDULE


def test_a_new_allocator_has_created_no_page():
    allocator = PageAllocator(4)
    assert (allocator.created_pages, allocator.used_pages, allocator.used_tokens) == (0, 0, 0)
    assert allocator.grow(0, 5) == (0, 1)
    assert (allocator.created_pages, allocator.used_pages, allocator.used_tokens) == (2, 2, 5)
