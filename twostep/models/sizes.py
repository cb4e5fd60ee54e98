"""Picture sizes of about one area: what SDXL-type models are trained and asked for, from upright to wide."""

import math

WIDEST = 2.0
"""The largest ratio of a picture's sides."""


def sizes_around(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """List (width, height) in pixels, the square of `side` first, the rest by falling width.

    Every side is a multiple of `multiple`, no area is larger than the square's, and none wider than 2 : 1. For 1024 and
    64 these hold SDXL's own 1152x896, 1216x832 and 1344x768.
    """
    square = side // multiple * multiple
    if square < multiple:
        raise ValueError(f"a side of {side} px is less than one multiple of {multiple} px")
    found = set()
    for long in range(square + multiple, math.isqrt(int(WIDEST * square**2)) + 1, multiple):
        short = square**2 // long // multiple * multiple
        if long <= WIDEST * short:
            found |= {(long, short), (short, long)}
    return ((square, square), *sorted(found, reverse=True))
