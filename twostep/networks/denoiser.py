"""A network with its schedule and prediction type: (x_t, t, conditioning) -> Prediction.

Times are those of `diffusion` (1..T); the network is fed t - 1. Feeding T - 1 together with pure
noise is the fixed schedule of arXiv 2402.13929, section 3.5. Training loops, adapters and samplers
are unknown here.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from twostep.diffusion import (
    Denoise,
    Prediction,
    PredictionType,
    VariancePreserving,
    guide,
    prediction_from_output,
)
from twostep.diffusion.shapes import Latents, Times
from twostep.networks.adapters import at_work, merge
from twostep.networks.conditioning import Conditioning
from twostep.networks.control import residuals


@dataclass(frozen=True, eq=False)
class Denoiser:
    """An SDXL-type UNet that answers in x0 and eps, whatever it predicts.

    Several denoisers may share one network, each with another LoRA of it at work, or, as `lora`
    None, with none.
    """

    network: UNet2DConditionModel
    schedule: VariancePreserving
    prediction_type: PredictionType = "eps"
    lora: str | None = None

    def __call__(self, x_t: Latents, t: Times, conditioning: Conditioning) -> Prediction:
        """Predict x0 and eps of x_t at times t in 1..T; computed in float32 after the network."""
        index, added = t.to(x_t.device) - 1, _added(conditioning)
        x, text = _fed(self.network, x_t, conditioning.text)
        with at_work(self.network, self.lora):
            acting = [hint for hint in conditioning.hints if int(t[0]) in hint.times]
            more = residuals(acting, x, index, text, added) if acting else {}
            if conditioning.known is not None:
                x = torch.cat([x, conditioning.known.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1)
            output = self.network(
                x, index, text, added_cond_kwargs=added, return_dict=False, **more
            )[0]
        alpha, sigma = self.schedule.coefficients(t, x_t)
        return prediction_from_output(output.to(x_t.dtype), x_t, alpha, sigma, self.prediction_type)

    @property
    def device(self) -> torch.device:
        """Where the network is; diffusers' own `device` walks through all modules every time."""
        found: torch.device = self.network.conv_in.weight.device
        return found

    def standalone(self) -> UNet2DConditionModel:
        """Return a copy of the network that computes the same by itself: with its LoRA merged in,
        and none on it.
        """
        return merge(self.network, self.lora)

    def with_conditioning(self, conditioning: Conditioning) -> Denoise:
        """Close over the conditioning, as `solve` wants it."""
        return lambda x_t, t: self(x_t, t, conditioning)

    def with_guidance(
        self, conditioning: Conditioning, unconditional: Conditioning, scale: float
    ) -> Denoise:
        """Close over both conditionings with classifier-free guidance (arXiv 2207.12598), both in
        one call.
        """
        if scale == 1:
            return self.with_conditioning(conditioning)
        both = Conditioning.cat([unconditional, conditioning])

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            answer = self(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            (x0_without, x0_with), (eps_without, eps_with) = answer.x0.chunk(2), answer.eps.chunk(2)
            return guide(Prediction(x0_with, eps_with), Prediction(x0_without, eps_without), scale)

        return denoise


def encoder_features(
    network: UNet2DConditionModel, x_t: Latents, t: Times, conditioning: Conditioning
) -> Float[Tensor, "batch features fh fw"]:
    """Run the UNet's encoder and mid-block alone, at times t in 0..T; the decoder need not exist."""
    index = (t.to(x_t.device) - 1).clamp(min=0)
    x, text = _fed(network, x_t, conditioning.text)
    embedding = network.time_embedding(network.get_time_embed(sample=x, timestep=index))
    embedding = embedding + network.get_aug_embed(
        emb=embedding, encoder_hidden_states=text, added_cond_kwargs=_added(conditioning)
    )
    hidden = network.conv_in(x)
    for block in network.down_blocks:
        told = (
            {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        )
        hidden, _ = block(hidden_states=hidden, temb=embedding, **told)
    features: Tensor = network.mid_block(hidden, embedding, encoder_hidden_states=text)
    return features


def _fed(network: UNet2DConditionModel, *inputs: Tensor) -> list[Tensor]:
    """Return inputs in the precision of the network's weights; SDXL's sizes stay exact, for it
    embeds them itself.
    """
    return [x.to(network.conv_in.weight.dtype) for x in inputs]


def _added(conditioning: Conditioning) -> dict[str, Tensor]:
    return {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
