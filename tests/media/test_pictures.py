"""A user's picture is upright, on white, within limits, and cut to the nearest shape."""

import io

import pytest
from PIL import Image

from twostep.media.codec import Codec, Encoded
from twostep.media.pictures import UnusablePictureError, crop_to_size, nearest_size, open_picture
from twostep.models.loading import load_bundle


def test_it_is_upright_and_on_white() -> None:
    picture = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    picture.save(file, format="PNG", exif=exif)
    opened = open_picture(file.getvalue)
    assert opened.size == (10, 20)
    assert opened.getpixel((5, 5)) == (255, 255, 255)


def test_what_a_drawing_is_made_of_is_limited_in_size() -> None:
    tiny = Image.new("RGB", (7, 40))
    assert open_picture(lambda: tiny).size == (7, 40)
    with pytest.raises(UnusablePictureError, match=r"it is 7x40; expected 8x8 to 67,108,864"):
        open_picture(lambda: tiny, for_input=True)
    with pytest.raises(UnusablePictureError, match="cannot be read"):
        open_picture(lambda: b"\x89PNG broken")


def test_it_is_cut_to_the_nearest_shape() -> None:
    sizes = [(64, 64), (48, 80), (80, 48)]
    picture = Image.new("RGB", (50, 100))
    assert nearest_size(picture, sizes) == (48, 80)
    assert crop_to_size(picture, sizes)[0].shape == (3, 80, 48)


def test_the_codec_of_pictures_makes_items_and_files() -> None:
    codec = load_bundle("nano", steps=2).codec
    assert isinstance(codec, Codec)
    assert codec.media == "image"
    assert tuple(codec.latent_shape(64, 32)) == (4, 8, 16)
    pixels = crop_to_size(Image.new("RGB", (64, 64), "red"), [(64, 64)])[0][None]
    (image,) = codec.items(pixels)
    assert image.getpixel((3, 3)) == (255, 0, 0)
    file = codec.file(image, {"parameters": "a red square"})
    assert isinstance(file, Encoded)
    assert (file.suffix, file.mime) == (".png", "image/png")
    again = Image.open(io.BytesIO(file.data))
    assert again.text == {"parameters": "a red square"}
