"""What engines have in common that put networks of their own in place of a model's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from twostep.diffusion.shapes import Latents
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.lora_stack import fused
from twostep.networks.lean.autoencoders import Decoded


class ConvertingEngine(ABC):
    """An engine that converts each network once, and prepares each bundle once."""

    def __init__(self) -> None:
        self._lock = Lock()
        # Networks go when their bundle goes; a stack of LoRAs has its own.
        self._converted: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._prepared: WeakKeyDictionary[Bundle, Bundle] = WeakKeyDictionary()

    def convert(self, network: nn.Module) -> nn.Module:
        """Return a network on the same weights that is run by the engine; the same if asked again.

        LoRAs beside its layers are merged into it first.
        """
        with self._lock:
            converted = self._converted.get(network)
            if converted is None:
                converted = self._convert(fused(network))
                self._converted[network] = converted
            return converted

    def _prepared_once(self, bundle: Bundle) -> Bundle:
        """Return a bundle on converted networks; the same if asked again."""
        prepared = self._prepared.get(bundle)
        if prepared is None:
            prepared = self._prepared.setdefault(bundle, self._prepare(bundle))
        return prepared

    @abstractmethod
    def _convert(self, network: nn.Module) -> nn.Module:
        """Return a network on the same weights that is run by the engine."""

    @abstractmethod
    def _prepare(self, bundle: Bundle) -> Bundle:
        """Return a bundle on converted networks."""


def converted_codec(
    codec: Any, convert: Callable[[nn.Module], nn.Module], parts: Collection[str]
) -> Any:
    """Return a codec of pictures whose networks are converted; any other as it is.

    Args:
        codec: Of a bundle.
        convert: Returns what is to be in a network's place.
        parts: Those of the autoencoder that are converted, "encoder" and "decoder"; a tiny decoder
            always is.
    """
    if not isinstance(codec, ImageCodec):
        return codec
    vae: Any = copy.copy(codec.vae)
    # The copy shares the table of its parts until it has one of its own.
    vae._modules = {**vae._modules, **{name: convert(vae._modules[name]) for name in parts}}
    tiny = None if codec.tiny is None else codec.tiny.converted(convert)
    return replace(codec, vae=vae, tiny=tiny)


class _Decoding(nn.Module):
    """An autoencoder's way from latents to pictures, as one network.

    Args:
        vae: The autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    @property
    def config(self) -> Any:
        """How the autoencoder is built."""
        return self.vae.config

    def forward(self, z: Latents) -> Tensor:
        """Return the pictures of the autoencoder's own latents."""
        pictures: Tensor = self.vae.decode(z).sample
        return pictures


def decoding_at_once(codec: Any, convert: Callable[[nn.Module], nn.Module]) -> Any:
    """Return a codec of pictures whose whole decoding is converted; any other as it is.

    Autoencoders have a small layer before their decoder, which would be left to PyTorch where the
    decoder alone is converted.

    Args:
        codec: Of a bundle.
        convert: Returns what is to be in a network's place.
    """
    if not isinstance(codec, ImageCodec):
        return codec
    decode = convert(_Decoding(codec.vae))
    vae: Any = copy.copy(codec.vae)
    object.__setattr__(vae, "decode", lambda z: Decoded(decode(z)))
    return replace(codec, vae=vae)
