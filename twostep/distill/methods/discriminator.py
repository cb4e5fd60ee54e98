"""The discriminator: the teacher's encoder and mid-block, fully trained, with a small head.

Sections 3.2 to 3.4 of arXiv 2402.13929. Conditional, D(x_t, x_s, t, s, c), it judges the pair, and
so whether the student keeps to the teacher's flow. Unconditional, D'(x_s, s, c), it judges the
landing alone, which lets the student leave the flow where its capacity is too small for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import Batch, Times
from twostep.distill.roles import Weights, place_lora
from twostep.networks.adapters import remove_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

Features = Float[Tensor, "batch width fh fw"]
Logits = Float[Tensor, " batch"]

FORWARD_METHODS = ("features", "judge")
"""The methods by which a discriminator is called."""


@runtime_checkable
class Judge(Weights, Protocol):
    """Any discriminator: an encoder, and a head that judges one or two of its features.

    Attributes:
        conditional: whether x_t is judged together with x_s.
    """

    conditional: bool

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the encoder makes of latents x at times t."""

    def judge(self, before: Tensor | None, after: Tensor) -> Tensor:
        """Return one logit per item, high for the teacher's landings.

        Args:
            before: features of x_t; None if the discriminator is unconditional.
            after: features of x_s.
        """


class Discriminator(nn.Module):
    """An encoder of its own, which starts as the teacher's, and a head."""

    def __init__(self, teacher: Denoiser, *, conditional: bool) -> None:
        """Copy the teacher's encoder, with its LoRA merged in.

        Args:
            teacher: stays as it is.
            conditional: whether x_t is judged together with x_s.
        """
        super().__init__()
        self.conditional = conditional
        self._denoiser = teacher.encoder_copy()
        self.encoder = self._denoiser.network.requires_grad_(True)
        width = teacher.backbone.spec.feature_widths[-1]
        self.head = _make_head(width, conditional, teacher.device)

    def features(self, x: Batch, t: Times, conditioning: Conditioning) -> Features:
        """Return the mid-block's features of latents x at times t in 0..1000."""
        return self._denoiser.features(x, t, conditioning)[-1]

    def judge(self, before: Features | None, after: Features) -> Logits:
        """Return the logits, from the features of x_t, if conditional, and of x_s."""
        return _logits(self.head, before, after)

    def checkpoint_gradients(self) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping activations."""
        self._denoiser.checkpoint_gradients(True)


class LoraDiscriminator:
    """The same with a LoRA on the teacher's network as its encoder, so the base is there once.

    It is no module, since the base is not its own.
    """

    NAME = "discriminator"

    def __init__(self, teacher: Denoiser, *, conditional: bool, rank: int) -> None:
        """Put the LoRA on the teacher's network; whatever could be trained there still can be.

        Args:
            teacher: the new LoRA starts as its LoRA.
            conditional: whether x_t is judged together with x_s.
            rank: of the new LoRA.
        """
        self.conditional = conditional
        self.lora = place_lora(teacher, self.NAME, rank=rank, encoder_only=True)
        self._denoiser = replace(teacher, lora=self.NAME)
        width = teacher.backbone.spec.feature_widths[-1]
        self.head = _make_head(width, conditional, teacher.device)

    def features(self, x: Batch, t: Times, conditioning: Conditioning) -> Features:
        """Return the mid-block's features of latents x at times t in 0..1000."""
        return self._denoiser.features(x, t, conditioning)[-1]

    def judge(self, before: Features | None, after: Features) -> Logits:
        """Return the logits, from the features of x_t, if conditional, and of x_s."""
        return _logits(self.head, before, after)

    def remove(self) -> None:
        """Take the LoRA off the teacher's network."""
        remove_lora(self._denoiser.network, self.NAME)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the LoRA and of the head."""
        yield from self.lora.parameters()
        yield from self.head.parameters()

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let gradients flow into the LoRA and the head, or not."""
        self.lora.requires_grad_(requires_grad)
        self.head.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the LoRA and of the head."""
        return {"lora": self.lora.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.lora.load_state_dict(state_dict["lora"])
        self.head.load_state_dict(state_dict["head"])


def _make_head(width: int, conditional: bool, device: torch.device) -> nn.Sequential:
    """Return a head on features of `width` channels: one block that halves the side, and logits.

    The paper does not say how often its head halves; on nano's mid-block of 4x4, once learns faster
    than twice (docs/log.md).
    """
    in_channels = 2 * width if conditional else width
    halving = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
    num_groups = 32 if width % 32 == 0 else 16
    block = nn.Sequential(halving, nn.GroupNorm(num_groups, width), nn.SiLU())
    head = nn.Sequential(block, nn.Conv2d(width, 1, 1))
    # Made on the CPU and moved, so that it starts the same on every device.
    return head if device.type == "cpu" else head.to(device)


def _logits(head: nn.Sequential, before: Tensor | None, after: Tensor) -> Tensor:
    features = after if before is None else torch.cat([before, after], dim=1)
    logits: Tensor = head(features.float()).float().mean(dim=(1, 2, 3))
    return logits
