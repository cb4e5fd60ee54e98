"""Pictures that a user gives: opened, measured, and cut to a size that a model draws."""

import io
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from twostep.errors import TwostepError
from twostep.media.image import from_levels

MIN_INPUT_SIDE = 8
"""The least width and height, in pixels, of a picture that a drawing is made of."""

MAX_INPUT_PIXELS = 2**26
"""The most pixels of such a picture; more would fill the memory."""

_PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""

_TIFF_BITS = 258
_TIFF_FORMAT = 339
"""The numbers of the fields of a TIFF that say how many bits a value has, and of which kind."""

_SIXTEEN_BITS = 2**16 - 1
_TWELVE_BITS = 2**12 - 1
"""The largest values of 16 and of 12 bits."""

_SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "JPEG2000")
"""Formats whose 16 bits Pillow may hold in a mode of 32 bits."""

_LEAST_LEVEL = 16
"""Floating-point pictures whose largest value is above this are taken for levels, not shares."""


class UnusablePictureError(TwostepError):
    """One picture that cannot be used; its message is the reason."""


@dataclass(frozen=True, eq=False)
class OpenedPicture:
    """A picture as it is used: 8-bit RGB, upright, with transparent parts on white.

    Args:
        pixels: The picture.
        alpha: How opaque it was, as 8-bit grey; None where nothing was transparent.
        notes: Sentences about what a person might not expect of it.
        is_eight_bit: Whether its values were levels of 255, and are still the same.
    """

    pixels: Image.Image
    alpha: Image.Image | None = None
    notes: tuple[str, ...] = ()
    is_eight_bit: bool = True


def open_picture(
    read: Callable[[], bytes | Image.Image], *, for_input: bool = False
) -> Image.Image:
    """Return a picture in 8-bit RGB, upright and on white; see `examine_picture`."""
    return examine_picture(read, for_input=for_input).pixels


def examine_picture(
    read: Callable[[], bytes | Image.Image], *, for_input: bool = False
) -> OpenedPicture:
    """Open a picture, and keep what its pixels alone do not say.

    More than 8 bits are scaled by their type, whole numbers of 32 bits and floating-point ones by
    their range; see `_in_eight_bits`.

    Args:
        read: Returns the bytes of a file, or a picture.
        for_input: Whether a drawing is made of it, so that its size is limited.

    Raises:
        UnusablePictureError: It cannot be read, is damaged, has values that no scale fits, or is
            too small or too large.
    """
    try:
        data = read()
        picture = _decoded(data, for_input=for_input) if isinstance(data, bytes) else data
        if for_input:
            _check_input_size(*picture.size)
        eight_bits, notes = _in_eight_bits(picture)
        upright = ImageOps.exif_transpose(eight_bits).convert("RGBA")
    except UnusablePictureError:
        raise
    except UnidentifiedImageError as error:
        # Pillow names an object in memory, which tells a person nothing.
        raise UnusablePictureError("it cannot be read (it is no picture)") from error
    # Pillow's readers raise nearly anything for a damaged file: a missing field is a KeyError, a
    # cut one a struct.error, a wrong size a MemoryError.
    except Exception as error:
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UnusablePictureError(f"it cannot be read ({reason})") from error
    white = Image.new("RGBA", upright.size, "white")
    pixels = Image.alpha_composite(white, upright).convert("RGB")
    alpha = upright.getchannel("A")
    lowest, _ = alpha.getextrema()
    return OpenedPicture(
        pixels,
        alpha=alpha if lowest != 255 else None,
        notes=notes,
        is_eight_bit=eight_bits is picture,
    )


def _decoded(data: bytes, *, for_input: bool) -> Image.Image:
    """Return the picture in a file, decoded to its end; of one for input, the size comes first.

    Raises whatever Pillow does for a damaged one. Of a PNG the checksums are compared first, which
    Pillow does not do by itself: a flipped bit would be drawn from.
    """
    with warnings.catch_warnings():
        # Pillow warns of sizes, which are limited here, and of fields that nobody uses.
        warnings.simplefilter("ignore")
        if data.startswith(_PNG):
            _check_png(data)
        picture = Image.open(io.BytesIO(data))
        if for_input:
            _check_input_size(*picture.size)
        picture.load()
    return picture


def _check_png(data: bytes) -> None:
    """Raise UnusablePictureError unless every chunk of a PNG has its checksum, up to the last."""
    place = len(_PNG)
    name = b""
    while name != b"IEND":
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        name = data[place + 4 : place + 8]
        checksum = data[end : end + 4]
        if len(checksum) < 4:
            raise UnusablePictureError("it cannot be read (the PNG is cut off)")
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(checksum, "big"):
            raise UnusablePictureError("it cannot be read (the PNG is damaged: a checksum differs)")
        place = end + 4


def _in_eight_bits(picture: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a picture with 8 bits in each channel, and notes about how it was scaled.

    Pillow itself cuts larger values off at 255. Here whole numbers are scaled by what their type
    holds: 65,535 for 16 bits, or what a TIFF says of its bits. Whole numbers of 32 bits are often
    8 or 16 bits in a larger type, so they are scaled by the least of 255, 65,535 and their type's
    range that holds them; floating-point numbers by 1, or where they are clearly no shares of one,
    by 255 or 65,535.

    Raises UnusablePictureError for values that fit none of these.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture, ()
    values, bits = _numbers(picture)
    lowest, highest = float(values.min()), float(values.max())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise UnusablePictureError("its floating-point values hold NaN or infinity")
    if picture.format in _SIXTEEN_BIT_FORMATS and picture.mode == "I":
        bits = 16
    scale = _full_scale(picture.mode, bits, lowest, highest)
    levels = (np.clip(values / scale, 0, 1) * 255).round().astype(np.uint8)
    grey = Image.fromarray(levels)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        # The value that a 16-bit PNG declares transparent, which no longer fits 8 bits.
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if orientation is not None:
        grey.getexif()[ExifTags.Base.Orientation] = orientation
    if scale == _SIXTEEN_BITS and highest <= _TWELVE_BITS:
        note = (
            f"its brightest value is {highest:g} of {scale:,.0f}, so it is nearly black: if its "
            "values do not use 16 bits, scale them to these first."
        )
        return grey, (note,)
    return grey, ()


def _numbers(picture: Image.Image) -> tuple[np.ndarray, int | None]:
    """Return the values of a picture of one channel, and the bits that a TIFF says it has."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (None,))[0]
    # A TIFF counts kinds of numbers: 1 is unsigned, and so is one that does not say.
    is_signed = tags.get(_TIFF_FORMAT, (1,))[0] == 2
    values = np.asarray(picture)
    if bits == 32 and not is_signed and values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow has no mode for it
    if bits is not None and is_signed:
        bits -= 1
    return values.astype(np.float64), bits


def _full_scale(mode: str, bits: int | None, lowest: float, highest: float) -> float:
    """Return the value that stands for white.

    Raises UnusablePictureError if the values have no plain scale.
    """
    if mode == "F":
        scales = [1.0, 255.0, float(_SIXTEEN_BITS)]
        # Resampling overshoots a little; between that and twice the levels of a dark 8-bit
        # picture, nobody can tell shares of one from levels of 255.
        slack = 0.05
        if lowest >= -slack and highest <= 1 + slack:
            return scales[0]
        if lowest >= -slack and highest > _LEAST_LEVEL:
            for scale in scales[1:]:
                if highest <= scale:
                    return scale
        raise UnusablePictureError(
            f"its floating-point values run from {lowest:g} to {highest:g}; expected 0 to 1, to "
            "255 or to 65,535: scale them to one of these"
        )
    if lowest < 0:
        raise UnusablePictureError(
            f"its values run from {lowest:g} to {highest:g}; expected none below 0: scale them"
        )
    if bits is not None and bits < 31:
        return float(2**bits - 1)
    if mode.startswith("I;16"):
        return float(_SIXTEEN_BITS)
    full = float(2 ** (bits or 31) - 1)
    return next(scale for scale in (255.0, float(_SIXTEEN_BITS), full) if highest <= scale)


def _check_input_size(width: int, height: int) -> None:
    if min(width, height) < MIN_INPUT_SIDE or width * height > MAX_INPUT_PIXELS:
        raise UnusablePictureError(
            f"it is {width}x{height}; expected {MIN_INPUT_SIDE}x{MIN_INPUT_SIDE} to "
            f"{MAX_INPUT_PIXELS:,} pixels in all"
        )


def sharpness(picture: Image.Image) -> float:
    """Return how sharp a picture is: the standard deviation of the Laplacian of its brightness.

    Brightness is in 0..1, and the picture is looked at with its longer side at most 512 pixels.
    """
    scale = 512 / max(picture.size)
    if scale < 1:
        width = max(3, round(picture.width * scale))
        height = max(3, round(picture.height * scale))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    grey = np.pad(np.asarray(picture.convert("L"), dtype=np.float32) / 255, 1, mode="edge")
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((neighbours - 4 * grey[1:-1, 1:-1]).std())


def nearest_size(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (width, height) whose shape is nearest to that of a picture."""
    shape = math.log(picture.width / picture.height)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def crop_to_size(
    picture: Image.Image, sizes: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "3 height width"], tuple[int, int, int, int, int, int]]:
    """Scale a picture to cover the size that is nearest in shape, and cut out its middle.

    Returns:
        Pixels in -1..1, and SDXL's micro-conditioning in pixels: original (height, width), crop
        (top, left), target (height, width).
    """
    width, height = nearest_size(picture, sizes)
    middle, left, top = _middle(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = from_levels(torch.from_numpy(np.array(middle)).permute(2, 0, 1))
    return pixels, (picture.height, picture.width, top, left, height, width)


def covered_by_size(
    marked: Bool[np.ndarray, "rows columns"], size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """Cut marked pixels as `crop_to_size` cuts a picture.

    A pixel of the result is marked if any marked pixel reaches into it, however little.

    Args:
        marked: which pixels of a picture are marked.
        size: (width, height) in pixels of the result.
    """
    picture = Image.fromarray(marked.astype(np.float32))
    # A box filter weighs exactly the pixels that overlap with the new one.
    middle, _, _ = _middle(picture, size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(middle) > 0)


def _middle(
    picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling
) -> tuple[Image.Image, int, int]:
    """Scale a picture to cover a size (width, height), and return its middle with left and top."""
    width, height = size
    covering = ImageOps.cover(picture, size, resampling)
    left = (covering.width - width) // 2
    top = (covering.height - height) // 2
    return covering.crop((left, top, left + width, top + height)), left, top
