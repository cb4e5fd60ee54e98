"""A contact sheet: pictures in a labelled grid, to be judged by eye.

Pure Pillow. It takes finished images and knows nothing of what drew them.
"""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from twostep.errors import TwostepError

_PAPER, _INK = (255, 255, 255), (32, 32, 32)
_FONT_PIXELS, _LINE_PIXELS, _LETTER_PIXELS = 15, 19, 7
_GAP_PIXELS = 8
_MAX_LABEL_PIXELS = 200


class ContactSheetError(TwostepError):
    """There is nothing to lay out."""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    column_labels: Sequence[str] = (),
    *,
    scale: int = 1,
) -> Image.Image:
    """Lay images out in a grid: one labelled row per entry of `rows`, one label above each column.

    Every cell is as large as the largest image; `scale` enlarges all images by a whole factor. Rows
    may differ in length, labels are wrapped at words. Raises `ContactSheetError` where no row holds
    an image.
    """
    num_columns = max((len(images) for _, images in rows), default=0)
    if num_columns == 0:
        raise ContactSheetError(
            "no row holds an image; expected at least one image in at least one row."
        )
    font = ImageFont.load_default(size=_FONT_PIXELS)
    width, height = (
        scale * max(image.size[i] for _, images in rows for image in images) for i in (0, 1)
    )
    headings = [
        textwrap.fill(label, width // _LETTER_PIXELS) for label in column_labels[:num_columns]
    ]
    labels = [textwrap.fill(label, _MAX_LABEL_PIXELS // _LETTER_PIXELS) for label, _ in rows]
    longest = max(
        (font.getlength(line) for label in labels for line in label.splitlines()), default=0
    )
    left, top = (
        round(longest) + 2 * _GAP_PIXELS,
        max(map(_height, headings), default=0) + 2 * _GAP_PIXELS,
    )
    row_heights = [max(height, _height(label)) + _GAP_PIXELS for label in labels]

    sheet = Image.new(
        "RGB", (left + num_columns * (width + _GAP_PIXELS), top + sum(row_heights)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    columns = [left + i * (width + _GAP_PIXELS) for i in range(num_columns)]
    for x, heading in zip(columns, headings, strict=False):
        draw.multiline_text((x, top - _GAP_PIXELS // 2), heading, _INK, font, anchor="ld")
    y = top
    for (_, images), label, row_height in zip(rows, labels, row_heights, strict=True):
        draw.multiline_text(
            (_GAP_PIXELS, y + (row_height - _GAP_PIXELS) // 2), label, _INK, font, anchor="lm"
        )
        for x, image in zip(columns, images, strict=False):
            size = (scale * image.width, scale * image.height)
            sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        y += row_height
    return sheet


def _height(label: str) -> int:
    return len(label.splitlines()) * _LINE_PIXELS
