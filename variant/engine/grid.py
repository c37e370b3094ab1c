"""Images side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

# Small images are enlarged.
CELL_PIXELS = 64
GAP_PIXELS = 4
CAPTION_PIXELS = 56


def grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """Rows of square images as one picture; small images are enlarged, captions at left."""
    side = rows[0][0].width
    cell = side * max(1, round(CELL_PIXELS / side))
    step = cell + GAP_PIXELS
    left = GAP_PIXELS + (CAPTION_PIXELS if captions else 0)
    width = left + max(len(row) for row in rows) * step
    sheet = Image.new("RGB", (width, len(rows) * step + GAP_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = y * step + GAP_PIXELS
        if captions:
            draw.text((GAP_PIXELS, top + cell // 2), captions[y], "black", anchor="lm")
        for x, image in enumerate(row):
            tile = image.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + x * step, top))
    return sheet
