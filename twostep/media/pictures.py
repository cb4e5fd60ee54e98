"""Pictures that a user gives: opened, measured, and cut to a size that a model draws."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from twostep.errors import TwostepError

MIN_INPUT_SIDE = 8
"""The least width and height, in pixels, of a picture that a drawing is made of."""

MAX_INPUT_PIXELS = 2**26
"""The most pixels of such a picture; more would fill the memory."""


class UnusablePictureError(TwostepError):
    """One picture that cannot be used; its message is the reason."""


def open_picture(
    read: Callable[[], bytes | Image.Image], *, for_input: bool = False
) -> Image.Image:
    """Return a picture in RGB, upright and on white.

    Args:
        read: Returns the bytes of a file, or a picture.
        for_input: Whether a drawing is made of it, so that its size is limited.

    Raises:
        UnusablePictureError: It cannot be read, or is too small or too large.
    """
    try:
        data = read()
        picture = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        if for_input:
            _check_input_size(*picture.size)
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusablePictureError(f"it cannot be read ({error})") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


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
    covering = ImageOps.cover(picture, (width, height), Image.Resampling.LANCZOS)
    left = (covering.width - width) // 2
    top = (covering.height - height) // 2
    middle = covering.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (picture.height, picture.width, top, left, height, width)
