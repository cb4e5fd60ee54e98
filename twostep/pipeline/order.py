"""What a command line asks for, as plain values, before any file in it was opened.

So a drawing can be handed to another process of the same user, whole, without loading what draws.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError

from twostep.errors import TwostepError
from twostep.media.codec import FULL, TINY
from twostep.pipeline.settings import DrawingSettings

if TYPE_CHECKING:
    from twostep.pipeline.request import Control, Picture, Request

_CONTROL = re.compile(
    r"(?P<picture>.+)@(?P<model>[^@]+?)"
    r"(:(?P<scale>\d*\.?\d+)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?)?"
)
_WEIGHT = re.compile(r":-?(\d+\.?\d*|\.\d+)$")
_SUFFIX = ".safetensors"


class OrderError(TwostepError):
    """An order that cannot be read."""


@dataclass(frozen=True)
class Order(DrawingSettings):
    """A drawing as `twostep generate` and `twostep edit` are told it.

    The other fields are those of `Request`, but for files, which are spelled as they were given:
    `image` and `mask` are paths, a control is "PICTURE@CONTROLNET:SCALE:FROM-TO", of which all
    after the ControlNet may be missing, and `loras` may be LoRAs and textual inversions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    model: str
    image: str | None = field(default=None, kw_only=True)
    mask: str | None = field(default=None, kw_only=True)
    controls: tuple[str, ...] = field(default=(), kw_only=True)
    loras: tuple[str, ...] = field(default=(), kw_only=True)
    treated_as: str | None = field(default=None, kw_only=True)
    engine: str = field(default="eager", kw_only=True)

    def request(self, open_picture: Callable[[str], Picture] | None = None) -> Request:
        """Return the request, with its pictures opened.

        Args:
            open_picture: returns the picture of a path; by default the file is read.

        Raises RequestError for what no model could draw.
        """
        from twostep.pipeline.request import Picture, Request

        read = open_picture or Picture.of
        loras, embeddings = _sorted_loras(self.loras)
        return Request(
            **self.settings,
            image=None if self.image is None else read(self.image),
            mask=None if self.mask is None else read(self.mask),
            controls=tuple(_control(text, read) for text in self.controls),
            model=self.model,
            loras=loras,
            embeddings=embeddings,
            treated_as=self.treated_as,
            engine=self.engine,
        )

    @property
    def pictures(self) -> list[str]:
        """The paths of the pictures that go in."""
        named = [path for path in (self.image, self.mask) if path is not None]
        matches = [_CONTROL.fullmatch(text) for text in self.controls]
        return [*named, *(match["picture"] for match in matches if match)]

    @property
    def depends_on_folder(self) -> bool:
        """Whether a name in it, but for the model's and the pictures', means a file of this folder.

        LoRAs in a prompt are taken for such names.
        """
        matches = [_CONTROL.fullmatch(text) for text in self.controls]
        names = [*self.loras, *(match["model"] for match in matches if match)]
        if self.decoder not in (FULL, TINY):
            names.append(self.decoder)
        return "<" in self.prompt or any(map(_is_here, names))

    def to_json(self) -> str:
        """Write the order as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Order:
        """Read what `to_json` wrote; raises OrderError for anything else."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            raise OrderError(f"this is no order, for {place}: {first['msg']}.") from error


def _is_here(name: str) -> bool:
    """Tell whether a relative name means a file or folder where the process is at work."""
    path = Path(_WEIGHT.sub("", name))
    if path.is_absolute():
        return False
    return any(each.exists() for each in (Path(name), path, Path(f"{path}{_SUFFIX}")))


def _sorted_loras(given: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return LoRAs, and the textual inversions among them."""
    if not given:
        return (), ()
    from twostep.formats.embeddings import is_embedding

    embeddings = tuple(each for each in given if is_embedding(each))
    return tuple(each for each in given if each not in embeddings), embeddings


def _control(text: str, read: Callable[[str], Picture]) -> Control:
    from twostep.pipeline.request import Control, RequestError

    match = _CONTROL.fullmatch(text)
    if match is None:
        raise RequestError(
            f"control is {text!r}; expected PICTURE@CONTROLNET:SCALE, as shape.png@silhouette:0.8."
        )
    return Control(
        read(match["picture"]),
        match["model"],
        scale=float(match["scale"] or 1),
        start=float(match["start"] or 0),
        end=float(match["end"] or 1),
    )
