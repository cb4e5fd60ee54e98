"""A contact sheet: pictures in a labelled grid, to be judged by eye.

Pure Pillow. It takes finished images and knows nothing of what drew them.
"""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from twostep.errors import TwostepError

_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_FONT_PIXELS = 15
_LINE_PIXELS = 19
_LETTER_PIXELS = 7
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
    """Lay images out in a grid.

    Every cell is as large as the largest image. Rows may differ in length; labels are wrapped at
    words.

    Args:
        rows: a label and the images of every row.
        column_labels: labels above the columns.
        scale: whole factor by which all images are enlarged.

    Raises:
        ContactSheetError: no row holds an image.
    """
    num_columns = max((len(images) for _, images in rows), default=0)
    if num_columns == 0:
        raise ContactSheetError(
            "no row holds an image; expected at least one image in at least one row."
        )
    every = [image for _, images in rows for image in images]
    width = scale * max(image.width for image in every)
    height = scale * max(image.height for image in every)
    font = ImageFont.load_default(size=_FONT_PIXELS)
    headings = [_wrapped(label, width) for label in column_labels[:num_columns]]
    labels = [_wrapped(label, _MAX_LABEL_PIXELS) for label, _ in rows]
    lines = [line for label in labels for line in label.splitlines()]
    longest = max((font.getlength(line) for line in lines), default=0)
    left = round(longest) + 2 * _GAP_PIXELS
    top = max(map(_label_height, headings), default=0) + 2 * _GAP_PIXELS
    row_heights = [max(height, _label_height(label)) + _GAP_PIXELS for label in labels]

    size = (left + num_columns * (width + _GAP_PIXELS), top + sum(row_heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    columns = [left + i * (width + _GAP_PIXELS) for i in range(num_columns)]
    for x, heading in zip(columns, headings, strict=False):
        draw.multiline_text((x, top - _GAP_PIXELS // 2), heading, _INK, font, anchor="ld")
    y = top
    for (_, images), label, row_height in zip(rows, labels, row_heights, strict=True):
        middle = y + (row_height - _GAP_PIXELS) // 2
        draw.multiline_text((_GAP_PIXELS, middle), label, _INK, font, anchor="lm")
        for x, image in zip(columns, images, strict=False):
            sheet.paste(_enlarged(image, scale), (x, y))
        y += row_height
    return sheet


def _wrapped(label: str, pixels: int) -> str:
    """Break a label into lines of about this width."""
    return textwrap.fill(label, pixels // _LETTER_PIXELS)


def _label_height(label: str) -> int:
    return len(label.splitlines()) * _LINE_PIXELS


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    size = (scale * image.width, scale * image.height)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
