"""The discriminator: the teacher's encoder and mid-block, fully trained, and a small head (sections
3.2 to 3.4).

Conditional: D(x_t, x_s, t, s, c) judges the pair, and so whether the student keeps to the teacher's
flow. Unconditional: D'(x_s, s, c) judges the landing alone, and lets the student leave the flow
where it must.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twostep.diffusion.shapes import Latents, Times
from twostep.networks.adapters import Lora, add_lora, remove_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.shards import shard

Features = Float[Tensor, "batch width fh fw"]
Logits = Float[Tensor, " batch"]


class Discriminator(nn.Module):
    """An encoder that starts as the teacher's, without a decoder, and a head that gives one logit
    per item.
    """

    def __init__(self, teacher: Denoiser, *, pairs: bool, sharded: bool = False) -> None:
        """Copy the teacher's encoder; `pairs` tells whether x_t is judged together with x_s."""
        super().__init__()
        self.pairs = pairs
        self.denoiser = teacher.encoder_copy()
        self.encoder = self.denoiser.network.requires_grad_(True)
        width = teacher.backbone.spec.feature_widths[-1]
        self.head = _head(width, pairs, self.denoiser.device)
        if sharded:
            shard(self, methods=("features", "judge"))

    def features(self, x: Latents, t: Times, conditioning: Conditioning) -> Features:
        """Return the mid-block's features of x at time t."""
        return self.denoiser.features(x, t, conditioning)[-1]

    def judge(self, before: Features | None, after: Features) -> Logits:
        """Return the logits, from the features of x_s and, of a judge of pairs, those of x_t."""
        return _logits(self.head, before, after)


class LoraDiscriminator:
    """The same on a shared base: its encoder is an adapter beside the student's, so the base is
    there only once.

    It starts as the teacher's encoder, its own adapter included. Not a module, since the base is
    not its own.
    """

    NAME = "discriminator"

    def __init__(self, teacher: Denoiser, *, pairs: bool, rank: int) -> None:
        """Put the adapter on the teacher's network; whatever could be trained there still can."""
        self.pairs = pairs
        network = teacher.network
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        remove_lora(network, self.NAME)
        spec = teacher.backbone.spec
        self.lora = add_lora(
            network, self.NAME, rank=rank, targets=spec.lora_targets, encoder_only=True
        )
        self.denoiser = replace(teacher, lora=self.NAME)
        if teacher.lora is not None:
            taught = Lora(network, teacher.lora).state_dict()
            self.lora.load_state_dict({key: taught[key] for key in self.lora.state_dict()})
        for parameter in trainable:
            parameter.requires_grad_(True)
        self.head = _head(spec.feature_widths[-1], pairs, teacher.device)

    def features(self, x: Latents, t: Times, conditioning: Conditioning) -> Features:
        """Return the mid-block's features of x at time t."""
        return self.denoiser.features(x, t, conditioning)[-1]

    def judge(self, before: Features | None, after: Features) -> Logits:
        """Return the logits, from the features of x_s and, of a judge of pairs, those of x_t."""
        return _logits(self.head, before, after)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters and the head's."""
        yield from self.lora.parameters()
        yield from self.head.parameters()

    def requires_grad_(self, requires_grad: bool) -> None:
        """Switch learning on or off."""
        self.lora.requires_grad_(requires_grad)
        self.head.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's weights and the head's."""
        return {"lora": self.lora.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.lora.load_state_dict(state_dict["lora"])
        self.head.load_state_dict(state_dict["head"])


def _head(width: int, pairs: bool, device: torch.device) -> nn.Sequential:
    """Make the head on the CPU, so that it starts the same wherever it is then moved.

    How often it halves, the paper does not say; on nano's 4x4 mid-block once learns faster than
    twice (docs/log.md).
    """
    halving = nn.Conv2d((2 if pairs else 1) * width, width, 4, stride=2, padding=1)
    block = nn.Sequential(halving, nn.GroupNorm(32 if width % 32 == 0 else 16, width), nn.SiLU())
    head = nn.Sequential(block, nn.Conv2d(width, 1, 1))
    return head if device.type == "cpu" else head.to(device)


def _logits(head: nn.Sequential, before: Tensor | None, after: Tensor) -> Tensor:
    both = after if before is None else torch.cat([before, after], dim=1)
    logits: Tensor = head(both.float()).float().mean(dim=(1, 2, 3))
    return logits
