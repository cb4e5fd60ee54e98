"""Codecs: media <-> latents. A codec is all that the rest of the package knows of a medium.

Pictures are in `media.image`. A codec for another medium is one file that offers the same methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    # Files are written without torch.
    from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """An item as a file: its bytes, the ending of its name, and its MIME type."""

    data: bytes = field(repr=False)
    suffix: str
    mime: str


@runtime_checkable
class DecodesWithGradient(Protocol):
    """A codec through which a loss on media reaches the latents."""

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return the media of latents as `decode` does, with gradient and not cut off."""


@runtime_checkable
class Codec(Protocol):
    """What turns media into latents and back, and items of media into files."""

    @property
    def media(self) -> str:
        """The medium, as contracts name it: "image" for example."""

    def latent_shape(self, width: int, height: int) -> Sequence[int]:
        """Return the shape of one item's latents, (channels, ...), for a size in pixels."""

    def encode(self, media: Tensor) -> Tensor:
        """Return latents [batch, channels, ...] of about unit variance."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the media [batch, ...] of latents; pictures are in -1..1."""

    def preview(self, latents: Tensor) -> Tensor:
        """Return roughly what latents show, in pictures [batch, 3, height, width] in -1..1."""

    def items(self, media: Tensor) -> list[Any]:
        """Return decoded media as what a user gets; of pictures, 8-bit images."""

    def file(self, item: Any, metadata: Mapping[str, str]) -> Encoded:
        """Return an item as a file that carries the metadata."""
