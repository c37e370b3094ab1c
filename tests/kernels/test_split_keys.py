"""How many parts the keys of paged attention are split into, and that the parts are combined."""

import importlib

import pytest
import torch
from compare import DEVICE, Tally, moved, random_cases
from hypothesis import given
from hypothesis import strategies as st
from test_paged_attention import plain_attention, random_case

from variant_kernels import paged_attention
from variant_kernels.dispatch.request import Request
from variant_kernels.ops import tables
from variant_kernels.split_keys import COMBINE_TILES, num_splits

# Batch 1 of VAR-d30 with guidance: 2 sequences of 30 heads of 64; an H200 runs two programs of 128
# queries on each of its 132 processors.
HEADS, RESIDENT = 60, 264


def parts_of_scale(queries, keys):
    return num_splits(
        blocks=HEADS * -(-queries // 128),
        resident=RESIDENT,
        tiles=-(-keys // 64),
        part_bytes=HEADS * queries * 64 * 4,
    )


def test_the_last_scales_of_one_image_are_not_split():
    # 120 programs leave 12 of 132 processors idle; three parts would need a second round.
    assert parts_of_scale(queries=169, keys=424) == 1
    assert parts_of_scale(queries=256, keys=680) == 1


def test_long_sequences_of_few_heads_are_split():
    one_head = {"blocks": 2, "resident": RESIDENT, "part_bytes": 2 * 128 * 64 * 4}
    parts = num_splits(tiles=35, **one_head)
    assert 8 <= parts <= 35
    assert num_splits(tiles=2, **one_head) == 1
    assert num_splits(tiles=0, **one_head) == 1


@given(
    blocks=st.integers(1, 5000),
    resident=st.integers(1, 600),
    tiles=st.integers(0, 200),
    part_bytes=st.integers(4, 10**8),
)
def test_a_split_needs_no_more_rounds_and_gains_more_than_it_costs(
    blocks, resident, tiles, part_bytes
):
    parts = num_splits(blocks=blocks, resident=resident, tiles=tiles, part_bytes=part_bytes)
    rounds, before = -(-blocks * parts // resident), -(-blocks // resident)
    assert parts >= 1
    if parts > 1:
        assert rounds <= before
        assert rounds * -(-tiles // parts) + COMBINE_TILES < before * tiles
        # One part less would make the longest program longer.
        assert -(-tiles // parts) < -(-tiles // (parts - 1))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_split_over_blocks_match_float64(backend, dtype, monkeypatch):
    choice = tables()["paged_attention"][backend]
    reason = choice.unsupported(Request(DEVICE, (dtype,), 64))
    if reason is not None:
        pytest.skip(f"{reason} (TRITON_INTERPRET=1 interprets, make test-cuda-python emulates)")
    launcher = importlib.import_module(f"variant_kernels.{backend}_ops.paged_attention")
    monkeypatch.setattr(launcher, "num_splits", lambda *, tiles, **_: min(tiles, 5))
    tally, generator = Tally(), torch.Generator().manual_seed(6)
    for index in random_cases(8):
        inputs, scale = random_case(dtype, generator)
        exact = plain_attention(*(x.double() for x in inputs[:3]), *inputs[3:], scale)
        plain = plain_attention(*inputs, scale)
        ours = paged_attention(*moved(*inputs), softmax_scale=scale, backend=backend).cpu()
        tally.add(str(index), ours, plain, exact)
        assert not ours[inputs[4] == 0].any()
    tally.check()
