"""The contact sheet puts every picture where its labels say, and labels can be read."""

import pytest
from PIL import Image

from examples.contact_sheet import ContactSheetError, contact_sheet

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def square(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def test_pictures_stand_in_rows_and_columns() -> None:
    sheet = contact_sheet(
        [("one", [square(RED), square(BLUE)]), ("two", [square(BLUE)])], ["a", "b"], scale=2
    )
    left = sheet.width - 2 * (128 + 8)
    top = sheet.height - 2 * (128 + 8)
    assert sheet.getpixel((left + 64, top + 64)) == RED
    assert sheet.getpixel((left + 136 + 64, top + 64)) == BLUE
    assert sheet.getpixel((left + 64, top + 136 + 64)) == BLUE
    assert sheet.getpixel((left + 136 + 64, top + 136 + 64)) == WHITE


def test_labels_are_drawn_beside_and_above() -> None:
    sheet = contact_sheet(
        [("a very long prompt that has to be wrapped at its words", [square(RED)])], ["teacher"]
    )
    left, top = sheet.width - 72, sheet.height - 72
    assert left <= 216
    assert min(sheet.crop((0, top, left, sheet.height)).convert("L").tobytes()) < 64
    assert min(sheet.crop((left, 0, sheet.width, top - 1)).convert("L").tobytes()) < 64


def test_no_labels_leave_a_narrow_margin() -> None:
    assert contact_sheet([("", [square(RED)])]).size == (64 + 8 + 16, 64 + 8 + 16)


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ContactSheetError, match="at least one image"):
        contact_sheet([("empty", [])])
