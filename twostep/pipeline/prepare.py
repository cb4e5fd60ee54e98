"""The pictures that go into a drawing, made ready: an image to change, a mask of where, and what
ControlNets look at.

An image is cut to the size that is drawn and encoded once; a drawing begins at its noised latents.
Outside of the mask it is put back after every step, noised to where that landed, and at the end
pixel by pixel. Networks that were made for inpainting are shown the mask and what is not masked
instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from twostep.data.sources import cut
from twostep.diffusion import Prediction, initial_noise, solve
from twostep.diffusion.shapes import Latents
from twostep.models.bundle import Bundle
from twostep.networks.conditioning import Conditioning
from twostep.networks.control import Hint, load_control
from twostep.networks.denoiser import Denoiser
from twostep.pipeline.request import Picture, Request, RequestError

Pixels = Float[Tensor, "batch 3 height width"]
Mask = Bool[Tensor, "1 1 height width"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What of a request's pictures a drawing needs, for one item; the mask is true where it is
    drawn.
    """

    request: Request
    times: tuple[int | float, ...]
    image: Pixels | None
    x0: Float[Tensor, "1 c h w"]
    mask: Mask | None
    known: Float[Tensor, "1 known h w"] | None
    hints: tuple[Hint, ...]

    @classmethod
    def of(cls, bundle: Bundle, request: Request, times: tuple[int | float, ...]) -> Inputs:
        """Cut the pictures of a settled request to its size and encode them, for a drawing that
        walks these times.

        Raises RequestError for a mask that leaves nothing to draw, ModelError for a ControlNet that
        does not fit.
        """
        size, unet = (int(request.width or 0), int(request.height or 0)), bundle.denoiser.network

        def pixels(picture: Picture) -> Pixels:
            return cut(picture.image, [size])[0][None].to(bundle.denoiser.device)

        image = None if request.image is None else pixels(request.image)
        mask = None if request.mask is None else pixels(request.mask).mean(dim=1, keepdim=True) >= 0
        if mask is not None and not bool(mask.any()):
            raise RequestError(
                "the mask is black everywhere; paint what is to be drawn anew white."
            )
        x0 = torch.zeros(1, *bundle.latent_shape(*size), device=bundle.denoiser.device)
        x0 = x0 if image is None else bundle.codec.encode(image)
        hints, count = [], len(times) - 1
        for control in request.controls:
            # A step counts if it lies wholly in the control's share of them.
            acting = [
                i
                for i in range(count)
                if control.start <= i / count and (i + 1) / count <= control.end
            ]
            network, shown = (
                load_control(control.model, unet, bundle.codec.pixels_per_latent),
                pixels(control.picture),
            )
            hints.append(
                Hint(network, (shown + 1) / 2, control.scale, frozenset(times[i] for i in acting))
            )
        known = _known(bundle, size, image, mask) if bundle.is_inpainting else None
        return cls(request, times, image, x0, mask, known, tuple(hints))

    def draw(
        self,
        denoiser: Denoiser,
        told: Conditioning,
        seeds: list[int],
        on_step: Callable[[int, Prediction], None],
    ) -> Latents:
        """Follow the flow from the noise of these seeds, or the noised image, to clean latents.

        `told` is the prompt, and with guidance after it what is to be avoided.
        """
        schedule, start = denoiser.schedule, self.times[0]
        shown = replace(told[:1], known=self.known, hints=self.hints).expand(len(seeds))
        avoided = replace(told[-1:], known=self.known, hints=self.hints).expand(len(seeds))
        noise = torch.stack([initial_noise(seed, self.x0.shape[1:]) for seed in seeds]).to(
            self.x0.device
        )
        x0, t = self.x0.expand_as(noise), torch.tensor(self.times)[:, None].expand(-1, len(seeds))
        x, keep = schedule.add_noise(x0, noise, t[0]), None
        if self.request.init_noise == "diffusers":
            alpha, sigma = schedule.coefficients(t[0], noise)
            x = sigma * noise + (
                0 if self.mask is not None and start == schedule.num_times else alpha * x0
            )
        # inpainting networks see themselves what they have to keep
        if self.mask is not None and self.known is None:
            drawn = _coarse(self.mask, noise)
            keep = lambda x_s, s: torch.where(drawn, x_s, schedule.add_noise(x0, noise, s))  # noqa: E731
        return solve(
            denoiser.with_guidance(shown, avoided, self.request.guidance or 1),
            x,
            t,
            schedule,
            on_step,
            keep,
        )

    def finished(self, pictures: Pixels) -> Pixels:
        """Put the image's own pixels back outside of the mask."""
        return (
            pictures
            if self.mask is None or self.image is None
            else torch.where(self.mask, pictures, self.image)
        )


def _known(
    bundle: Bundle, size: tuple[int, int], image: Pixels | None, mask: Mask | None
) -> Float[Tensor, "1 known h w"]:
    """Return what an inpainting UNet takes: the mask, and the latents of the image, grey where it
    is to be drawn.
    """
    if image is None or mask is None:
        image = torch.zeros(1, 3, *size[::-1], device=bundle.denoiser.device)
        mask = torch.ones_like(image[:, :1], dtype=torch.bool)
    latents = bundle.codec.encode(image.masked_fill(mask, 0))
    return torch.cat([_coarse(mask, latents).to(latents.dtype), latents], dim=1)


def _coarse(mask: Mask, like: Latents) -> Bool[Tensor, "1 1 h w"]:
    return interpolate(mask.float(), like.shape[2:]) > 0
