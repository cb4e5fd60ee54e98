"""Sizes and times as people write them."""

import pytest
import typer

from twostep.cli.units import duration_in_seconds, size_in_pixels
from twostep.pipeline.request import RequestError


@pytest.mark.parametrize(
    ("text", "expected"), [("64x64", (64, 64)), (" 832X1216 ", (832, 1216)), ("0x8", (0, 8))]
)
def test_a_size_has_a_width_and_a_height(text: str, expected: tuple[int, int]) -> None:
    assert size_in_pixels(text) == expected


@pytest.mark.parametrize("text", ["", "64", "64x", "64x64x64", "-64x64", "64 x 64", "6.5x64"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected WIDTHxHEIGHT in pixels"):
        size_in_pixels(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h", 10800), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("45s", 45)],
)
def test_a_time_has_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert duration_in_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "1m1h", "1.5m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write 3h, 90m, 1h30m or 45s"):
        duration_in_seconds(text)
