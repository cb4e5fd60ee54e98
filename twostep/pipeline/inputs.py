"""The pictures that go into a drawing, made ready: an image to change, a mask of where, and what ControlNets look at.

An image is cut to the size that is drawn and encoded once; a drawing begins at its noised latents. Outside of the mask
it is put back after every step, noised to where that landed, and at the end pixel by pixel. Networks that were made for
inpainting are shown the mask and what is not masked as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from twostep.data.pictures import cut
from twostep.diffusion import NoiseSchedule
from twostep.diffusion.flow import Keep
from twostep.diffusion.shapes import Latents
from twostep.models.bundle import Bundle
from twostep.models.conditioning import Conditioning
from twostep.models.control import Hint, load_control
from twostep.pipeline.request import Control, InitNoise, Picture, Request, RequestError

Pixels = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What of a request's pictures a drawing needs, for one item; the mask is true where it is drawn."""

    image: Pixels | None
    latents: Float[Tensor, "1 c h w"] | None
    mask: Bool[Tensor, "1 1 height width"] | None
    known: Float[Tensor, "1 known h w"] | None
    hints: tuple[Hint, ...]

    @classmethod
    def of(cls, bundle: Bundle, request: Request, size: tuple[int, int], times: tuple[int, ...]) -> Inputs:
        """Cut the pictures of a request to (width, height) and encode them, for a drawing that walks these times.

        Raises RequestError for a mask that leaves nothing to draw, ModelError for a ControlNet that does not fit.
        """
        image = mask = latents = known = None
        if request.image is not None:
            image = _pixels(request.image, size, bundle)
            latents = bundle.codec.encode(image)
        if request.mask is not None:
            mask = _pixels(request.mask, size, bundle).mean(dim=1, keepdim=True) >= 0
            if not bool(mask.any()):
                raise RequestError("the mask is black everywhere; paint what is to be drawn anew white.")
        if bundle.is_inpainting:
            known = _known(bundle, size, image, mask)
        hints = tuple(_hint(bundle, control, size, times) for control in request.controls)
        return cls(image, latents, mask, known, hints)

    def told(self, conditioning: Conditioning) -> Conditioning:
        """Add what the networks are shown to the conditioning of one item."""
        return replace(conditioning, known=self.known, hints=self.hints)

    def begin(self, noise: Latents, start: int, schedule: NoiseSchedule, init_noise: InitNoise) -> Latents:
        """Return the latents at the time `start`, where the drawing begins; at the top nothing of the image is left."""
        t = torch.full((len(noise),), start)
        unseen = self.latents is None or (self.mask is not None and start == schedule.num_times)
        x0 = torch.zeros_like(noise) if unseen else self.latents.expand_as(noise)  # type: ignore[union-attr]
        if init_noise == "comfyui":
            return schedule.add_noise(x0, noise, t)
        alpha, sigma = schedule.coefficients(t, noise)
        return alpha * x0 + sigma * noise

    def keep(self, noise: Latents, schedule: NoiseSchedule) -> Keep | None:
        """Return what puts the image back outside of the mask after a step; inpainting networks need none."""
        if self.mask is None or self.latents is None or self.known is not None:
            return None
        x0, drawn = self.latents.expand_as(noise), _coarse(self.mask, noise)
        return lambda x_s, s: torch.where(drawn, x_s, schedule.add_noise(x0, noise, s))

    def finished(self, pictures: Pixels) -> Pixels:
        """Put the image's own pixels back outside of the mask."""
        return pictures if self.mask is None or self.image is None else torch.where(self.mask, pictures, self.image)


def _pixels(picture: Picture, size: tuple[int, int], bundle: Bundle) -> Pixels:
    """Return a picture in -1..1, cut to the size that is drawn, where the networks are."""
    pixels, _ = cut(picture.image, [size])
    return pixels[None].to(bundle.denoiser.network.device)


def _known(
    bundle: Bundle, size: tuple[int, int], image: Pixels | None, mask: Bool[Tensor, "1 1 height width"] | None
) -> Float[Tensor, "1 known h w"]:
    """Return what an inpainting UNet takes: the mask, and the latents of the image, grey where it is to be drawn."""
    if image is None or mask is None:
        image = torch.zeros(1, 3, *size[::-1], device=bundle.denoiser.network.device)
        mask = torch.ones_like(image[:, :1], dtype=torch.bool)
    latents = bundle.codec.encode(torch.where(mask, torch.zeros_like(image), image))
    return torch.cat([_coarse(mask, latents).to(latents.dtype), latents], dim=1)


def _hint(bundle: Bundle, control: Control, size: tuple[int, int], times: tuple[int, ...]) -> Hint:
    """Load a ControlNet, and find the times of its share of the steps: a step counts that lies in it wholly."""
    network = load_control(control.model, bundle.denoiser.network, bundle.codec.pixels_per_latent)
    count = len(times) - 1
    acting = {t for i, t in enumerate(times[:-1]) if control.start <= i / count and (i + 1) / count <= control.end}
    picture = (_pixels(control.picture, size, bundle) + 1) / 2
    return Hint(network, picture, control.scale, frozenset(acting))


def _coarse(mask: Bool[Tensor, "1 1 height width"], like: Latents) -> Bool[Tensor, "1 1 h w"]:
    return interpolate(mask.float(), like.shape[2:]) > 0
