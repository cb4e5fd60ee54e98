"""A backbone with its schedule and prediction type: (x_t, t, conditioning) -> Prediction.

Times are those of the schedule. What the backbone is given is the time that it was trained to
read, of SDXL's schedule t - 1. Feeding T - 1 together with pure noise is the fixed schedule of
section 3.5 of arXiv 2402.13929.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twostep.diffusion import (
    Denoise,
    Prediction,
    PredictionType,
    Schedule,
    guide,
    prediction_from_output,
)
from twostep.diffusion.shapes import Batch, Times, sent
from twostep.networks import backbone as backbones
from twostep.networks.adapters import activated
from twostep.networks.backbone import Backbone
from twostep.networks.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A backbone that answers in x0 and eps, whatever it predicts.

    Several denoisers may share one network, each with another LoRA at work.

    Args:
        backbone: The network to call.
        schedule: Signal and noise at every time.
        prediction_type: What the network's output means.
        lora: The name of the LoRA that is at work in a call; None for the network alone.
    """

    backbone: Backbone
    schedule: Schedule
    prediction_type: PredictionType = "eps"
    lora: str | None = None

    @property
    def network(self) -> nn.Module:
        """The module that holds the backbone's weights."""
        return backbones.module_of(self.backbone)

    @property
    def networks(self) -> list[nn.Module]:
        """All modules of the backbone: `network`, and those that are never trained."""
        return backbones.modules_of(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's own weights; those of a LoRA may be another."""
        return next(self.network.parameters()).dtype

    def __call__(self, x_t: Batch, t: Times, conditioning: Conditioning) -> Prediction:
        """Predict x0 and eps.

        Args:
            x_t: Noisy latents [batch, ...] on the network's device.
            t: Times above 0, one per item; cheapest on the CPU.
            conditioning: What the latents are to show, for as many items. Its ControlNets act if
                they do at the first item's time.

        Returns:
            The prediction in the precision of `x_t`, whatever the network computes in.
        """
        time = self._network_time(x_t, t)
        if conditioning.hints:
            conditioning = conditioning.acting_at(float(t[0]))
        # LoRAs are switched in the module itself, so threads that share it take turns.
        with activated(self.network, self.lora):
            output = self.backbone(x_t, time, conditioning)
        alpha, sigma = self.schedule.coefficients(t, x_t)
        return prediction_from_output(output.to(x_t.dtype), x_t, alpha, sigma, self.prediction_type)

    def features(self, x_t: Batch, t: Times, conditioning: Conditioning) -> list[Tensor]:
        """Return the backbone's features of `x_t` at times `t`, the deepest last.

        Raises BackboneError if the backbone has no features.
        """
        time = self._network_time(x_t, t)
        with activated(self.network, self.lora):
            return backbones.features(self.backbone, x_t, time, conditioning)

    def with_network(self, network: nn.Module) -> Denoiser:
        """Return the same denoiser on another module of the same architecture."""
        return replace(self, backbone=backbones.with_module(self.backbone, network))

    def standalone(self) -> Denoiser:
        """Return a float32 copy that computes the same by itself, with its LoRA merged in."""
        copied = backbones.standalone(self.backbone, self.lora)
        return replace(self, backbone=copied, lora=None)

    def encoder_copy(self) -> Denoiser:
        """Return a float32 copy that only offers `features`, with its LoRA merged in."""
        copied = backbones.encoder_copy(self.backbone, self.lora)
        return replace(self, backbone=copied, lora=None)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Switch gradient checkpointing on or off; BackboneError where it cannot be switched on."""
        backbones.checkpoint_gradients(self.backbone, enabled)

    def with_conditioning(self, conditioning: Conditioning) -> Denoise:
        """Return the function (x_t, t) -> Prediction that `solve` follows."""
        return lambda x_t, t: self(x_t, t, conditioning)

    def with_guidance(
        self, positive: Conditioning, negative: Conditioning, scale: float
    ) -> Denoise:
        """Return the same with classifier-free guidance (arXiv 2207.12598).

        Both conditionings are computed in one call of twice the batch. A scale of 1 is no
        guidance, and calls the network with `positive` alone.
        """
        if scale == 1:
            return self.with_conditioning(positive)
        both = Conditioning.cat([negative, positive])

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = self(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            x0_negative, x0_positive = prediction.x0.chunk(2)
            eps_negative, eps_positive = prediction.eps.chunk(2)
            return guide(
                Prediction(x0_positive, eps_positive), Prediction(x0_negative, eps_negative), scale
            )

        return denoise

    def _network_time(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the times as the network reads them, on its device."""
        return sent(self.schedule.network_time(t), x_t.device)
