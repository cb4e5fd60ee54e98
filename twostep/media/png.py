"""PNG files with text chunks; needs Pillow alone, so that saving a picture loads nothing else."""

from collections.abc import Mapping
from io import BytesIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.media.codec import Encoded


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """Return an image as the bytes of a PNG with these text chunks."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def png_file(image: Image.Image, texts: Mapping[str, str]) -> Encoded:
    """Return an image as a PNG file with these text chunks."""
    return Encoded(encode_png(image, texts), suffix=".png", mime="image/png")
