"""The cache stores K/V as planned, in pages that no other layer uses, and reuses freed pages."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from variant_kernels import (
    CachePlan,
    DepthSchedule,
    PagedKVCache,
    ScaleLayout,
    append_paged_kv,
    paged_attention,
)
from variant_kernels.kv_cache import GrowingPages
from variant_kernels.kv_quantization import KV8_DTYPE, dequantize_kv, quantize_kv
from variant_kernels.plans.cache_plan import PageAllocator

HEADS, HEAD_DIM = 2, 16


def make(schedule, sides=(1, 2, 3, 4), batch=2, page_size=4, dtype=torch.float32):
    layout = ScaleLayout.from_patch_nums(sides)
    return PagedKVCache(CachePlan(layout, schedule, page_size), batch, HEADS, HEAD_DIM, dtype)


def walk(cache, check, switch_at=None, new=None):
    """Run the schedule; K/V of (layer, scale, sequence, token) are numbers that identify them."""
    layout = cache.plan.layout
    cache.k_pages.fill_(torch.nan)
    cache.v_pages.fill_(torch.nan)
    for scale in range(layout.num_scales):
        if scale == switch_at:
            cache.switch(new)
        for layer in cache.schedule.active_layers(scale):
            step = cache.open(layer, scale)
            count = layout.tokens[scale]
            token = torch.arange(layout.offsets[scale], layout.visible(scale))
            mark = 1000.0 * layer + token + 0.25 * torch.arange(cache.batch).unsqueeze(1)
            k = mark.view(cache.batch, count, 1, 1).expand(-1, -1, HEADS, HEAD_DIM).contiguous()
            append_paged_kv(k, -k, cache.k_pages, cache.v_pages, step.slots_BT)
            check(cache, step, layer, scale)
            cache.close(layer, scale)


def check_contents(cache, step, layer, scale):
    """All K/V of this layer so far can be read back through the page table."""
    size = cache.plan.page_size
    for row in range(cache.batch):
        length = int(step.kv_lens_B[row])
        assert length == cache.plan.layout.visible(scale)
        pages = step.page_table_BM[row].long()
        k = cache.k_pages[pages].flatten(0, 1)[:length, 0, 0]
        assert torch.equal(k, 1000.0 * layer + torch.arange(length) + 0.25 * row)
        v = cache.v_pages[pages].flatten(0, 1)[:length, 1, 3]
        assert torch.equal(v, -k)
        assert len(pages) == -(-length // size)


@st.composite
def schedules(draw):
    full_depth, scales = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    chosen, layers = set(range(full_depth)), []
    for _ in range(scales):
        chosen = {0, full_depth - 1} | {x for x in chosen if draw(st.booleans())} & chosen
        layers.append(sorted(chosen))
    return DepthSchedule.from_depths(layers, full_depth=full_depth)


@given(schedules(), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_every_layer_reads_back_all_it_wrote_within_the_plan(schedule, page_size, data):
    sides = (1, 2, 3, 4)[: schedule.num_scales]
    cache = make(schedule, sides, batch=data.draw(st.integers(1, 3)), page_size=page_size)
    walk(cache, check_contents)
    assert cache.used_bytes == 0
    assert cache.peak_bytes == cache.allocated_bytes
    assert cache.allocated_bytes == cache.plan.peak_bytes(
        cache.batch, HEADS, HEAD_DIM, "float32", guidance=False
    )


def test_repr_names_the_plan_the_tensors_and_the_bytes():
    cache = make(DepthSchedule(6, 4, 3, bridge=2))
    text = repr(cache)
    assert repr(cache.plan) in text
    assert "dtype=torch.float32, device=cpu, used_bytes=0, allocated_bytes=" in text
    assert f"allocated_bytes={cache.allocated_bytes})" in text
    cache.open(0, 0)
    assert cache.used_bytes > 0
    assert f"used_bytes={cache.used_bytes}," in repr(cache)


def test_eight_bits_take_the_planned_bytes_and_read_back_what_was_rounded():
    schedule = DepthSchedule(6, 4, 3, bridge=2)
    cache = make(schedule, dtype=KV8_DTYPE)
    wide = make(schedule)
    assert cache.allocated_bytes == cache.plan.peak_bytes(
        cache.batch, HEADS, HEAD_DIM, KV8_DTYPE, guidance=False
    )
    # One byte per value and one per head; float32 takes four per value.
    assert cache.allocated_bytes * 4 * HEAD_DIM == wide.allocated_bytes * (HEAD_DIM + 1)
    generator = torch.Generator().manual_seed(3)
    for layer, scale in cache.plan.layer_scale_order():
        step = cache.open(layer, scale)
        shape = (2, cache.batch, cache.plan.layout.tokens[scale], HEADS, HEAD_DIM)
        k, v = torch.randn(shape, generator=generator)
        append_paged_kv(k, v, cache.k_pages, cache.v_pages, step.slots_BT, **cache.scales)
        index = step.slots_BT // cache.plan.page_size, step.slots_BT % cache.plan.page_size
        for new, pages, name in ((k, cache.k_pages, "k"), (v, cache.v_pages, "v")):
            values = pages.view(torch.uint8)[index].view(KV8_DTYPE)
            read = dequantize_kv(values, cache.scales[f"{name}_scales_PNH"][index])
            assert torch.equal(read, dequantize_kv(*quantize_kv(new)))
        cache.close(layer, scale)
    assert cache.peak_bytes == cache.allocated_bytes
    assert wide.scales == {}


@given(st.integers(0, 4), st.sampled_from([2, 3, (0, 2, 5)]), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_switching_frees_pages_and_stays_within_the_slab(at, depth, page_size):
    full = DepthSchedule.full(6, 4)
    new = full.switched(at, depth)
    cache = make(full, page_size=page_size)
    if at < 4:
        walk(cache, check_contents, at, new)
        assert cache.peak_bytes <= cache.allocated_bytes
    else:
        walk(cache, check_contents)
        cache.switch(new)
    assert cache.used_bytes == 0
    cache.reset()
    walk(cache, check_contents)


def test_no_page_is_read_after_release():
    """Poison every page that no layer holds, after each step: nothing may change."""
    schedule = DepthSchedule(5, 4, 2, 2)
    generator = torch.Generator().manual_seed(0)
    clean, poisoned = make(schedule), make(schedule)
    poisoned.k_pages.fill_(torch.nan)
    poisoned.v_pages.fill_(torch.nan)
    layout = clean.plan.layout
    for layer, scale in clean.plan.layer_scale_order():
        shape = (2, layout.tokens[scale], HEADS, HEAD_DIM)
        q, k, v = torch.randn(3, *shape, generator=generator).unbind(0)
        outs = []
        for cache in (clean, poisoned):
            step = cache.open(layer, scale)
            append_paged_kv(k, v, cache.k_pages, cache.v_pages, step.slots_BT)
            outs.append(
                paged_attention(q, cache.k_pages, cache.v_pages, step.page_table_BM, step.kv_lens_B)
            )
            cache.close(layer, scale)
        assert torch.equal(*outs)
        held = {p for pages in poisoned._allocator.pages.values() for p in pages}
        peak = poisoned.plan.peak_pages
        free = [row * peak + p for row in range(2) for p in range(peak) if p not in held]
        poisoned.k_pages[free] = torch.nan
        poisoned.v_pages[free] = torch.nan


def test_sequences_never_share_a_page():
    cache = make(DepthSchedule.full(3, 4), batch=4)
    seen = {}

    def check(cache, step, layer, scale):
        for row in range(cache.batch):
            for page in step.page_table_BM[row].tolist():
                assert seen.setdefault(page, row) == row

    walk(cache, check)


def test_steps_out_of_order_are_refused():
    cache = make(DepthSchedule(4, 4, 2, 1))
    with pytest.raises(ValueError, match=r"expected open\(0, 0\); got open\(1, 0\)"):
        cache.open(1, 0)
    cache.open(0, 0)
    with pytest.raises(ValueError, match=r"expected close\(0, 0\); got open\(1, 0\)"):
        cache.open(1, 0)
    with pytest.raises(ValueError, match=r"\(1, 0\) is not open"):
        cache.close(1, 0)
    with pytest.raises(ValueError, match="switch between scales; scale 0 is not finished"):
        cache.switch(DepthSchedule(4, 4, 2, 1))
    cache.close(0, 0)
    with pytest.raises(ValueError, match="switch between scales; scale 0 is not finished"):
        cache.switch(DepthSchedule(4, 4, 2, 1))


def test_a_long_list_of_layers_is_shortened():
    with pytest.raises(ValueError, match=r"must be among the 2 planned; got \[1, 2, .*\.\.\.") as e:
        make(DepthSchedule(200, 4, 2, 1)).switch(DepthSchedule(200, 4, 200, 1))
    assert len(str(e.value)) < 200


def test_switches_that_do_not_fit_are_refused():
    cache = make(DepthSchedule(6, 4, 3, 1))
    for layer in range(6):
        cache.open(layer, 0)
        cache.close(layer, 0)
    with pytest.raises(ValueError, match="scale 0 has already run with 6 layers"):
        cache.switch(DepthSchedule(6, 4, 2, 0))
    with pytest.raises(ValueError, match="layers of scale 1 must be among the 3 planned"):
        cache.switch(DepthSchedule.full(6, 4))
    with pytest.raises(ValueError, match="schedule must have 6 layers and 4 scales; got 5 and 4"):
        cache.switch(DepthSchedule.full(5, 4))


def test_too_little_memory_is_said_in_one_line():
    plan = CachePlan(ScaleLayout.from_patch_nums((64,)), DepthSchedule.full(30, 1))
    # One layer at a time: no later scale reads the K and V of this one.
    mib = 5906250177.2  # 100,000,003 * 4096 * (30 * 63) * 4 * 2 / 1024**2 = 5906250177.1875
    with pytest.raises(MemoryError, match=f"the plan needs {mib} MiB for 100,000,003 sequences"):
        PagedKVCache(plan, 100_000_003, 30, 63, torch.float32)


def test_the_smallest_cache():
    """One value of K and of V; nothing is in use before the first call and after a reset."""
    cache = PagedKVCache(
        CachePlan(ScaleLayout(((1, 1),)), DepthSchedule(1, 1, 1, 0), 1), 1, 1, 1, torch.float32
    )
    assert (cache.allocated_bytes, cache.used_bytes, cache.peak_bytes) == (8, 0, 0)
    assert cache.scales == {}
    assert cache._slabs[1].shape == (2, 0)  # no scale is stored beside pages of 32 bits
    cache.open(0, 0)
    assert (cache.used_bytes, cache.peak_bytes) == (8, 8)
    cache.close(0, 0)
    assert (cache.used_bytes, cache.peak_bytes) == (0, 8)
    cache.reset()
    assert cache.peak_bytes == 0


@pytest.mark.parametrize(
    ("placement", "tables", "consecutive"),
    [
        ({0: (1, 2)}, [1, 2], True),
        ({0: (2, 1)}, [2, 1], False),
        ({0: (0, 2)}, [0, 2], False),
    ],
)
def test_a_step_says_whether_its_pages_follow_one_another(placement, tables, consecutive):
    cache = make(DepthSchedule.full(2, 2), (1, 2), page_size=3)
    peak = cache.plan.peak_pages
    cache._allocator = PageAllocator(3, placement)
    for layer in (0, 1):
        cache.open(layer, 0)
        cache.close(layer, 0)
    step = cache.open(0, 1)
    assert step.page_table_BM.tolist() == [tables, [page + peak for page in tables]]
    assert step.kv_lens_B.tolist() == [5, 5]
    assert step.consecutive is consecutive
    first, second = tables
    assert step.slots_BT[0].tolist() == [3 * first + 1, 3 * first + 2, 3 * second, 3 * second + 1]


@pytest.mark.parametrize("name", ["batch", "num_heads", "head_dim"])
def test_numbers_beyond_all_memory_are_refused_in_one_line(name):
    plan = CachePlan(ScaleLayout.from_patch_nums((1, 2)), DepthSchedule.full(2, 2))
    sizes = {"batch": 1, "num_heads": 1, "head_dim": 16, name: 10**400}
    whole = CachePlan.peak_bytes(plan, *sizes.values(), torch.float32, guidance=False)
    text = f"^PagedKVCache: the plan needs {whole // 1024**2} MiB for"
    with pytest.raises(MemoryError, match=text):
        PagedKVCache(plan, **sizes, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"page_tables": 5}, TypeError, "page_tables must be of type dict; got 5"),
        ({"page_tables": []}, TypeError, r"page_tables must be of type dict; got \[\]"),
        (
            {"device": 3.5},
            TypeError,
            r"device must be one that this machine has; got 3.5 \(float\)",
        ),
        ({"device": "privateuseone"}, ValueError, "device must be one that this machine has"),
    ],
)
def test_page_tables_and_devices_that_are_none_are_refused(options, error, message):
    plan = CachePlan(ScaleLayout.from_patch_nums((1, 2)), DepthSchedule.full(2, 2))
    with pytest.raises(error, match=f"^PagedKVCache: {message}"):
        PagedKVCache(plan, 1, 1, 16, torch.float32, **options)


def test_growing_pages_keep_their_numbers_and_contents():
    """Page p of sequence b is page 2 p + b; the pool is as large as needed, or doubles."""
    store = GrowingPages(torch.zeros(2, 1, 3, 5, 8, dtype=torch.float64), page_size=4)
    assert (store.tokens, store.stored, store.k_pages.shape) == (0, 0, (0, 4, 5, 8))
    step = store.open(5)
    assert store.k_pages.shape == store.v_pages.shape == (4, 4, 5, 8)
    assert store.k_pages.dtype == torch.float64
    assert step.slots_BT.tolist() == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 12]]
    assert step.page_table_BM.tolist() == [[0, 2], [1, 3]]
    assert step.kv_lens_B.tolist() == [5, 5]
    assert step.page_table_BM.dtype == step.kv_lens_B.dtype == torch.int32
    assert not step.consecutive
    assert (store.tokens, store.stored) == (5, 0)
    assert torch.equal(store.open(5).slots_BT, step.slots_BT)  # the call before was not closed
    store.close()
    store.k_pages.copy_(torch.arange(4.0).view(4, 1, 1, 1).expand_as(store.k_pages))
    store.v_pages.copy_(-store.k_pages)
    for tokens, pages in ((3, 4), (1, 8), (7, 8), (1, 16), (70, 44)):
        step = store.open(tokens)
        store.close()
        assert store.k_pages.shape[0] == pages
        assert step.slots_BT.shape == (2, tokens)
        assert store.k_pages[:4, 3, 4, 7].tolist() == [0, 1, 2, 3]
        assert store.v_pages[:4, 0, 0, 0].tolist() == [0, -1, -2, -3]
    assert step.slots_BT[:, -1].tolist() == [42 * 4 + 2, 43 * 4 + 2]  # of token 86
    assert step.page_table_BM.tolist() == [list(range(0, 44, 2)), list(range(1, 44, 2))]


def test_growing_pages_of_one_sequence_follow_one_another():
    step = GrowingPages(torch.zeros(1, 1, 3, 2, 16)).open(17)
    assert step.consecutive is True
    assert step.page_table_BM.tolist() == [[0, 1]]


def test_caches_of_different_plans_may_share_page_tables():
    tables = {}
    cases = itertools.product(((1, 2, 3), (1, 3, 4)), (1, 2), (3, 4), (2, 3))
    for sides, batch, page_size, depth in cases:
        layout = ScaleLayout.from_patch_nums(sides)
        plan = CachePlan(layout, DepthSchedule.full(depth, 3), page_size)
        cache = PagedKVCache(plan, batch, HEADS, HEAD_DIM, torch.float32, page_tables=tables)
        walk(cache, check_contents)
    count = len(tables)
    cache.reset()
    walk(cache, check_contents)
    assert len(tables) == count > 0


def test_a_shallow_copy_in_the_middle_has_pages_of_its_own():
    cache = make(DepthSchedule.full(2, 4))
    twins = []

    def check(cache, step, layer, scale):
        check_contents(cache, step, layer, scale)
        if (layer, scale) == (0, 1):
            twins.append(copy.copy(cache))
            twins[0].k_pages.fill_(7.0)
            twins[0].close(layer, scale)
            twins[0].open(1, scale)

    walk(cache, check)
    assert twins[0].used_bytes > 0
