"""Layouts, schedules, plans and the cache: numbers of every library, and refusals that say why."""

import copy
import io
import pickle
import time

import numpy as np
import pytest
import torch

from variant_kernels import CachePlan, DepthSchedule, PagedKVCache, ScaleLayout, select_layers
from variant_kernels.plans.depth_schedule import DEPTH_CHAIN
from variant_kernels.plans.scale_layout import MAX_SCALES

LAYOUT = ScaleLayout.from_patch_nums((1, 2, 3))
SCHEDULE = DepthSchedule(4, 3, 2, 1)
PLAN = CachePlan(LAYOUT, SCHEDULE)


def new_cache(**changes):
    sizes = {"batch": 2, "num_heads": 1, "head_dim": 16, "dtype": torch.float32} | changes
    return PagedKVCache(PLAN, **sizes)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor], ids=lambda n: n.__name__)
def test_numbers_of_numpy_and_torch(number):
    assert ScaleLayout.from_patch_nums([number(1), (number(2), number(3))]).tokens == (1, 6)
    assert ScaleLayout(((number(2), number(2)),)) == ScaleLayout(((2, 2),))
    assert LAYOUT.slice(number(1)) == slice(1, 5)
    assert select_layers(number(30), number(4)) == (0, 8, 21, 29)
    schedule = DepthSchedule(number(4), number(3), number(2), number(1))
    assert schedule == SCHEDULE
    assert schedule.switched(number(2), number(2)) == SCHEDULE
    assert CachePlan(LAYOUT, SCHEDULE, number(16)).peak_pages == PLAN.peak_pages
    args = number(1), number(2), number(16)
    assert PLAN.peak_bytes(*args, "float32") == PLAN.peak_bytes(1, 2, 16, "float32")
    assert PLAN.paper_bytes(*args) == PLAN.paper_bytes(1, 2, 16)
    assert type(PLAN.peak_bytes(*args, "float32")) is int
    cache = new_cache(batch=number(2), num_heads=number(1), head_dim=number(16))
    cache.open(number(0), number(0))
    cache.close(number(0), number(0))


@pytest.mark.parametrize("layers", [[0, 3], (0, 3), range(0, 4, 3), np.array([0, 3])])
def test_lists_of_layers_of_every_kind(layers):
    for given in (layers, torch.tensor(list(layers))):
        assert DepthSchedule(4, 3, given, 1).layers[2] == (0, 3)
        assert DepthSchedule.from_depths([given, given]).layers == ((0, 3), (0, 3))
        assert DepthSchedule.full(4, 3).switched(1, given).layers[1] == (0, 3)


def test_lists_of_shapes_are_hashable_and_equal_to_tuples():
    layout = ScaleLayout([[1, 1], [2, 3]])
    assert hash(layout) == hash(ScaleLayout(((1, 1), (2, 3))))
    assert layout.shapes == ((1, 1), (2, 3))


def test_bytes_without_guidance_are_half_and_eight_bits_have_scales():
    assert 2 * PLAN.paper_bytes(3, 2, 16, guidance=False) == PLAN.paper_bytes(3, 2, 16)
    assert PLAN.paper_bytes(3, 2, 16, guidance=False) == 3 * PLAN.paper_tokens * 32 * 6
    slots = PLAN.peak_page_tokens
    assert PLAN.peak_bytes(1, 2, 16, "float8_e4m3fn", guidance=False) == 2 * slots * 2 * 17
    assert PLAN.peak_bytes(1, 2, 16, torch.float8_e4m3fn) == 2 * 2 * slots * 2 * 17
    assert PLAN.peak_bytes(1, 2, 16, "bfloat16", guidance=False) == 2 * slots * 2 * 32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ScaleLayout(()), ValueError, "shapes must have 1 to 1024 scales; got 0"),
        (lambda: ScaleLayout(3), TypeError, r"shapes must be \(\(height, width\), ...\)"),
        (lambda: ScaleLayout(((1, 1, 1),)), TypeError, r"shapes\[0\] must be \(height, width\)"),
        (lambda: ScaleLayout(((1, 0),)), ValueError, r"shapes\[0\] must be an integer >= 1; got 0"),
        (lambda: ScaleLayout(((1, 1.0),)), TypeError, r"shapes\[0\] must be an integer >= 1"),
        (lambda: ScaleLayout(((1, 2**62),)), ValueError, r"fewer than 2\^31 tokens in all"),
        (lambda: ScaleLayout(((1, 1),) * 1025), ValueError, "1 to 1024 scales; got 1025"),
        (lambda: ScaleLayout.from_patch_nums("12"), TypeError, "patch_nums must be a list"),
        (lambda: ScaleLayout.from_patch_nums(5), TypeError, "patch_nums must be a list"),
        (lambda: ScaleLayout.from_patch_nums([True]), TypeError, "an integer >= 1; got True"),
        (lambda: LAYOUT.slice(None), TypeError, r"slice: scale must be an integer in \[0, 2\]"),
        (lambda: LAYOUT.prefix(4), ValueError, r"prefix: num_scales .* in \[1, 3\]; got 4"),
        (lambda: select_layers(30, 8.0), TypeError, r"select_layers: depth .*\[2, 30\]; got 8.0"),
        (lambda: select_layers(1, 3), ValueError, r"depth must be an integer in \[1, 1\]; got 3"),
        (lambda: select_layers(8, 8, "odd"), ValueError, "selection must be one of 'nested'"),
        (lambda: select_layers(10**9, 2), ValueError, r"full_depth .* in \[1, 1024\]"),
        (lambda: DepthSchedule("3", 2, 2, 0), TypeError, r"full_depth .*; got '3' \(str\)"),
        (lambda: DepthSchedule.full(2**63, 2), ValueError, r"full_depth .* in \[1, 1024\]"),
        (lambda: DepthSchedule(4, 3, 2, None), TypeError, r"bridge must .* in \[0, 3\]; got None"),
        (lambda: DepthSchedule(4, 3, 2, 2.0), TypeError, r"bridge must .*; got 2.0 \(float\)"),
        (lambda: DepthSchedule(4, 3, "2", 1), TypeError, r"depth must be an integer in \[2, 4\]"),
        (lambda: DepthSchedule(4, 3, [0, 1.5, 3], 1), TypeError, r"depth\[1\] must be"),
        (lambda: DepthSchedule(4, 3, [], 1), ValueError, "must start with 0 and end with 3"),
        (lambda: DepthSchedule(4, 3, [0, 2, 1, 3], 1), ValueError, "ascending without repeats"),
        (lambda: DepthSchedule.from_depths([]), ValueError, "from_depths: depths must be a list"),
        (lambda: DepthSchedule.from_depths(3), TypeError, "from_depths: depths must be a list"),
        (lambda: DepthSchedule.from_depths([2, 4]), ValueError, r"full_depth|depth .*\[2, 2\]"),
        (lambda: SCHEDULE.switched(1.5, 2), TypeError, "switched: scale must be an integer"),
        (lambda: SCHEDULE.switched(2, 4), ValueError, "layers .* are new. The depth can only fall"),
        (lambda: SCHEDULE.last_scale("0"), TypeError, "last_scale: layer must be an integer"),
        (lambda: SCHEDULE.is_active(9, 0), ValueError, r"is_active: layer .* in \[0, 3\]; got 9"),
        (lambda: CachePlan(3, SCHEDULE), TypeError, r"layout must be of type ScaleLayout; got 3"),
        (lambda: CachePlan(LAYOUT, 3), TypeError, "schedule must be of type DepthSchedule; got 3"),
        (lambda: CachePlan(LAYOUT, SCHEDULE, 16.0), TypeError, "page_size must be an integer"),
        (lambda: PLAN.peak_bytes(-1, 2, 16, "float32"), ValueError, "batch must .* >= 1; got -1"),
        (lambda: PLAN.peak_bytes("2", 2, 16, "float32"), TypeError, "peak_bytes: batch must be"),
        (lambda: PLAN.paper_bytes(1, 2, 16, k_bytes=0), ValueError, "k_bytes must be"),
        (lambda: PagedKVCache(3, 1, 1, 16, torch.float32), TypeError, "plan must be of type"),
        (lambda: new_cache(num_heads=-1), ValueError, "num_heads must be an integer >= 1; got -1"),
        (lambda: new_cache(batch=1.0), TypeError, "batch must be an integer >= 1; got 1.0"),
        (lambda: new_cache(dtype="float32"), TypeError, "dtype must be of type dtype"),
        (lambda: new_cache(dtype=torch.int8), ValueError, "dtype must be a floating-point dtype"),
        (lambda: new_cache(device="nowhere"), ValueError, "device must be one that this machine"),
        (lambda: new_cache(batch=2**60), MemoryError, "the plan needs .* use a smaller batch"),
        (lambda: new_cache().switch(3), TypeError, "switch: schedule must be of type"),
        (lambda: new_cache().open(None, 0), TypeError, "open: layer must be an integer; got None"),
        (lambda: new_cache().open(1, 0), ValueError, r"expected open\(0, 0\); got open\(1, 0\)"),
        (lambda: new_cache().close(0, 0), ValueError, r"close: \(0, 0\) is not open"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument_the_range_and_the_value(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_opening_after_the_last_scale_asks_for_a_reset():
    cache = new_cache()
    for layer, scale in PLAN.layer_scale_order():
        cache.open(layer, scale)
        cache.close(layer, scale)
    for call in ((-1, 3), (0, 0), (3, 2)):
        with pytest.raises(ValueError, match=r"every scale has run: call reset\(\)"):
            cache.open(*call)
    cache.reset()
    cache.open(0, 0)


def test_a_plan_of_the_largest_sizes_takes_no_time_for_each_page():
    start = time.perf_counter()
    layout = ScaleLayout(((1, 1), (2**15, 2**15)))
    plan = CachePlan(layout, DepthSchedule(1024, 2, 2, 1), page_size=1)
    # The first scale's tokens of all layers; at the second only layers 0 and 1023 run, one by one.
    assert plan.peak_pages == 2**30 + 2
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("again", ["pickle", "deepcopy", "torch.save"])
def test_copies_keep_pages_and_slab_in_one_allocation(dtype, again):
    cache = new_cache(dtype=dtype)
    cache.open(0, 0)
    cache.k_pages.view(torch.uint8).fill_(3)
    if again == "pickle":
        copied = pickle.loads(pickle.dumps(cache))
    elif again == "deepcopy":
        copied = copy.deepcopy(cache)
    else:
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    storages = [t.untyped_storage().data_ptr() for t in (copied.k_pages, copied.v_pages)]
    assert len(set(storages)) == 1
    assert storages[0] != cache.k_pages.untyped_storage().data_ptr()
    assert torch.equal(copied.k_pages.view(torch.uint8), cache.k_pages.view(torch.uint8))
    assert copied.scales.keys() == cache.scales.keys()
    assert copied.allocated_bytes == cache.allocated_bytes
    copied.k_pages.view(torch.uint8).fill_(4)
    assert int(copied._slabs[0].view(torch.uint8)[0].flatten()[0]) == 4
    copied.close(0, 0)
    copied.open(1, 0)


def test_limits_that_are_just_allowed_and_just_not():
    """The first and the last value of each range, and the ones beside them."""
    assert ScaleLayout(((1, 2**31 - 1),)).total == 2**31 - 1
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens in all; got 2147483648"):
        ScaleLayout(((1, 2**31 - 1), (1, 1)))
    assert ScaleLayout(((1, 1),) * MAX_SCALES).num_scales == MAX_SCALES
    assert LAYOUT.prefix(1).shapes == ((1, 1),)
    assert LAYOUT.prefix(3) == LAYOUT
    for call, name, number in ((LAYOUT.prefix, "num_scales", 0), (LAYOUT.slice, "scale", 3)):
        with pytest.raises(ValueError, match=rf"{name} must be an integer in .*; got {number}"):
            call(number)
    assert PLAN.paper_bytes(1, 1, 1, k_bytes=1, v_bytes=1) == 2 * 2 * PLAN.paper_tokens
    assert PLAN.peak_bytes(1, 1, 1, "float32") == 2 * PLAN.peak_page_tokens * 2 * 4
    for name in ("batch", "num_heads", "head_dim", "v_bytes"):
        numbers = {"batch": 1, "num_heads": 1, "head_dim": 1, name: 0}
        with pytest.raises(ValueError, match=f"paper_bytes: {name} must be an integer >= 1"):
            PLAN.paper_bytes(**numbers)
        if name != "v_bytes":
            with pytest.raises(ValueError, match=f"peak_bytes: {name} must be an integer >= 1"):
                PLAN.peak_bytes(dtype="float32", **numbers)
    assert DepthSchedule.from_depths([2] * MAX_SCALES, full_depth=2).num_scales == MAX_SCALES
    with pytest.raises(ValueError, match=f"list of 1 to {MAX_SCALES} depths"):
        DepthSchedule.from_depths([2] * (MAX_SCALES + 1), full_depth=2)
    with pytest.raises(ValueError, match=f"list of 1 to {MAX_SCALES} depths"):
        DepthSchedule.from_depths([], full_depth=2)
    schedule = DepthSchedule.from_depths([4, 2])
    assert schedule.active_layers(1) == (0, 3)
    assert schedule.switched(2, 2) == schedule
    for call, scale, most in ((schedule.active_layers, 2, 1), (schedule.active_layers, -1, 1)):
        with pytest.raises(ValueError, match=rf"scale must be an integer in \[0, {most}\]"):
            call(scale)
    with pytest.raises(ValueError, match=r"scale must be an integer in \[0, 2\]; got 3"):
        schedule.switched(3, 2)


def test_full_depth_follows_from_the_first_entry():
    """An integer is the full depth; of a list, the last layer's number and one more."""
    assert DepthSchedule.from_depths([8, 4]).full_depth == 8
    assert DepthSchedule.from_depths([[0, 3, 6], [0, 6]]).full_depth == 7
    assert DepthSchedule.from_depths([np.array([0, 3, 6])]).full_depth == 7
    assert DepthSchedule.from_depths([[0, 1, 2], 2]).layers == ((0, 1, 2), (0, 2))
    assert DepthSchedule.from_depths([1, 1]).layers == ((0,), (0,))


def test_nested_depths_between_two_of_the_chain():
    """Each depth takes its layers from the next larger one of the chain, else from all layers."""
    for full_depth in (30, 24, 20, 16, 9, 2, 1):
        for depth in range(min(2, full_depth), full_depth + 1):
            chosen = select_layers(full_depth, depth)
            assert len(set(chosen)) == depth
            assert (chosen[0], chosen[-1]) == (0, full_depth - 1)
            larger = [d for d in DEPTH_CHAIN if depth < d < full_depth]
            if larger:
                assert set(chosen) <= set(select_layers(full_depth, min(larger)))
