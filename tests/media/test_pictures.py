"""A user's picture is upright, on white, within limits, and cut to the nearest shape."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from twostep.media.codec import Codec, Encoded
from twostep.media.pictures import (
    UnusablePictureError,
    covered_by_size,
    crop_to_size,
    examine_picture,
    nearest_size,
    open_picture,
)
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


SIDE = 64
RAMP = np.repeat(np.linspace(0, 1, SIDE)[None], SIDE, axis=0)
SHADES = np.round(RAMP * 255).astype(np.uint8)
"""What every ramp below must come out as, to half a level."""


def encoded(picture: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def tiff_of_twelve_bits() -> bytes:
    """A TIFF whose field BitsPerSample says 12, packed two values in three bytes."""
    values = np.round(RAMP * 4095).astype(np.uint32).reshape(-1, 2)
    packed = values[:, 0] << 12 | values[:, 1]
    data = np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8).tobytes()
    fields = [(256, SIDE), (257, SIDE), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    fields += [(278, SIDE), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    directory = struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (RAMP * 65535, ("uint16", "PNG")),
        (RAMP * 65535, ("uint16", "TIFF")),
        (RAMP * 65535, ("uint16", "JPEG2000")),
        (RAMP * 65535, ("int32", "PPM")),
        (RAMP * 65535, ("int32", "TIFF")),
        (RAMP * 255, ("int32", "TIFF")),
        (RAMP * (2**31 - 1), ("int32", "TIFF")),
        (RAMP, ("float32", "TIFF")),
        (RAMP * 255, ("float32", "TIFF")),
        (RAMP * 65535, ("float32", "TIFF")),
    ],
)
def test_more_than_eight_bits_are_scaled_by_type_and_range(
    values: np.ndarray, form: tuple[str, str]
) -> None:
    """From a file and from memory; before, all above 255 was white, and shares of one black."""
    precision, file = form
    typed = (values if precision == "float32" else np.round(values)).astype(precision)
    picture = Image.fromarray(typed)
    for source in (encoded(picture, file), picture):
        opened = np.asarray(open_picture(lambda source=source: source)).astype(int)
        assert np.abs(opened - SHADES[..., None]).max() <= 1
        assert len(np.unique(opened)) == SIDE


def test_a_tiff_says_how_many_bits_it_has() -> None:
    opened = np.asarray(open_picture(tiff_of_twelve_bits)).astype(int)
    assert np.abs(opened[..., 0] - SHADES).max() <= 1


def test_a_dark_picture_of_sixteen_bits_stays_dark_and_is_mentioned() -> None:
    """Twelve bits in sixteen look like that; a shadow is no reason to guess."""
    picture = Image.fromarray(np.round(RAMP * 4095).astype(np.uint16))
    opened = examine_picture(lambda: encoded(picture, "PNG"))
    assert np.asarray(opened.pixels).max() == round(255 * 4095 / 65535)
    assert "brightest value is 4095 of 65,535" in opened.notes[0]
    assert examine_picture(lambda: picture.resize((9, 9))).notes
    assert examine_picture(lambda: Image.fromarray((RAMP * 65535).astype("uint16"))).notes == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 2 - 1, "run from -1 to 1"),
        (RAMP * 3, "run from 0 to 3; expected 0 to 1, to 255 or to 65,535"),
        (RAMP * 1e6, "run from 0 to 1e"),
        (np.where(RAMP > 0.5, np.nan, 0), "NaN or infinity"),
        (np.where(RAMP > 0.5, np.inf, 0), "NaN or infinity"),
        ((RAMP * 9 - 3).astype(np.int32), "expected none below 0"),
    ],
)
def test_values_without_a_plain_scale_are_refused(values: np.ndarray, message: str) -> None:
    picture = Image.fromarray(values.astype("float32") if values.dtype == float else values)
    with pytest.raises(UnusablePictureError, match=message):
        open_picture(lambda: encoded(picture, "TIFF"))


def test_what_was_transparent_is_known_in_every_mode() -> None:
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[2:4] = 255
    opened = examine_picture(lambda: Image.fromarray(layer))
    assert np.array_equal(np.asarray(opened.alpha), layer[..., 3])
    deep = Image.fromarray(np.full((8, 8), 7, np.uint16))
    file = io.BytesIO()
    deep.save(file, "PNG", transparency=7)
    opened = examine_picture(file.getvalue)
    assert np.asarray(opened.alpha).max() == 0 and opened.pixels.getpixel((0, 0)) == (255,) * 3
    assert examine_picture(lambda: Image.new("RGB", (8, 8))).alpha is None


def test_a_deep_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.zeros((10, 20), np.uint16)).save(file, "PNG", exif=exif)
    assert open_picture(file.getvalue).size == (10, 20)


def test_every_pixel_that_a_mark_touches_is_covered() -> None:
    """A line of one pixel in a picture ten times as large, and one that is cut away."""
    marked = np.zeros((640, 640), bool)
    marked[:, 127] = True  # the last of the ten columns that become column 12
    covered = covered_by_size(marked, (64, 64)).numpy()
    assert covered[:, 12].all() and covered.sum() == 64
    assert np.array_equal(covered_by_size(marked, (640, 640)).numpy(), marked)
    wide = np.zeros((64, 128), bool)
    wide[:, :20] = True
    assert not covered_by_size(wide, (64, 64)).any()
    uneven = np.zeros((90, 90), bool)
    uneven[45, 45] = True
    rows, columns = np.nonzero(covered_by_size(uneven, (64, 64)).numpy())
    # Pixel 45 of 90 reaches from 32 to 32.71 of 64.
    assert rows.tolist() == columns.tolist() == [32]


FORMS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000")


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_five_hundred_damaged_pictures_are_refused_or_right() -> None:
    """Flips, cuts, zeros and repeats: one reason and no other error, and of formats with checksums
    no other pixels than before.
    """
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    deep = random.integers(0, 65536, (40, 40), dtype=np.uint16)
    sources = [(form, encoded(Image.fromarray(noise), form)) for form in FORMS]
    sources += [("PNG", encoded(Image.fromarray(deep), "PNG"))]
    sources += [("TIFF", encoded(Image.fromarray(deep), "TIFF"))]
    # Of a smooth one Pillow takes a third of all flips for pixels, where nobody compares checksums.
    smooth = np.linspace(0, 255, 120_000).reshape(200, 200, 3).astype(np.uint8)
    sources += [("PNG", encoded(Image.fromarray(smooth), "PNG"))]
    refused = 0
    for case in range(500):
        form, data = sources[case % len(sources)]
        damaged = damage(data, case // len(sources) % 5, random)
        whole = np.asarray(open_picture(lambda data=data: data))
        try:
            opened = np.asarray(open_picture(lambda damaged=damaged: damaged, for_input=True))
        except UnusablePictureError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert opened.dtype == np.uint8 and opened.ndim == 3 and opened.shape[2] == 3
        if form == "PNG":
            assert np.array_equal(opened, whole), (case, "a PNG has checksums")
        if case // len(sources) % 5 == 1:
            # What is cut off may only be what does not matter.
            assert np.array_equal(opened, whole), (case, form, "was cut off and accepted")
    assert refused > 200


def damage(data: bytes, way: int, random: np.random.Generator) -> bytes:
    """Damage a file: flip bits, cut, blank, double or exchange a stretch."""
    place, length = int(random.integers(0, len(data))), int(random.integers(1, 40))
    if way == 0:
        flipped = bytearray(data)
        for index in random.integers(0, len(data), 3):
            flipped[index] ^= 1 << int(random.integers(0, 8))
        return bytes(flipped)
    if way == 1:
        return data[:place]
    if way == 2:
        return data[:place] + bytes(length) + data[place + length :]
    if way == 3:
        return data[: place + length] + data[place:]
    return data[:place] + random.bytes(length) + data[place + length :]
