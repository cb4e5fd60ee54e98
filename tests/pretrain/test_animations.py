"""Animated drawings from archives and folders of WebPs."""

import io
import random
import tarfile

import pytest
import torch
from PIL import Image

from twostep.formats.motion_files import MotionConfig
from twostep.models.motion import load_pictures, motion_contract, with_motion
from twostep.networks.motion import MotionModule
from twostep.pretrain.animations import (
    AnimatedDrawings,
    animated_drawings,
    read_animations,
    words_of,
)
from twostep.pretrain.drawings import DrawingsError


def webp(colours, side=20) -> bytes:
    """Return an animated WebP of a square of each colour on nothing."""
    frames = []
    for colour in colours:
        frame = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        frame.paste((*colour, 255), (5, 5, 15, 15))
        frames.append(frame)
    first, *others = frames
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=40, lossless=True, exact=True
    )
    return buffer.getvalue()


RAMP = [(20 * number, 100, 200) for number in range(12)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("npm") / "anim.tgz"
    files = {
        "package/assets/1f98a.webp": webp(RAMP),
        "package/assets/1f44b-1f3fb.webp": webp(RAMP[:4]),
        "package/assets/1f44b.webp": webp(RAMP[:4]),
        "package/assets/1f600.webp": webp(RAMP[:1]),
        "package/readme.md": b"no drawing",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_animated_ones_are_read_evenly_over_their_time(archive, tmp_path) -> None:
    animations = read_animations(archive, num_frames=4, pixels=20)
    assert [each.name for each in animations] == ["1f44b", "1f44b", "1f98a"]
    assert animations[0].is_held_out == animations[1].is_held_out
    fox = animations[2]
    assert fox.words == "fox face" and fox.frames.shape == (4, 4, 20, 20)
    # Frames 0, 3, 6 and 9 of twelve.
    assert fox.frames[:, 0, 10, 10].tolist() == [0, 60, 120, 180]
    assert fox.frames[0, 3, 10, 10] == 255 and fox.frames[0, 3, 0, 0] == 0
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "red_square.webp").write_bytes(webp(RAMP))
    (only,) = read_animations(tmp_path, num_frames=2, pixels=10)
    assert only.words == "red square"


def test_names_are_words() -> None:
    assert words_of("1f98a") == "fox face"
    assert words_of("fe0f-2764") == "heavy black heart"
    assert words_of("big-fox") == "big fox"


def test_clips_go_round_and_are_captioned(archive, tmp_path) -> None:
    (picture,) = load_pictures(["nano"])
    shape = MotionConfig.on(picture.denoiser.network.config)
    contract = motion_contract(picture.contract, "clips", recipe="none", version="0")
    teacher = with_motion([picture], MotionModule(shape), contract, frames=4)
    animations = tuple(read_animations(archive, num_frames=4, pixels=64)[2:])
    clips = AnimatedDrawings(animations, teacher)
    latents, captions = clips.draw(8, torch.Generator().manual_seed(0), random.Random(0))
    assert latents.shape == (8, 4, 4, 16, 16) and len(captions) == 8
    assert any("fox face" in caption for caption in captions)
    decoded = teacher.codec.decode(latents)
    red = decoded[:, 0, :, 32, 32]
    # The square gets redder from frame to frame, and falls back once where it goes round.
    falls = (red[:, 1:] < red[:, :-1]).sum(dim=1)
    assert set(falls.tolist()) <= {0, 1} and int(falls.sum()) > 0
    source = animated_drawings(
        teacher, tmp_path, lambda done, total, words: None, source=str(archive)
    )
    assert source.draw(2, torch.Generator(), random.Random(0))[0].shape == (2, 4, 4, 16, 16)


def test_bad_sources_are_refused(archive, tmp_path) -> None:
    (tmp_path / "still.webp").write_bytes(webp(RAMP[:1]))
    with pytest.raises(DrawingsError, match="no animated WebP"):
        read_animations(tmp_path, num_frames=4, pixels=10)
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    with pytest.raises(DrawingsError, match=r"broken\.webp is damaged"):
        read_animations(tmp_path, num_frames=4, pixels=10)
    (tmp_path / "text.tgz").write_text("hello")
    with pytest.raises(DrawingsError, match="neither an archive"):
        read_animations(tmp_path / "text.tgz", num_frames=4, pixels=10)
