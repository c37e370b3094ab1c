"""Images side by side: where each of them lies, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from variant.engine.grid import grid

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
GAP, CAPTION = 4, 56


def squares(side, count):
    return [Image.new("RGB", (side, side), colour) for colour in COLOURS[:count]]


def sheet_of(lengths, cell, left):
    """A white sheet with a cell for each image, in rows of these lengths."""
    step = cell + GAP
    sheet = np.full((GAP + len(lengths) * step, left + max(lengths) * step, 3), 255, np.uint8)
    for y, length in enumerate(lengths):
        for x in range(length):
            top, begin = GAP + y * step, left + x * step
            sheet[top : top + cell, begin : begin + cell] = COLOURS[x]
    return sheet


@pytest.mark.parametrize(("side", "cell"), [(1, 64), (6, 66), (48, 48), (64, 64), (200, 200)])
def test_images_lie_side_by_side_and_small_ones_are_enlarged(side, cell):
    shown = grid([squares(side, 2), squares(side, 3)])
    assert np.array_equal(np.asarray(shown), sheet_of((2, 3), cell, GAP))


def test_one_image_is_a_picture_with_a_border():
    assert np.array_equal(np.asarray(grid([squares(64, 1)])), sheet_of((1,), 64, GAP))


def test_captions_stand_left_of_their_row_at_half_its_height():
    rows = [squares(32, 1), squares(32, 2)]
    shown = np.asarray(grid(rows, ["H", "HHH"]))
    expected = sheet_of((1, 2), 64, GAP + CAPTION)
    assert shown.shape == expected.shape
    assert np.array_equal(shown[:, GAP + CAPTION :], expected[:, GAP + CAPTION :])
    widths = []
    for top in (GAP, GAP + 64 + GAP):
        ink = np.argwhere(shown[top : top + 64, : GAP + CAPTION, 0] < 128)
        (low, begin), (high, end) = ink.min(0), ink.max(0)
        assert abs((low + high) / 2 - 32) < 4
        assert GAP <= begin < GAP + 4
        widths.append(end - begin)
    assert widths[1] > 2 * widths[0]
