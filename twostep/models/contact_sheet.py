"""A contact sheet: pictures in a labelled grid, to be judged by eye.

Pure Pillow. It takes finished images and knows nothing of what drew them.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from twostep.errors import TwostepError

_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_FONT_PIXELS = 15
_LINE_PIXELS = 19
_GAP_PIXELS = 8
_MAX_LABEL_PIXELS = 200

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class ContactSheetError(TwostepError):
    """There is nothing to lay out."""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], column_labels: Sequence[str] = (), *, scale: int = 1
) -> Image.Image:
    """Lay images out in a grid: one labelled row per entry of `rows`, one label above each column.

    Every cell is as large as the largest image; `scale` enlarges all images by a whole factor. Rows may differ in
    length, labels are wrapped at words. Raises `ContactSheetError` where no row holds an image.
    """
    num_columns = max((len(images) for _, images in rows), default=0)
    if num_columns == 0:
        raise ContactSheetError("no row holds an image; expected at least one image in at least one row.")
    font = ImageFont.load_default(size=_FONT_PIXELS)
    cell_width = scale * max(image.width for _, images in rows for image in images)
    cell_height = scale * max(image.height for _, images in rows for image in images)
    headings = [_wrap(label, font, cell_width) for label in column_labels[:num_columns]]
    labels = [_wrap(label, font, _MAX_LABEL_PIXELS) for label, _ in rows]
    left = _width(labels, font) + 2 * _GAP_PIXELS
    top = max(map(len, headings), default=0) * _LINE_PIXELS + 2 * _GAP_PIXELS
    row_heights = [max(cell_height, len(label) * _LINE_PIXELS) + _GAP_PIXELS for label in labels]

    sheet = Image.new("RGB", (left + num_columns * (cell_width + _GAP_PIXELS), top + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    columns = [left + i * (cell_width + _GAP_PIXELS) for i in range(num_columns)]
    for x, heading in zip(columns, headings, strict=False):
        _write(draw, font, heading, (x, top - _GAP_PIXELS // 2 - len(heading) * _LINE_PIXELS))
    y = top
    for (_, images), label, row_height in zip(rows, labels, row_heights, strict=True):
        _write(draw, font, label, (_GAP_PIXELS, y + (row_height - _GAP_PIXELS - len(label) * _LINE_PIXELS) // 2))
        for x, image in zip(columns, images, strict=False):
            sheet.paste(_enlarge(image, scale), (x, y))
        y += row_height
    return sheet


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image.convert("RGB")
    return image.convert("RGB").resize((scale * image.width, scale * image.height), Image.Resampling.LANCZOS)


def _wrap(label: str, font: _Font, width_pixels: int) -> list[str]:
    lines: list[str] = []
    for word in label.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width_pixels:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _width(labels: list[list[str]], font: _Font) -> int:
    return round(max((font.getlength(line) for label in labels for line in label), default=0))


def _write(draw: ImageDraw.ImageDraw, font: _Font, lines: list[str], position: tuple[int, int]) -> None:
    x, y = position
    for i, line in enumerate(lines):
        draw.text((x, y + i * _LINE_PIXELS), line, fill=_INK, font=font)
