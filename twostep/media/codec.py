"""Codecs: media <-> latents. A codec is all that the rest of the package knows of a medium.

Pictures are in `media.image`. A codec for another medium is one file that offers the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from twostep.errors import TwostepError

if TYPE_CHECKING:
    # Files are written without torch.
    from torch import Tensor, nn

FULL = "full"
TINY = "tiny"
"""What a request may call a decoder beside files: the autoencoder's own, and the tiny one that
comes with a model.
"""


class CodecError(TwostepError):
    """Something that a codec cannot make."""


@dataclass(frozen=True)
class Encoded:
    """An item as a file: its bytes, the ending of its name, and its MIME type."""

    data: bytes = field(repr=False)
    suffix: str
    mime: str


@dataclass(frozen=True, eq=False)
class TinyDecoder:
    """A small network beside an autoencoder, which decodes the same latents in less time.

    Args:
        network: Maps z times the autoencoder's scaling factor, over `scaling_factor`, to pictures
            of about -1..1. So TAESD has it (https://github.com/madebyollin/taesd).
        scaling_factor: By which its own latents are scaled; 1 in all that are known.
        metadata: Of its file, which says what it was made for.
    """

    network: nn.Module
    scaling_factor: float = 1.0
    metadata: Mapping[str, str] = field(default_factory=dict)

    def converted(self, convert: Callable[[nn.Module], nn.Module]) -> TinyDecoder:
        """Return the same with the network that an engine makes of its own."""
        return replace(self, network=convert(self.network))


@runtime_checkable
class HasTinyDecoder(Protocol):
    """A codec that may have a tiny decoder beside its own networks."""

    @property
    def tiny(self) -> TinyDecoder | None:
        """The tiny decoder, if there is one."""


@runtime_checkable
class HasLength(Protocol):
    """A codec of media whose items may be longer or shorter: clips, of so many frames."""

    @property
    def length(self) -> int:
        """How long items are, in frames."""

    def with_length(self, length: int) -> Codec:
        """Return the same for items of another length; CodecError where that cannot be."""


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
