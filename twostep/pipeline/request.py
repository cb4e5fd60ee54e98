"""The wish and the answer: `Request` says all that a drawing depends on, `Result` what came of it.

Python, the command line, the server and evaluation share these two. Image i of a request is drawn
from seed + i, so any single picture of a request can be asked for again by itself.

This module loads neither torch nor models: whether a model can honour a request is decided by its
contract.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from PIL.Image import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError

from twostep.contract import Contract
from twostep.errors import TwostepError, reason_of
from twostep.media.codec import Encoded
from twostep.media.png import png_file
from twostep.pipeline.settings import DrawingSettings

NUM_SEEDS = 2**63
"""Seeds are 0 <= seed < NUM_SEEDS, so that they fit a signed 64-bit integer in every file format
and language.
"""

NUM_DISTINCT_SEEDS = 2**32
"""torch's CPU generator reads the lowest 32 bits of a seed. A larger seed draws the noise of a
smaller one.
"""

MAX_BATCH = 16
"""Images that go through the network together. Larger requests are drawn in several batches."""

InitNoise = Literal["comfyui", "diffusers"]
"""Where a drawing begins.

"comfyui" begins at pure noise, as students are trained. "diffusers" begins at sigma_T times that.
"""

SAMPLERS = {"euler": "Euler", "dpmpp-2m": "DPM++ 2M", "unipc": "UniPC", "renoise": "LCM"}
"""The samplers that a request may name, and what A1111 calls them."""

WHITE = 128
"""The least level of 255 that counts as white, or as opaque, in a mask."""

_LORA = re.compile(r"(?P<name>.+?)(?::(?P<weight>-?(?:\d+\.?\d*|\.\d+)))?")


_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_LORA_TAG = re.compile(
    r"<(?:lora|lyco):(?P<name>(?:hf:)?[^:<>]+)(?::(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)))?>"
)
"""A LoRA in a prompt, as A1111 has it."""


class RequestError(TwostepError):
    """A request that no model could honour."""


@dataclass(frozen=True)
class Picture:
    """A picture that goes into a drawing: the name of its file, a hash, and the pixels.

    `sha256` is that of the file, or of the pixels where there is no file; `name` is then empty. The
    pixels are RGB on white, and `alpha` is how opaque they were, None where all are. A picture that
    was read from JSON has neither until `reopen` is called. `notes` are sentences about what a
    person might not expect of it. `is_eight_bit` is false where larger values were scaled, which
    other programs do in ways of their own.
    """

    name: str
    sha256: str
    pixels: Image | None = field(default=None, repr=False, compare=False)
    alpha: Image | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    is_eight_bit: bool = field(default=True, repr=False, compare=False)

    @classmethod
    def of(cls, source: str | Path | bytes | Image) -> Picture:
        """Read a picture from a file or from a file's bytes, or take one in memory.

        Raises RequestError where it is no picture, or too small or too large to draw from.
        """
        # These bring torch, which a request without pictures does without.
        from twostep.media.pictures import UnusablePictureError, examine_picture

        try:
            data = Path(source).read_bytes() if isinstance(source, str | Path) else source
            opened = examine_picture(lambda: data, for_input=True)
        except (OSError, ValueError, UnusablePictureError) as error:
            named = "a picture" if isinstance(source, bytes) else source
            reason = reason_of(error)
            if str(source).startswith(("http:/", "https:/")):
                reason = "addresses are not fetched; save the picture first"
            raise RequestError(
                f"{named} cannot be taken: {reason}. Give another PNG, JPEG or WebP."
            ) from error
        name = Path(source).name if isinstance(source, str | Path) else ""
        digest = sha256(data.tobytes() if isinstance(data, Image) else data)
        return cls(
            name,
            digest.hexdigest(),
            pixels=opened.pixels,
            alpha=opened.alpha,
            notes=opened.notes,
            is_eight_bit=opened.is_eight_bit,
        )

    @property
    def image(self) -> Image:
        """The pixels; raises RequestError where they have not been read again yet."""
        if self.pixels is None:
            name = self.name or "a picture in memory"
            raise RequestError(f"{name} is known by name alone; call reopen(folders).")
        return self.pixels

    @property
    def is_white_on_nothing(self) -> bool:
        """Whether there are white strokes on a transparent layer, and nothing else."""
        if self.alpha is None:
            return False
        # Most requests have no mask, and what hands them over does without numpy.
        import numpy as np

        is_opaque = np.asarray(self.alpha) >= WHITE
        is_white = np.asarray(self.image.convert("L")) >= WHITE
        return bool(is_opaque.any()) and not is_opaque.all() and bool(is_white[is_opaque].all())

    def reopen(self, folders: Sequence[Path]) -> Picture:
        """Read the same file again from the first of the folders that has it.

        Raises RequestError where no folder has a file of that name, or only one with other content.
        """
        paths = [folder / self.name for folder in folders if self.name]
        candidates = [Picture.of(path) for path in paths if path.is_file()]
        for candidate in candidates:
            if candidate == self:
                return candidate
        problem = "is not there"
        if candidates:
            problem = "is not the file that went in, by its SHA-256"
        name = self.name or "a picture without a file"
        raise RequestError(f"{name} {problem}; looked in {[str(folder) for folder in folders]}.")


@dataclass(frozen=True)
class Control:
    """A ControlNet, the picture it looks at, its scale, and the share of the steps it acts in.

    `model` is a built-in name, a folder or a hub id. `scale` is 0 or more. `start` and `end` are
    shares of the steps in 0..1. Raises RequestError for values outside of these.
    """

    picture: Picture
    model: str = "silhouette"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        has_scale = 0 <= self.scale < math.inf
        has_share = 0 <= self.start < self.end <= 1
        if not (has_scale and has_share):
            raise RequestError(
                f"control at {self.scale:g}, {self.start:g}-{self.end:g}: "
                "expected a scale from 0 up, rising shares in 0..1."
            )


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA and its weight.

    `name` is a path, a built-in name or an official file. A weight of 1 adds the LoRA as it was
    trained; weights may be negative. Raises RequestError for an empty name or an infinite weight.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise RequestError("a LoRA has an empty name; expected a file, or file:weight.")
        if not math.isfinite(self.weight):
            raise RequestError(f"{self.name} has the weight {self.weight}; expected a finite one.")

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read "file" or "file:0.8"."""
        match = _LORA.fullmatch(text)
        if match is None or match["weight"] is None:
            return cls(text)
        return cls(match["name"], float(match["weight"]))

    def __str__(self) -> str:
        """Return what `parse` reads."""
        if self.weight == 1:
            return self.name
        return f"{self.name}:{Decimal(repr(self.weight)):f}"


@dataclass(frozen=True)
class Request(DrawingSettings):
    """One wish: what to draw, how many pictures of it, from which noise, and with which model.

    Beside what `DrawingSettings` has:

    - `image`, `mask`: a picture that is changed instead of drawn anew, and where: white in a
      picture of the same size.
    - `controls`: ControlNets.
    - `init_noise`: where the drawing begins.
    - `model`: a built-in name, a folder, a file or a hub id.
    - `loras`: LoRAs in order, each a `LoraChoice`, "file" or "file:0.8". `<lora:file:0.8>` in the
      prompt adds one and is taken out of the text.
    - `engine`: what runs the network.
    - `embeddings`: files and folders of textual inversions, whose names, or "embedding:name", then
      stand for them in the prompts.
    - `treated_as`: the few-step kind of a model of others ("lightning", "turbo", "lcm", "hyper",
      "dmd2"), which is then drawn as a student of so many steps, or "base" for none.

    `generate(bundle, request)` draws with the bundle it is given and reads neither `model`,
    `loras`, `engine`, `decoder` nor `treated_as`; a `Studio` loads what they say. Raises
    `RequestError` where a value is impossible for any model.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    image: Picture | None = field(default=None, kw_only=True)
    mask: Picture | None = field(default=None, kw_only=True)
    controls: tuple[Control, ...] = field(default=(), kw_only=True)
    init_noise: InitNoise = field(default="comfyui", kw_only=True)
    model: str = field(default="nano", kw_only=True)
    loras: tuple[LoraChoice | str, ...] = field(default=(), kw_only=True)
    engine: str = field(default="eager", kw_only=True)
    embeddings: tuple[str, ...] = field(default=(), kw_only=True)
    treated_as: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, holds, expected in self._rules():
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected {expected}.")
        self._check_mask()
        choices = tuple(
            LoraChoice.parse(lora) if isinstance(lora, str) else lora for lora in self.loras
        )
        prompt, more = _loras_in(self.prompt)
        if _loras_in(self.negative_prompt)[1]:
            raise RequestError("negative_prompt has <lora:...>; put it into the prompt.")
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "loras", (*choices, *more))

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yield the name of a field, whether its value is possible, and what is.

        A rule may rest on those before it.
        """
        yield from self._text_rules()
        yield from self._number_rules()
        yield from self._picture_rules()

    def _text_rules(self) -> Iterator[tuple[str, bool, str]]:
        for name in ("prompt", "negative_prompt"):
            expected = "text in UTF-8. For several prompts make one request each"
            yield name, _is_text(getattr(self, name)), expected
        for name in ("model", "engine", "decoder"):
            value = getattr(self, name)
            yield name, _is_text(value) and bool(value.strip()), "a name that is not empty"
        known = all(isinstance(lora, LoraChoice | str) for lora in self.loras)
        yield "loras", known, "each to be a file, file:weight or a LoraChoice"
        known = all(_is_text(place) and place.strip() for place in self.embeddings)
        yield "embeddings", known, "each to be a file or a folder"

    def _number_rules(self) -> Iterator[tuple[str, bool, str]]:
        expected = "a whole number from 1 up: ask for at least one image"
        yield "num_images", _is_whole(self.num_images, 1), expected
        expected = "a whole number from 0 up. Image i is drawn from seed + i"
        yield "seed", _is_whole(self.seed, 0), expected
        expected = (
            f"every seed of {self.num_images} image(s) below 2**63; "
            "below 2**32 torch tells them apart"
        )
        yield "seed", self.seed + self.num_images <= NUM_SEEDS, expected
        for name in ("steps", "width", "height", "frames"):
            value = getattr(self, name)
            expected = "a whole number from 1 up, or leave it out to take the model's own"
            yield name, value is None or _is_whole(value, 1), expected
        possible = self.guidance is None or 0 <= self.guidance < math.inf
        yield "guidance", possible, "a number from 0 up. 1 means none, 3 to 8 is usual"

    def _picture_rules(self) -> Iterator[tuple[str, bool, str]]:
        known = self.sampler is None or self.sampler in SAMPLERS
        yield "sampler", known, f"one of {', '.join(SAMPLERS)}"
        named = self.treated_as is None or _is_text(self.treated_as)
        yield "treated_as", named, "the name of a few-step kind"
        choices = get_args(InitNoise)
        yield "init_noise", self.init_noise in choices, f"one of {', '.join(choices)}"
        for name in ("strength", "mask"):
            has_image = getattr(self, name) is None or self.image is not None
            expected = "none without an image, for it says how that is changed: give the image too"
            yield name, has_image, expected
        possible = self.strength is None or 0 < self.strength <= 1
        yield "strength", possible, "a number above 0, up to 1 for all of the image"

    def _check_mask(self) -> None:
        """Refuse a mask of another size than the image, where the pixels of both are known."""
        if self.image is None or self.mask is None:
            return
        image = self.image.pixels
        mask = self.mask.pixels
        if image is not None and mask is not None and image.size != mask.size:
            raise RequestError(
                f"the mask is {mask.width}x{mask.height} and the image "
                f"{image.width}x{image.height} pixels; expected the same size. "
                "Paint it on a copy of the image."
            )

    @property
    def seeds(self) -> list[int]:
        """One seed per image: seed, seed + 1, ..."""
        return [self.seed + i for i in range(self.num_images)]

    def only(self, seed: int) -> Request:
        """Return the request that draws exactly one of this request's pictures."""
        return replace(self, num_images=1, seed=seed)

    def reopen(self, folders: Sequence[Path]) -> Request:
        """Return the same request with every picture that goes in read again.

        Raises as `Picture.reopen`.
        """
        controls = tuple(
            replace(control, picture=control.picture.reopen(folders)) for control in self.controls
        )
        image = None if self.image is None else self.image.reopen(folders)
        mask = None if self.mask is None else self.mask.reopen(folders)
        return replace(self, image=image, mask=mask, controls=controls)

    def to_json(self) -> str:
        """Write the request as one line of JSON.

        Of pictures it holds names and hashes, of LoRAs "file" or "file:weight".
        """
        values = asdict(self, dict_factory=_without_pixels)
        values["loras"] = [str(lora) for lora in self.loras]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote, also before there were `model`, `loras` and `engine`.

        Raises `RequestError` for anything else.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            known = ", ".join(each.name for each in fields(cls))
            raise RequestError(
                f"{text[:80]!r} is no request, for {place}: {first['msg']}; "
                f"expected a JSON object with a prompt and none but {known}."
            ) from error


@dataclass(frozen=True)
class ModelTraits:
    """What other programs must be told of a drawing, and neither contract nor request says.

    - `zeros_for_empty`: whether the empty prompt was all zeros.
    - `is_inpainting`: whether the network itself saw the mask.
    - `is_long`: whether a prompt went beyond one chunk of the text encoders.
    """

    zeros_for_empty: bool = False
    is_inpainting: bool = False
    is_long: bool = False


@dataclass(frozen=True)
class Result:
    """What was made of a request.

    - `images`: one for each seed, as the model's codec gives them: of pictures, 8-bit images.
    - `seconds`: per stage ("text", "encode", "denoise", "decode"). Of a batch that several requests
      shared, each has the share of its images. An engine that decodes with the steps, in one, does
      so in "denoise".
    - `warnings`: sentences for a person.
    - `request`: has every default filled in, with the guidance and strength that were really used.
    - `origin`: the model and its LoRAs as they were named when the bundle was loaded.
    - `to_file`: encodes one of the images with metadata, as the model's codec does it.
    - `traits`: what other programs must be told beside contract and request.
    """

    images: list[Any]
    seeds: list[int]
    seconds: dict[str, float]
    warnings: list[str]
    contract: Contract
    request: Request
    origin: tuple[str, ...] = ()
    to_file: Callable[[Any, Mapping[str, str]], Encoded] = field(
        default=png_file, repr=False, compare=False
    )
    traits: ModelTraits = ModelTraits()

    @property
    def seconds_per_image(self) -> float:
        """Time of all stages divided by the number of images."""
        return sum(self.seconds.values()) / len(self.images)


def _is_text(value: object) -> bool:
    """Tell whether a value is text that can be written as UTF-8: no lone surrogates."""
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is None


def _loras_in(prompt: str) -> tuple[str, list[LoraChoice]]:
    """Return a prompt without A1111's `<lora:name:weight>`, and the LoRAs that it asks for.

    Raises RequestError for what such a tag may say elsewhere, and is not read here.
    """
    choices = []
    for tag in _TAG.finditer(prompt):
        match = _LORA_TAG.fullmatch(tag[0])
        if match is None:
            raise RequestError(
                f"the prompt has {tag[0]!r}; expected <lora:FILE> or <lora:FILE:WEIGHT>, with one "
                "weight for all networks."
            )
        choices.append(LoraChoice(match["name"].strip(), float(match["weight"] or 1)))
    if not choices:
        return prompt, []
    return re.sub(r"\s+", " ", _TAG.sub(" ", prompt)).strip(), choices


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _without_pixels(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in pairs if key not in ("pixels", "alpha", "notes")}
