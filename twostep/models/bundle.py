"""A model that is ready to sample: denoiser, codec, text encoders, and its sampling contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from twostep.contract import Contract
from twostep.formats.locate import ModelError
from twostep.media.image import ImageCodec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.text.clip import TextEncoders


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that sampling needs.

    `students` are the step counts of the students that lie in the same folder. `origin` is the
    model, followed by its LoRAs, as they were named when it was loaded.
    """

    denoiser: Denoiser
    codec: ImageCodec
    text: TextEncoders
    contract: Contract
    students: tuple[int, ...] = ()
    origin: tuple[str, ...] = ()

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels.

        With `whole`, weights in the prompts count, and what is longer than the encoders' limit is
        not cut off.
        """
        return self.text.conditioning(prompts, width, height, whole=whole)

    @property
    def is_inpainting(self) -> bool:
        """Whether the network also takes a mask, and the latents of what is not masked."""
        config = self.denoiser.network.config
        return bool(config.in_channels != config.out_channels)

    def as_teacher(self) -> Bundle:
        """Return the bundle if something can be distilled from it; raises ModelError if not."""
        if self.is_inpainting:
            raise ModelError(
                f"{self.contract.name} has an inpainting UNet, which is no teacher here: distil "
                "its base."
            )
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by the names that diffusers gives them."""
        return {"unet": self.denoiser.network, **self.text.networks}

    def with_parts(self, parts: Mapping[str, nn.Module]) -> Bundle:
        """Return the bundle with other networks in the place of its own, all of `parts`."""
        return replace(
            self,
            denoiser=replace(self.denoiser, network=parts["unet"]),
            text=self.text.with_networks(parts),
        )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Bundle:
        """Move every network to a device, in place, and to a precision if one is given.

        Returns the bundle.
        """
        for network in (*self.parts.values(), self.codec.vae):
            nn.Module.to(network, device, dtype)  # diffusers' own method would warn of nothing
        return self

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a picture of this size in pixels."""
        pixels = self.codec.pixels_per_latent
        channels = int(self.denoiser.network.config.out_channels)
        return channels, height // pixels, width // pixels
