"""Labels, ids, tokens and masks of a request: what is taken, as what, and what refusals say."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from variant.engine.arguments import (
    check_given,
    check_image_ids,
    check_labels,
    check_mask,
    check_tokens,
    keep_by_map,
)
from variant_kernels import ScaleLayout

LAYOUT = ScaleLayout.from_patch_nums((1, 2, 3))
CONFIG = SimpleNamespace(num_classes=5, class_names=())
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (0, [0]),
        ([4, -1, 5], [4, 5, 5]),
        (np.array([[1, 2, 3]], dtype=">i2")[0, ::-1], [3, 2, 1]),
        (np.array([1, 2], dtype=object), [1, 2]),
        (torch.tensor([3], dtype=torch.uint8), [3]),
    ],
)
def test_labels(labels, expected):
    result = check_labels(labels, CONFIG)
    assert result.dtype == torch.int64
    assert result.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([], ValueError, "op: labels must be one or more integers; got shape (0,)"),
        ([[1]], ValueError, "op: labels must be one or more integers; got shape (1, 1)"),
        ([0, -2], ValueError, "in [0, 5), or -1 or 5 for no class; got -2"),
        ([0, 6], ValueError, "in [0, 5), or -1 or 5 for no class; got 6"),
        ([-2, 6], ValueError, "or -1 or 5 for no class; got -2"),
        ([-1, 6], ValueError, "or -1 or 5 for no class; got 6"),
        ([0, True], TypeError, "op: labels must be integers; got bool"),
        ([[1], [np.True_]], TypeError, "op: labels must be integers; got bool"),
        (np.array([1, True], dtype=object), TypeError, "op: labels must be integers; got bool"),
        (bytearray(b"12"), TypeError, "op: labels must be integers; got bytearray"),
        (np.ma.masked_array([1, 2], [0, 1]), TypeError, "must be integers; got masked values"),
        ([1.0], TypeError, "op: labels must be integers; got float32"),
        (torch.tensor([1j]), TypeError, "op: labels must be integers; got complex64"),
        (torch.tensor([True]), TypeError, "op: labels must be integers; got bool"),
        ([2**63], TypeError, "op: labels must be integers of 64 bits; got [9223372036854775808]"),
        (np.array([2**63], dtype=np.uint64), TypeError,
         "op: labels must be integers below 2^63; got larger ones (uint64)"),
        (torch.ones(2, dtype=torch.int64).to_sparse(), TypeError, "must be a plain tensor of"),
        (torch.ones(2, dtype=torch.int64, device="meta"), TypeError, "must be a plain tensor of"),
    ],
)  # fmt: skip
def test_labels_that_are_refused(labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_labels(labels, CONFIG, "op")


def test_values_are_copies():
    labels = torch.tensor([1, 2])
    result = check_labels(labels, CONFIG)
    labels.fill_(4)
    assert result.tolist() == [1, 2]
    ids = torch.tensor([1, 2])
    result = check_image_ids(ids, 2, CPU)
    ids.fill_(4)
    assert result.tolist() == [1, 2]
    below = np.array([0, 2**63 - 1], dtype=np.uint64)
    assert check_image_ids(below, 2, CPU).tolist() == [0, 2**63 - 1]


def test_a_list_that_holds_itself_ends():
    labels = [1]
    labels.append(labels)
    with pytest.raises((TypeError, ValueError)):
        check_labels(labels, CONFIG)


def test_image_ids():
    assert check_image_ids(None, 3, CPU).tolist() == [0, 1, 2]
    assert check_image_ids((7, -1), 2, CPU).tolist() == [7, -1]
    for ids in ([7], [[7, 8]], 7):
        shape = re.escape(str(tuple(np.shape(ids))))
        with pytest.raises(ValueError, match=rf"one id per label \(2\); got shape {shape}"):
            check_image_ids(ids, 2, CPU)


def test_tokens():
    tokens = torch.arange(28).view(2, 14) % 10
    for count in (2, None):
        assert torch.equal(check_tokens("op", "t", tokens, LAYOUT, 10, count), tokens)
    objects = tokens.numpy().astype(object)
    assert torch.equal(check_tokens("op", "t", objects, LAYOUT, 10, 2), tokens)
    objects[1, 3] = True
    with pytest.raises(TypeError, match="op: t must be integers; got bool"):
        check_tokens("op", "t", objects, LAYOUT, 10, 2)
    assert check_tokens("op", "t", torch.zeros(0, 14, dtype=int), LAYOUT, 10, None).shape == (0, 14)
    for given, count, text in (
        (tokens, 3, "(3, 14); got (2, 14)"),
        (tokens[:, :13], None, "(B, 14); got (2, 13)"),
        (tokens[0], None, "(B, 14); got (14,)"),
        (tokens[None], None, "(B, 14); got (1, 2, 14)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"op: t must be {text}")):
            check_tokens("op", "t", given, LAYOUT, 10, count)
    for low, high, got in ((0, 10, 10), (-1, 9, -1), (-1, 10, -1)):
        given = tokens.clone()
        given[1, 2], given[0, 3] = low, high
        with pytest.raises(ValueError, match=re.escape(f"op: t must be in [0, 10); got {got}")):
            check_tokens("op", "t", given, LAYOUT, 10, 2)


def given(tokens, mask, count=2):
    return check_given(tokens, mask, LAYOUT, 10, count)


def test_given_tokens_are_of_one_image_or_of_each():
    tokens = torch.arange(28).view(2, 14) % 10
    mask = torch.zeros(14)
    mask[1:5] = 1
    both = given(tokens, mask)
    assert torch.equal(both.tokens_BL, tokens)
    assert torch.equal(both.keep_BL, mask.bool().expand(2, 14))
    assert both.kept_scales == {1}
    for one in (tokens[0], tokens[:1], tokens[:1].split([1, 4, 9], 1), tokens[0].tolist()):
        assert torch.equal(given(one, mask).tokens_BL, tokens[:1].expand(2, 14))
    scales = tokens.split([1, 4, 9], 1)
    assert torch.equal(given(list(scales), mask).tokens_BL, tokens)
    single = ScaleLayout.from_patch_nums((2,))
    of_one = check_given([tokens[:, :4]], torch.ones(4), single, 10, 2)
    assert torch.equal(of_one.tokens_BL, tokens[:, :4])
    # A scale is kept where every image keeps it.
    masks = torch.ones(2, 14)
    masks[1, 13] = 0
    assert given(tokens, masks).kept_scales == {0, 1}
    images = slice(1, 2)
    for whole, part in zip(
        (tokens, masks.bool()), given(tokens, masks).of_scale(LAYOUT.slice(1), images), strict=True
    ):
        assert torch.equal(part, whole[1:, 1:5])
    first, second = given(tokens, masks).split(1)
    assert torch.equal(second.tokens_BL, tokens[1:])
    assert torch.equal(first.keep_BL, masks[:1].bool())
    assert first.kept_scales == second.kept_scales == {0, 1}
    moved = first.to(torch.device("meta"))
    assert (moved.tokens_BL.is_meta, moved.keep_BL.is_meta) == (True, True)
    assert moved.kept_scales == {0, 1}


def test_tokens_and_mask_go_together():
    assert given(None, None) is None
    with pytest.raises(ValueError, match="got tokens only"):
        given(torch.zeros(14, dtype=int), None)
    with pytest.raises(ValueError, match="got mask only"):
        given(None, torch.zeros(14))
    with pytest.raises(ValueError, match=re.escape("tokens must be (3, 14); got (2, 14)")):
        given(torch.zeros(2, 14, dtype=int), torch.zeros(14), count=3)
    with pytest.raises(ValueError, match=re.escape("tokens must be (2, 14); got ()")):
        given(5, torch.zeros(14))


def test_tokens_by_scale_must_be_those_of_the_scales():
    scales = torch.zeros(2, 14, dtype=int).split([1, 4, 9], 1)
    for wrong, found in (
        (scales[:2], "[(2, 1), (2, 4)]"),
        ((scales[0][:1], *scales[1:]), "[(1, 1), (2, 4), (2, 9)]"),
        ((scales[1], *scales[1:]), "[(2, 4), (2, 4), (2, 9)]"),
    ):
        text = f"one (B, T) tensor per scale, T = [1, 4, 9]; got {found}"
        with pytest.raises(ValueError, match=re.escape(text)):
            given(wrong, torch.zeros(14))


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((14,), 1), ((1, 14), 1), ((2, 14), 2), ((6, 5), 1), ((1, 6, 5), 1), ((2, 6, 5), 2),
     ((14, 14), 1), ((2, 14, 14), 2), ((3, 14), None), ((3, 6, 5), None), ((13,), None),
     ((), None), ((0, 5), None), ((1, 1, 14, 14), None), ((2, 0, 5), None)],
)  # fmt: skip
def test_masks_of_tokens_and_maps(shape, kept):
    if kept is None:
        text = "mask must be of tokens, (14,) or (2, 14), or a map, (H, W) or (2, H, W)"
        with pytest.raises(ValueError, match=re.escape(f"{text}; got {shape}")):
            check_mask(torch.zeros(shape), LAYOUT, 2)
    else:
        for value in (0, 1):
            keep = check_mask(np.full(shape, value), LAYOUT, 2)
            assert keep.dtype == torch.bool
            assert keep.shape == (kept, 14)
            assert keep[:, 1:].all() if value else not keep[:, 1:].any()
            # A map keeps scales of at most three tokens always, tokens only where they say so.
            of_tokens = shape[-1] == 14 and len(shape) < 3 and shape != (14, 14)
            assert keep[:, 0].all() if value or not of_tokens else not keep[:, 0].any()


def test_a_square_of_as_many_images_as_tokens_is_a_mask_of_tokens():
    mask = torch.eye(14)
    assert torch.equal(check_mask(mask, LAYOUT, 14), mask.bool())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("x", TypeError, "mask must be a tensor or an array; got str"),
        (torch.zeros(14).to_sparse(), TypeError, "mask must be a dense tensor; got Tensor of"),
        (torch.zeros(14, dtype=torch.complex64), TypeError, "booleans or numbers; got torch.comp"),
        (torch.full((14,), 0.5), ValueError, "of tokens must be 0 (redraw) or 1 (keep); got 0.5"),
        (torch.full((14,), 2), ValueError, "of tokens must be 0 (redraw) or 1 (keep); got 2"),
        (torch.full((6, 5), 1.5), ValueError, "must be in [0, 1] (0 redraws, 1 keeps); got 1.5"),
        (torch.full((6, 5), -0.5), ValueError, "in [0, 1] (0 redraws, 1 keeps); got -0.5"),
        (torch.full((6, 5), torch.nan), ValueError, "in [0, 1] (0 redraws, 1 keeps); got nan"),
        ([[0.0, 0.25, 3.0], [1.0, 7.0, 1.0]], ValueError, "(0 redraws, 1 keeps); got 3"),
    ],
)  # fmt: skip
def test_masks_that_are_refused(mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_mask(mask, LAYOUT, 2)


def test_a_map_is_resized_to_every_scale():
    layout = ScaleLayout(((1, 3), (2, 2), (1, 4)))
    left = torch.zeros(1, 4, 8)
    left[..., :4] = 1
    keep = keep_by_map(left, layout)
    assert keep.dtype == torch.bool
    # Three tokens stay whatever the map says, four do not.
    assert keep.tolist() == [[True] * 3 + [True, False] * 2 + [True, True, False, False]]
    # Tokens are the means of the columns they cover: of 1, 1, 1, 0 the second pair has 1/2.
    left[..., 3] = 0
    assert keep_by_map(left, layout)[:, 7:].tolist() == [[True, False, False, False]]
    # Half of a token's weight is not enough.
    assert not keep_by_map(torch.full((1, 2, 2), 0.5), layout)[:, 3:].any()
    assert keep_by_map(torch.full((1, 2, 2), 0.51), layout).all()
