"""What was made, as files: the formats in which each medium is sent, and a picture to show of it.

A job of any medium ends in items. Pictures show themselves; of a sound its spectrogram is shown,
and of a clip its first frame.
"""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO

from PIL import Image

from twostep.contract import Contract
from twostep.media.audio import Sound, sound_file, sound_picture
from twostep.media.clip import Clip, mp4_file
from twostep.media.codec import Encoded
from twostep.pipeline.provenance import text_chunks
from twostep.pipeline.request import RequestError, Result
from twostep.serve.shapes import SUFFIXES

FORMATS = {
    "image": ("png", "jpeg", "webp"),
    "video": ("webp", "mp4"),
    "audio": ("wav", "flac", "ogg"),
}
"""The formats in which items of a medium can be sent; the first is the one its codec writes."""


def formats_of(contract: Contract) -> list[str]:
    """Return the formats that can be had of a model's items here, the usual one first.

    MP4 needs PyAV, and even sides. None for media that the package does not know.
    """
    has_mp4 = find_spec("av") is not None and all(
        width % 2 == 0 and height % 2 == 0 for width, height in contract.sizes
    )
    return [name for name in FORMATS.get(contract.media, ()) if name != "mp4" or has_mp4]


def encode(result: Result, index: int, format: str | None = None, *, quality: int = 100) -> Encoded:
    """Return item `index` of a result as a file, which says how it was made unless it is lossy.

    Args:
        result: what was made.
        index: of the item.
        format: one of `FORMATS` for its medium; None for the one that the model's codec writes.
        quality: 1 to 100, of JPEG, and of pictures in WebP.

    Raises RequestError for a format that the medium does not have, and ClipError or AudioError
    where a library is missing or the format does not have such sizes.
    """
    contract = result.contract
    known = FORMATS.get(contract.media, ())
    if format is not None and format not in known:
        offered = ", ".join(known) or "none but its own"
        raise RequestError(
            f"format is {format[:80]!r}; {contract.name} makes {contract.things}, which are "
            f"sent as {offered}."
        )
    item = result.images[index]
    if format is None or format == known[0]:
        return result.to_file(item, text_chunks(result, index))
    if isinstance(item, Clip):
        return mp4_file(item, text_chunks(result, index))
    if isinstance(item, Sound):
        return sound_file(item, text_chunks(result, index), format)
    buffer = BytesIO()
    item.save(buffer, format=format.upper(), quality=quality)
    mime = f"image/{format}"
    return Encoded(buffer.getvalue(), SUFFIXES[mime], mime)


def poster_of(item: object) -> Image.Image | None:
    """Return a picture that stands for an item: a sound's spectrogram, a clip's first frame.

    None for pictures, which need none, and for items that the package does not know.
    """
    if isinstance(item, Clip):
        return item.frames[0]
    return sound_picture(item) if isinstance(item, Sound) else None


def pictures_in(item: object) -> list[Image.Image]:
    """Return all that can be seen of an item: itself, the frames of a clip, nothing of others."""
    if isinstance(item, Clip):
        return list(item.frames)
    return [item] if isinstance(item, Image.Image) else []


def seconds_of(item: object) -> float | None:
    """Return how long an item lasts, None for what does not."""
    if isinstance(item, Clip):
        return len(item) / item.frames_per_second
    return item.seconds if isinstance(item, Sound) else None


def num_values(item: object) -> int:
    """Return how many pixels or samples an item keeps in memory, 0 where that is not known."""
    if isinstance(item, Sound):
        return item.samples.numel()
    return sum(picture.width * picture.height for picture in pictures_in(item))
