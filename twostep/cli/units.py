"""Sizes and times as people write them on a command line."""

import re

import typer


def size_in_bytes(text: str) -> float:
    """Return the bytes of a size like 24GB or 22.5GiB."""
    # This brings pydantic, which verbs that draw do without.
    from twostep.training.recipe import bytes_of

    try:
        return bytes_of(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error


def size_in_pixels(text: str) -> tuple[int, int]:
    """Return the width and height of a size like 64x64; RequestError for anything else."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if match is None:
        # This brings more of the package, which a size that is right does without.
        from twostep.pipeline.request import RequestError

        raise RequestError(f"size is {text!r}; expected WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])


def duration_in_seconds(text: str) -> float:
    """Return the seconds of a time like 3h, 90m, 1h30m or 45s."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is None or not text:
        raise typer.BadParameter(f"{text} is no time; write 3h, 90m, 1h30m or 45s.")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds
