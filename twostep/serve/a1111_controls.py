"""ControlNets as the clients of A1111's extension for them send and list them.

A unit names a ControlNet and holds its picture. What prepares pictures is not here but for
turning black and white round: clients send what the ControlNet reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from twostep.media.png import encode_png
from twostep.pipeline.request import Control, Picture, RequestError
from twostep.serve.document import A1111Refusal, refusals
from twostep.serve.following import in_base64
from twostep.serve.serving import Serving, bytes_in, validated
from twostep.serve.shapes import MAX_CONTROLS

CONTROL_PREFIX = "/controlnet/"
"""How the addresses of the extension begin."""

SCRIPT = "controlnet"
"""The extension among `alwayson_scripts`, whatever the case of its letters."""

MODULES = ("none", "invert")
"""What may be done to a picture before the ControlNet looks at it."""

_API_VERSION = 3
"""The version of the extension's API that this is."""

_RESIZE_MODES = ("just resize", "crop and resize", "resize and fill")
"""How a picture of another shape is fitted, by the extension's numbers for it."""

_CONTROL_MODES = ("balanced", "my prompt is more important", "controlnet is more important")

_RESIZE_TOLERANCE = 0.01
"""How far two shapes of pictures may differ, as a share, and still count as one."""


class ControlUnit(BaseModel):
    """What is read of a unit; other fields are let through unread, and any may be null."""

    model_config = ConfigDict(extra="ignore")

    enabled: bool | None = None
    model: str | None = None
    module: str | None = None
    image: str | dict[str, Any] | None = Field(
        default=None, validation_alias=AliasChoices("image", "input_image")
    )
    mask: str | None = Field(
        default=None, validation_alias=AliasChoices("mask", "mask_image", "effective_region_mask")
    )
    weight: float | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    resize_mode: int | str | None = None
    control_mode: int | str | None = None

    @property
    def is_on(self) -> bool:
        """Whether it has a ControlNet to do anything with."""
        name = (self.model or "none").strip().casefold()
        return self.enabled is not False and name not in ("", "none")

    def notes(self) -> list[str]:
        """Return sentences about what is asked for and not done."""
        notes = []
        module = (self.module or "none").casefold()
        if module not in MODULES:
            notes.append(
                f"the preprocessor {module[:80]} was left out: the ControlNet looks at the picture "
                "that was sent"
            )
        if _number(self.control_mode, _CONTROL_MODES) != 0:
            notes.append(f"control_mode {str(self.control_mode)[:80]}: Balanced was taken")
        if self.mask:
            notes.append("a ControlNet's mask was left out: it acts everywhere")
        return notes

    def control(self, size: tuple[int, int] | None, fallback: Picture | None) -> Control:
        """Open the picture, and return what is to act on a drawing.

        Args:
            size: width and height that are asked for, if they are.
            fallback: the picture that is changed, which stands in where the unit has none.
        """
        text = self.image.get("image") if isinstance(self.image, Mapping) else self.image
        if isinstance(text, str) and text:
            picture = Picture.of(bytes_in("the image of a ControlNet", text))
        elif fallback is not None:
            picture = fallback
        else:
            raise RequestError("a ControlNet has no image; send what it is to look at.")
        if (self.module or "").casefold() == "invert":
            picture = Picture.of(ImageOps.invert(picture.image))
        if size is not None:
            picture = _fitted(picture, size, _number(self.resize_mode, _RESIZE_MODES, usual=1))
        return Control(
            picture,
            # Lists give a hash behind names, which clients send back.
            (self.model or "").partition(" [")[0].strip(),
            scale=1.0 if self.weight is None else self.weight,
            start=self.guidance_start or 0.0,
            end=1.0 if self.guidance_end is None else self.guidance_end,
        )


def units_in(scripts: Mapping[str, Any] | None) -> list[ControlUnit]:
    """Return the units that are on among `alwayson_scripts`; raises RequestError for a wrong one.

    Clients send `{"args": [unit, ...]}`, or the units alone.
    """
    units = []
    for name, given in (scripts or {}).items():
        if str(name).casefold() != SCRIPT:
            continue
        found = given.get("args") if isinstance(given, Mapping) else given
        # Scripts of A1111 may get numbers and switches beside units, of which this one has none.
        units += [each for each in found or () if isinstance(each, Mapping)]
    bodies = [validated(ControlUnit, each) for each in units]
    return [body for body in bodies if body.is_on]


class DetectBody(BaseModel):
    """Pictures to prepare, in base64."""

    model_config = ConfigDict(extra="ignore")

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(
        default=[],
        max_length=16,
        validation_alias=AliasChoices("controlnet_input_images", "controlnet_images"),
    )


def control_routes(serving: Serving) -> APIRouter:
    """Return the addresses below /controlnet, with which clients find out what there is."""
    router = APIRouter(
        prefix=CONTROL_PREFIX.rstrip("/"),
        tags=["A1111"],
        responses=refusals(422, shape=A1111Refusal),
    )

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Say which version of the extension's API this is."""
        return {"version": _API_VERSION}

    @router.get("/model_list")
    async def list_controls() -> dict[str, list[str]]:
        """List the names that `model` of a unit may have."""
        return {"model_list": serving.catalogue.controlnets}

    @router.get("/module_list")
    async def list_modules() -> dict[str, Any]:
        """List what can be done to pictures before."""
        details = {name: {"model_free": False, "sliders": []} for name in MODULES}
        return {"module_list": list(MODULES), "module_detail": details}

    @router.get("/control_types")
    async def list_types() -> dict[str, Any]:
        """List everything as the one type that there is."""
        everything = {
            "module_list": list(MODULES),
            "model_list": ["None", *serving.catalogue.controlnets],
            "default_option": MODULES[0],
            "default_model": next(iter(serving.catalogue.controlnets), "None"),
        }
        return {"control_types": {"All": everything}}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        """Say how many ControlNets may act at once."""
        return {"control_net_unit_count": MAX_CONTROLS}

    @router.post("/detect")
    async def detect(body: DetectBody) -> dict[str, Any]:
        """Prepare pictures as a unit with that module does."""
        module = body.controlnet_module.casefold()
        if module not in MODULES:
            raise RequestError(
                f"there is no preprocessor {body.controlnet_module[:80]!r}; there are "
                f"{', '.join(MODULES)}."
            )
        images = await run_in_threadpool(_prepared, body.controlnet_input_images, module)
        return {"images": images, "info": "Success"}

    return router


def _prepared(texts: Sequence[str], module: str) -> list[str]:
    """Return pictures in base64 as a module makes them."""
    images = []
    for text in texts:
        image = Picture.of(bytes_in("controlnet_input_images", text)).image
        prepared = ImageOps.invert(image) if module == "invert" else image
        images.append(in_base64(encode_png(prepared, {})))
    return images


def _number(value: int | str | None, names: Sequence[str], *, usual: int = 0) -> int | None:
    """Return the number of a mode that is given by it or by name; None for an unknown one."""
    if value is None:
        return usual
    if isinstance(value, int):
        return value if value in range(len(names)) else None
    # Version 1 of the extension wrote "Scale to Fit (Inner Fit)" and such.
    return names.index(value.casefold()) if value.casefold() in names else None


def _fitted(picture: Picture, size: tuple[int, int], mode: int | None) -> Picture:
    """Return a picture in the shape of a size: stretched, or with room around it.

    What is to be cropped stays: that happens when it is drawn from.
    """
    image = picture.image
    width, height = size
    if abs(math.log(image.width * height / (image.height * width))) < _RESIZE_TOLERANCE:
        return picture
    if mode == _RESIZE_MODES.index("just resize"):
        wide = max(8, round(image.height * width / height))
        return Picture.of(image.resize((wide, image.height), Image.Resampling.LANCZOS))
    if mode == _RESIZE_MODES.index("resize and fill"):
        larger = max(image.width / width, image.height / height)
        room = (max(8, round(width * larger)), max(8, round(height * larger)))
        return Picture.of(ImageOps.pad(image, room, color=_colour_of_edge(image)))
    return picture


def _colour_of_edge(image: Image.Image) -> tuple[int, ...]:
    """Return the median colour along the edge of a picture, as the extension fills with."""
    pixels = np.asarray(image)
    sides = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return tuple(int(level) for level in np.median(np.concatenate(sides), axis=0))
