"""What to make, of which pictures, and what was made.

A `Request` is the one description of a wish that Python, command line, server and evaluation share;
a `Result` is everything that is known of its answer. Image i of a request is drawn from seed + i,
so any single picture of a batch can be asked for again by itself.

This module does not know models: whether a model can honour a request is its contract's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from PIL.Image import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError

from twostep.contract import Contract
from twostep.errors import TwostepError

NUM_SEEDS = 2**63
"""Seeds are 0 <= seed < NUM_SEEDS, so that they fit a signed 64-bit integer in every file format
and language.
"""

NUM_DISTINCT_SEEDS = 2**32
"""torch's CPU generator reads the lowest 32 bits of a seed; larger seeds draw the noise of a
smaller one.
"""

MAX_BATCH = 16
"""Images that go through the network together; larger requests are drawn in several such batches.
"""

InitNoise = Literal["comfyui", "diffusers"]
"""Where a drawing begins: at pure noise, as students are trained and ComfyUI does it, or at sigma_T
times that.
"""


class RequestError(TwostepError):
    """A request that no model could honour."""


@dataclass(frozen=True)
class Picture:
    """A picture that goes in: its file's name, the hash of what that holds, and the pixels, in RGB
    on white.

    Without a file the name is empty and the hash is that of the pixels. One from JSON has none
    until it is `found`.
    """

    name: str
    sha256: str
    pixels: Image | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, source: str | Path | Image) -> Picture:
        """Read a picture's file, or take one in memory; RequestError where it is none, too small or
        too large.
        """
        from twostep.data.sources import UnusablePictureError, opened  # brings torch

        try:
            data = Path(source).read_bytes() if isinstance(source, str | Path) else source
            pixels = opened(lambda: data, for_input=True)
        except (OSError, UnusablePictureError) as error:
            raise RequestError(
                f"{source} cannot be taken: {error}. Give another PNG, JPEG or WebP."
            ) from error
        name, content = (
            ("", data.tobytes()) if isinstance(data, Image) else (Path(str(source)).name, data)
        )
        return cls(name, sha256(content).hexdigest(), pixels)

    @property
    def image(self) -> Image:
        """The pixels; RequestError where they were not read again yet."""
        if self.pixels is None:
            raise RequestError(
                f"{self.name or 'a picture in memory'} is known by name alone; call found(folders)."
            )
        return self.pixels

    def found(self, folders: Sequence[Path]) -> Picture:
        """Read the same file again, from the first folder that has it; RequestError for none, or
        only another one.
        """
        there = [
            Picture.of(path)
            for folder in folders
            if self.name and (path := folder / self.name).is_file()
        ]
        if self in there:
            return there[there.index(self)]
        problem = "is not the file that went in, by its SHA-256" if there else "is not there"
        raise RequestError(
            f"{self.name or 'a picture without a file'} {problem}; looked in {[*map(str, folders)]}."
        )


@dataclass(frozen=True)
class Control:
    """A ControlNet with the picture it looks at, how strongly it acts, and from and to which share
    of the steps.

    `model` is a built-in name, a folder or a hub id. Raises RequestError for impossible values.
    """

    picture: Picture
    model: str = "silhouette"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.scale < float("inf") and 0 <= self.start < self.end <= 1):
            expected = "expected a scale from 0 up, rising shares in 0..1"
            raise RequestError(
                f"control at {self.scale:g}, {self.start:g}-{self.end:g}: {expected}."
            )


@dataclass(frozen=True)
class Request:
    """One wish: a prompt, how many pictures of it, and from which noise.

    `steps`, `guidance`, `width` and `height` (pixels) left at None take what the model's contract
    recommends. `image` is changed instead of drawn anew: `strength`, above 0 and up to 1, says how
    much (0.75, with a mask 1), and only where `mask`, of the same size, is white. Raises
    `RequestError` where a value is impossible for any model.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    prompt: str
    num_images: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)
    guidance: float | None = field(default=None, kw_only=True)
    negative_prompt: str = field(default="", kw_only=True)
    width: int | None = field(default=None, kw_only=True)
    height: int | None = field(default=None, kw_only=True)
    image: Picture | None = field(default=None, kw_only=True)
    strength: float | None = field(default=None, kw_only=True)
    mask: Picture | None = field(default=None, kw_only=True)
    controls: tuple[Control, ...] = field(default=(), kw_only=True)
    init_noise: InitNoise = field(default="comfyui", kw_only=True)

    def __post_init__(self) -> None:
        for name, holds, expected in self._rules():
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected {expected}.")
        image, mask = (picture and picture.pixels for picture in (self.image, self.mask))
        if image and mask and image.size != mask.size:
            sizes = f"{mask.width}x{mask.height} and the image {image.width}x{image.height}"
            raise RequestError(
                f"the mask is {sizes} pixels; expected the same size. Paint it on a copy of the image."
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield fields, whether they hold what is possible, and what that is; a rule may rest on
        those before it.
        """
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            encodable = isinstance(text, str) and re.search("[\ud800-\udfff]", text) is None
            yield name, encodable, "text in UTF-8. For several prompts make one request each"
        yield (
            "num_images",
            _is_whole(self.num_images, 1),
            "a whole number from 1 up: ask for at least one image",
        )
        yield (
            "seed",
            _is_whole(self.seed, 0),
            "a whole number from 0 up. Image i is drawn from seed + i",
        )
        known = f"every seed of {self.num_images} image(s) below 2**63; below 2**32 torch tells them apart"
        yield "seed", self.seed + self.num_images <= NUM_SEEDS, known
        for name in ("steps", "width", "height"):
            possible = getattr(self, name) is None or _is_whole(getattr(self, name), 1)
            yield (
                name,
                possible,
                "a whole number from 1 up, or leave it out to take the model's own",
            )
        fits = self.guidance is None or 0 <= self.guidance < float("inf")
        yield "guidance", fits, "a number from 0 up. 1 means none, 3 to 8 is usual"
        yield (
            "init_noise",
            self.init_noise in get_args(InitNoise),
            f"one of {', '.join(get_args(InitNoise))}",
        )
        for name in ("strength", "mask"):
            has_image = getattr(self, name) is None or self.image is not None
            yield (
                name,
                has_image,
                "none without an image, for it says how that is changed: give the image too",
            )
        share = self.strength is None or 0 < self.strength <= 1
        yield "strength", share, "a number above 0, up to 1 for all of the image"

    @property
    def seeds(self) -> list[int]:
        """One seed per image: seed, seed + 1, ..."""
        return [self.seed + i for i in range(self.num_images)]

    def only(self, seed: int) -> Request:
        """Return the request that draws exactly one of this request's pictures."""
        return replace(self, num_images=1, seed=seed)

    def found(self, folders: Sequence[Path]) -> Request:
        """Return the same request with every picture that goes in read again."""
        controls = tuple(
            replace(control, picture=control.picture.found(folders)) for control in self.controls
        )
        image, mask = (picture and picture.found(folders) for picture in (self.image, self.mask))
        return replace(self, image=image, mask=mask, controls=controls)

    def to_json(self) -> str:
        """Write the request as one line of JSON; of pictures names and hashes."""
        values = asdict(
            self, dict_factory=lambda pairs: {key: value for key, value in pairs if key != "pixels"}
        )
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote; raises `RequestError` for anything else."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first, known = error.errors()[0], ", ".join(each.name for each in fields(cls))
            place = ".".join(map(str, first["loc"])) or "it"
            expected = f"expected a JSON object with a prompt and none but {known}"
            raise RequestError(
                f"{text[:80]!r} is no request, for {place}: {first['msg']}; {expected}."
            ) from error


@dataclass(frozen=True)
class Result:
    """What was made of a request.

    `request` has every default filled in and the guidance and strength that were really used,
    `seconds` is per stage ("text", "encode", "denoise", "decode"), `warnings` are sentences for a
    person, `origin` is the model and the LoRAs as they were named when the bundle was loaded.
    """

    images: list[Image]
    seeds: list[int]
    seconds: dict[str, float]
    warnings: list[str]
    contract: Contract
    request: Request
    origin: tuple[str, ...] = ()

    @property
    def seconds_per_image(self) -> float:
        """Time of all stages divided by the number of images."""
        return sum(self.seconds.values()) / len(self.images)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
