"""Clips in files: frames, speed and texts come back, and what is none is refused."""

import json

import pytest
from PIL import Image, ImageDraw

from twostep.media.clip import (
    Clip,
    ClipError,
    mp4_file,
    read_clip,
    read_texts,
    save_clip,
    webp_file,
)


def moving_dot(count=5, side=32, speed=12.5):
    frames = []
    for number in range(count):
        frame = Image.new("RGB", (side, side), (58, 108, 220))
        left = 4 + 4 * number
        ImageDraw.Draw(frame).rectangle((left, 10, left + 5, 18), fill=(240, 140, 50))
        frames.append(frame)
    return Clip(tuple(frames), speed)


TEXTS = {"parameters": "ein Fuchs, läuft\nSteps: 2", "twostep": json.dumps({"contract": {}})}


def test_webp_keeps_every_pixel_the_speed_and_the_texts(tmp_path) -> None:
    clip = moving_dot()
    encoded = webp_file(clip, TEXTS)
    assert (encoded.suffix, encoded.mime) == (".webp", "image/webp")
    path = tmp_path / "dot.webp"
    path.write_bytes(encoded.data)
    again = read_clip(path)
    assert [frame.tobytes() for frame in again.frames] == [f.tobytes() for f in clip.frames]
    assert again.frames_per_second == pytest.approx(12.5)
    assert read_texts(path) == TEXTS
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == TEXTS["parameters"]


def test_mp4_keeps_frames_speed_and_texts(tmp_path) -> None:
    pytest.importorskip("av")
    clip = moving_dot(side=64)
    path = save_clip(clip, tmp_path / "dot.mp4", TEXTS)
    again = read_clip(path)
    assert len(again) == 5 and again.size == (64, 64)
    assert again.frames_per_second == pytest.approx(12.5)
    assert read_texts(path) == TEXTS
    red, green, blue = again.frames[2].getpixel((14, 14))
    assert red > 200 and 100 < green < 180 and blue < 90  # orange, after lossy coding
    with pytest.raises(ClipError, match="even sides, and the clip is 33x33"):
        mp4_file(moving_dot(side=33), {})


def test_gifs_and_stills_are_read(tmp_path) -> None:
    clip = moving_dot()
    first, *others = clip.frames
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=100)
    assert len(read_clip(tmp_path / "a.gif")) == 5
    assert read_clip(tmp_path / "a.gif").frames_per_second == pytest.approx(10)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "still.png")
    still = read_clip(tmp_path / "still.png")
    assert len(still) == 1 and still.frames[0].getpixel((0, 0)) == (255, 255, 255)
    assert read_texts(tmp_path / "still.png") == {}


def test_strip_has_all_frames_in_order() -> None:
    clip = moving_dot()
    strip = clip.strip()
    assert strip.size == (160, 32)
    assert strip.crop((64, 0, 96, 32)).tobytes() == clip.frames[2].tobytes()


def test_bad_clips_are_refused(tmp_path) -> None:
    with pytest.raises(ClipError, match="given none"):
        Clip(())
    with pytest.raises(ClipError, match="these are 4x4, 5x4"):
        Clip((Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))))
    with pytest.raises(ClipError, match=r"0\.0 frames per second"):
        Clip((Image.new("RGB", (4, 4)),), 0.0)
    with pytest.raises(ClipError, match=r"\.webp or \.mp4"):
        save_clip(moving_dot(), tmp_path / "dot.avi")
    (tmp_path / "text.webp").write_text("hello")
    with pytest.raises(ClipError, match="no clip that can be read"):
        read_clip(tmp_path / "text.webp")
    with pytest.raises(ClipError, match="no clip that can be read"):
        read_clip(tmp_path / "missing.mp4")
