"""What A1111's clients send to draw, and what is meant by it.

The bodies have some sixty fields, of which clients send most with values that switch nothing on.
`notes` names what is switched on and not done here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from twostep.media.codec import FULL, TINY
from twostep.pipeline.request import SAMPLERS, Picture
from twostep.serve.a1111_controls import SCRIPT, units_in
from twostep.serve.catalogue import Wish, random_seed
from twostep.serve.serving import picture_in
from twostep.serve.shapes import MAX_FRAMES

CHECKPOINT = "sd_model_checkpoint"
"""The option that names the model."""

DECODER = "sd_vae_decode_method"
"""The option that names the decoder: "TAESD" is the tiny one, anything else the full one."""

SCHEDULERS = {"automatic": "Automatic", "simple": "Simple"}
"""The schedules of times that may be asked for, both of which are the contract's own."""

_UNDONE = {
    "enable_hr": "a second, larger pass",
    "restore_faces": "restoring faces",
    "tiling": "tiling",
    "styles": "styles",
    "script_name": "scripts",
    "subseed_strength": "variation seeds",
    "save_images": "saving on the server",
}
"""Fields that switch something on which is not done here, and what that is."""

_SAMPLER_NAMES = {
    spelling.casefold(): name
    for name, title in SAMPLERS.items()
    for spelling in (name, title, f"k_{name.replace('-', '_')}")
}
_CLIP_SCRIPT = "animatediff"
"""What the extension for clips is called in `alwayson_scripts`, in lower case."""

_RESIZE_TOLERANCE = 0.01
"""How far two shapes of pictures may differ, as a share, and still count as one."""


class TextBody(BaseModel):
    """What is read of /txt2img; other fields are let through unread, and any may be null."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = Field(default=None, ge=-1, lt=2**62)
    steps: int | None = Field(default=None, ge=1)
    cfg_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    width: int | None = Field(default=None, ge=1, le=2**16)
    height: int | None = Field(default=None, ge=1, le=2**16)
    batch_size: int | None = Field(default=None, ge=1)
    n_iter: int | None = Field(default=None, ge=1)
    sampler_name: str | None = None
    sampler_index: str | int | None = None
    scheduler: str | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = None
    alwayson_scripts: dict[str, Any] | None = None
    enable_hr: bool | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    styles: list[Any] | None = None
    script_name: str | None = None
    subseed_strength: float | None = None
    frames: int | None = Field(default=None, ge=1, le=MAX_FRAMES)
    save_images: bool | None = None

    def notes(self) -> list[str]:
        """Return sentences about what is asked for and not done."""
        undone = [name for name in _UNDONE if getattr(self, name)]
        notes = [f"{name}: there is no {_UNDONE[name]} here" for name in undone]
        scripts = [
            name
            for name, given in (self.alwayson_scripts or {}).items()
            if name.casefold() not in (SCRIPT, _CLIP_SCRIPT) and _is_on(given)
        ]
        if scripts:
            notes.append(f"alwayson_scripts: there is no {', '.join(map(str, scripts))[:80]} here")
        for unit in units_in(self.alwayson_scripts):
            notes += unit.notes()
        ignored = [
            name for name in self.override_settings or {} if name not in (CHECKPOINT, DECODER)
        ]
        if ignored:
            notes.append(f"override_settings: {', '.join(ignored)[:80]} is not read here")
        if self.scheduler and self.scheduler.casefold() not in SCHEDULERS:
            notes.append(f"the scheduler {self.scheduler[:80]} was left out: models have their own")
        if self._wished_sampler and self.sampler is None:
            notes.append(
                f"there is no sampler {self._wished_sampler[:80]!r}: the model's was taken"
            )
        return notes

    @property
    def sampler(self) -> str | None:
        """The sampler, as requests name it; None for the model's own and for unknown ones."""
        return _SAMPLER_NAMES.get(self._wished_sampler.casefold())

    @property
    def _wished_sampler(self) -> str:
        index = self.sampler_index
        return self.sampler_name or (index if isinstance(index, str) else "")

    def wish(self, model: str) -> Wish:
        """Return what is to be drawn, with the model that is chosen where the body names none.

        Raises RequestError for ControlNets whose pictures or shares are none.
        """
        return self._wish(model, None)

    def _wish(self, model: str, image: Picture | None) -> Wish:
        """Return what is to be drawn, of a picture or of none."""
        options = self.override_settings or {}
        named = options.get(CHECKPOINT)
        wants_tiny = str(options.get(DECODER)).upper() == "TAESD"
        seed = self.seed
        if seed is None or seed < 0:
            seed = random_seed()
        has_size = self.width is not None and self.height is not None
        size = (self.width, self.height) if self.width and self.height else None
        units = units_in(self.alwayson_scripts)
        return Wish(
            self.prompt or "",
            model=str(named) if named else model,
            num_images=(self.batch_size or 1) * (self.n_iter or 1),
            seed=seed,
            steps=self.steps,
            guidance=self.cfg_scale,
            negative_prompt=self.negative_prompt or "",
            width=self.width if has_size else None,
            height=self.height if has_size else None,
            image=image,
            controls=tuple(unit.control(size, image) for unit in units),
            sampler=self.sampler,
            decoder=TINY if wants_tiny else FULL,
            frames=self.frames or _frames_in(self.alwayson_scripts),
        )


class ImageBody(TextBody):
    """What is read of /img2img: above all the picture, and the mask that is white or opaque where
    it is changed.
    """

    init_images: list[str] = Field(min_length=1, max_length=16)
    mask: str | None = None
    inpainting_mask_invert: int | None = None
    mask_blur: float | None = None
    inpaint_full_res: bool | None = None
    inpainting_fill: int | None = None
    resize_mode: int | None = None
    include_init_images: bool | None = None

    def notes(self) -> list[str]:
        """Return sentences about what is asked for and not done."""
        notes = super().notes()
        if len(self.init_images) > 1:
            notes.append(f"{len(self.init_images)} init_images: the first alone was taken")
        is_plain = not (self.mask_blur or self.inpaint_full_res)
        if self.mask and not (is_plain and self.inpainting_fill in (None, 1)):
            notes.append("the mask's edge is hard, and all of the picture is drawn at its own size")
        return notes

    def wish(self, model: str) -> Wish:
        """Open the pictures, and return what is to be drawn."""
        image = picture_in("init_images", self.init_images[0])
        assert image is not None
        if (self.resize_mode or 0) == 0 and self.width and self.height:
            image = _stretched(image, self.width, self.height)
        mask = picture_in("mask", self.mask or None)
        if mask is not None:
            mask = _fitted_mask(mask, image, is_inverted=bool(self.inpainting_mask_invert))
        strength = 0.75 if self.denoising_strength is None else self.denoising_strength
        return replace(self._wish(model, image), mask=mask, strength=strength)


def samplers(own: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the samplers that a teacher takes, and those that models have as their own."""
    names = [name for name in SAMPLERS if name != "renoise" or name in own]
    return [{"name": SAMPLERS[name], "aliases": [name], "options": {}} for name in names]


def _frames_in(scripts: Mapping[str, Any] | None) -> int | None:
    """Return how long a clip is to be for the extension sd-webui-animatediff, None if it is off.

    Its first argument has `enable` and `video_length`, of which 0 is the model's own.
    """
    for name, script in (scripts or {}).items():
        arguments = script.get("args") if isinstance(script, Mapping) else None
        first = arguments[0] if isinstance(arguments, list) and arguments else None
        if name.casefold() == _CLIP_SCRIPT and isinstance(first, Mapping) and first.get("enable"):
            length = first.get("video_length")
            return length if isinstance(length, int) and length > 0 else None
    return None


def _is_on(script: object) -> bool:
    """Whether a script that is always on was given anything to do."""
    arguments = script.get("args") if isinstance(script, Mapping) else script
    if isinstance(arguments, list):
        return any(bool(argument) for argument in arguments)
    return bool(arguments)


def _stretched(picture: Picture, width: int, height: int) -> Picture:
    """Return a picture in the shape of a size, as A1111 resizes unless it is told to crop."""
    image = picture.image
    if abs(math.log(image.width * height / (image.height * width))) < _RESIZE_TOLERANCE:
        return picture
    wide = max(8, round(image.height * width / height))
    return Picture.of(image.resize((wide, image.height), Image.Resampling.LANCZOS))


def _fitted_mask(mask: Picture, image: Picture, *, is_inverted: bool) -> Picture:
    """Return a mask that is white where the picture is changed, in the picture's size.

    One with transparency is read by that, as A1111 does: what was painted is changed.
    """
    level = mask.alpha or mask.image.convert("L")
    level = level.point(lambda value: 255 if (value >= 128) != is_inverted else 0)
    return Picture.of(level.resize(image.image.size, Image.Resampling.NEAREST))
