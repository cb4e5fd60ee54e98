"""Clips: frames with their speed, read from files and written to them.

Animated WebP is what drawings become: every browser plays it, it keeps all colours, and its EXIF
holds the metadata. MP4 (H.264) is for the programs that take nothing else; it needs the extra
`twostep[video]`. GIFs, APNGs and whatever else Pillow has frames of are read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from twostep.errors import TwostepError, reason_of
from twostep.files import write_atomically
from twostep.media.codec import Encoded
from twostep.media.comments import object_in

_DESCRIPTION = 0x010E
_EXIF_FOLDER = 0x8769
_COMMENT = 0x9286
_PARAMETERS = "parameters"
_MP4_KEY = "comment"
_MILLISECONDS = 1000
_MP4_SUFFIXES = (".mp4", ".m4v", ".mov")
_DEFAULT_SPEED = 8.0
_MOST_FRAMES = 4096


class ClipError(TwostepError):
    """A clip that cannot be read or written."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one size, and how many of them are shown in a second.

    Raises ClipError for a clip without frames, with frames of several sizes, or without a speed.
    """

    frames: tuple[Image.Image, ...]
    frames_per_second: float = _DEFAULT_SPEED

    def __post_init__(self) -> None:
        if not self.frames:
            raise ClipError("a clip needs frames, and was given none.")
        sizes = {frame.size for frame in self.frames}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise ClipError(f"the frames of a clip are of one size; these are {listed}.")
        if not 0 < self.frames_per_second <= _MILLISECONDS:
            raise ClipError(
                f"{self.frames_per_second} frames per second; expected more than 0, up to "
                f"{_MILLISECONDS}."
            )

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    def strip(self) -> Image.Image:
        """Return all frames beside each other, the first on the left."""
        width, height = self.size
        strip = Image.new("RGB", (width * len(self), height))
        for number, frame in enumerate(self.frames):
            strip.paste(frame, (number * width, 0))
        return strip


def webp_file(clip: Clip, texts: Mapping[str, str]) -> Encoded:
    """Return a clip as an animated WebP of all its colours, with texts in its EXIF.

    All texts are JSON in the image description; `parameters` stands also where A1111 looks.
    """
    exif = Image.Exif()
    if texts:
        exif[_DESCRIPTION] = json.dumps(dict(texts))
    if _PARAMETERS in texts:
        comment = b"UNICODE\0" + texts[_PARAMETERS].encode("utf-16-be")
        exif.get_ifd(_EXIF_FOLDER)[_COMMENT] = comment
    buffer = BytesIO()
    first, *others = clip.frames
    first.save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=others,
        # Pillow drops frames that are like the one before them, and shows that one for longer.
        duration=round(_MILLISECONDS / clip.frames_per_second),
        loop=0,
        lossless=True,
        exif=exif,
    )
    return Encoded(buffer.getvalue(), suffix=".webp", mime="image/webp")


def mp4_file(clip: Clip, texts: Mapping[str, str]) -> Encoded:
    """Return a clip as an MP4 with H.264, with texts as JSON in its comment.

    Raises ClipError where PyAV is not installed, and for odd sides, which H.264 does not have.
    """
    av = _pyav()
    width, height = clip.size
    if width % 2 or height % 2:
        raise ClipError(
            f"an MP4 has even sides, and the clip is {width}x{height} pixels. Write a .webp."
        )
    buffer = BytesIO()
    with av.open(
        buffer, mode="w", format="mp4", options={"movflags": "use_metadata_tags"}
    ) as container:
        if texts:
            container.metadata[_MP4_KEY] = json.dumps(dict(texts))
        rate = Fraction(clip.frames_per_second).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return Encoded(buffer.getvalue(), suffix=".mp4", mime="video/mp4")


def save_clip(clip: Clip, path: str | Path, texts: Mapping[str, str] | None = None) -> Path:
    """Write a clip to a .webp or an .mp4, by the ending of the name, and return the path.

    Raises ClipError for another ending and as `mp4_file`, WriteError where it cannot be written.
    """
    path = Path(path)
    writers = {".webp": webp_file, ".mp4": mp4_file}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise ClipError(f"{path}: clips are written as {' or '.join(writers)}; name it so.")
    with write_atomically(path) as file:
        file.write(write(clip, texts or {}).data)
    return path


def read_clip(path: str | Path) -> Clip:
    """Read the frames of a file, RGB on white, and their speed.

    A still picture is a clip of one frame. Raises ClipError for what has no frames, or too many.
    """
    path = Path(path)
    frames = tuple(_frames(path))
    return Clip(tuple(frame for frame, _ in frames), _speed([seconds for _, seconds in frames]))


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the texts that `webp_file` or `mp4_file` put into a file; none where there are none.

    Raises ClipError for a file that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in _MP4_SUFFIXES:
        with _opened_video(path) as container:
            found = container.metadata.get(_MP4_KEY)
        return _texts(found)
    try:
        with Image.open(path) as image:
            return texts_in(image)
    except (OSError, UnidentifiedImageError) as error:
        raise ClipError(_unreadable(path, error)) from error


def texts_in(image: Image.Image) -> dict[str, str]:
    """Return the texts that `webp_file` put into an opened file; none where there are none."""
    return _texts(image.getexif().get(_DESCRIPTION))


def _texts(described: object) -> dict[str, str]:
    """Read a description, which may be somebody else's."""
    texts = object_in(described) if isinstance(described, str) else {}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _frames(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of a file with the seconds that each is shown."""
    if path.suffix.lower() in _MP4_SUFFIXES:
        yield from _limited(path, _video_frames(path))
        return
    try:
        with Image.open(path) as image:
            yield from _limited(path, _picture_frames(image))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ClipError(_unreadable(path, error)) from error


def _picture_frames(image: Image.Image) -> Iterator[tuple[Image.Image, float]]:
    for frame in ImageSequence.Iterator(image):
        # Decoded first: only then it is known how long a frame is shown.
        rgba = frame.convert("RGBA")
        seconds = frame.info.get("duration", 0) / _MILLISECONDS
        opaque = Image.new("RGB", frame.size, "white")
        opaque.paste(rgba, mask=rgba.getchannel("A"))
        yield opaque, seconds


def _video_frames(path: Path) -> Iterator[tuple[Image.Image, float]]:
    with _opened_video(path) as container:
        if not container.streams.video:
            raise ClipError(f"{path} has no pictures in it; give a video.")
        rate = container.streams.video[0].average_rate
        for frame in container.decode(video=0):
            yield frame.to_image(), float(1 / rate) if rate else 0.0


def _limited(
    path: Path, frames: Iterator[tuple[Image.Image, float]]
) -> Iterator[tuple[Image.Image, float]]:
    for number, frame in enumerate(frames):
        if number == _MOST_FRAMES:
            raise ClipError(
                f"{path} has more than {_MOST_FRAMES} frames; cut a shorter clip out of it."
            )
        yield frame


def _speed(seconds: Sequence[float]) -> float:
    """Return frames per second of frames that are shown for so long; files may not say it."""
    total = sum(seconds)
    return len(seconds) / total if total > 0 else _DEFAULT_SPEED


def _opened_video(path: Path) -> Any:
    av = _pyav()
    try:
        return av.open(str(path))
    except (OSError, av.FFmpegError) as error:
        raise ClipError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} is no clip that can be read: {reason_of(error)}. Give a WebP, a GIF or an MP4."


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ClipError(
            "MP4 is read and written by PyAV, which is not installed: pip install 'twostep[video]'"
        ) from error
    return av
