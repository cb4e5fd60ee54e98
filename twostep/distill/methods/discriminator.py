"""The discriminator: the teacher's encoder and mid-block, fully trained, with small heads.

Sections 3.2 to 3.4 of arXiv 2402.13929. Conditional, D(x_t, x_s, t, s, c), it judges the pair, and
so whether the student keeps to the teacher's flow. Unconditional, D'(x_s, s, c), it judges the
landing alone, which lets the student leave the flow where its capacity is too small for it.

The paper has one head, on the mid-block. What a student's landing lacks shows earlier, in the
levels of higher resolution, so heads may stand on all of them (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import Batch, Times
from twostep.distill.roles import Weights, place_lora
from twostep.networks.adapters import remove_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import TrainingError

Features = Sequence[Float[Tensor, "batch _ ..."]]
"""What the encoder makes of latents, at every level that has a head."""

Logits = Float[Tensor, " batch"]

Levels = Literal["mid", "all"]
"""Where heads stand: on the mid-block, or on every level of the encoder too."""

Precision = Literal["fp32", "stage"]
"""What a discriminator computes in: float32, or the precision of its stage."""

FORWARD_METHODS = ("features", "judge")
"""The methods by which a discriminator is called."""


@runtime_checkable
class Judge(Weights, Protocol):
    """Any discriminator: an encoder, and heads that judge one or two of its answers.

    Attributes:
        conditional: whether x_t is judged together with x_s.
    """

    conditional: bool

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Sequence[Tensor]:
        """Return what the encoder makes of latents x at times t, at every level with a head."""

    def judge(self, before: Sequence[Tensor] | None, after: Sequence[Tensor]) -> Tensor:
        """Return one logit per item, high for the teacher's landings.

        Args:
            before: features of x_t; None if the discriminator is unconditional.
            after: features of x_s.
        """


class Heads(nn.ModuleList):
    """A small head for every level; their logits are added up.

    A head is one block that halves every side, of pictures height and width, and a logit at every
    place, of which the mean is taken. Its convolutions run along all sides that features have.
    The paper does not say how often its head halves; on nano's mid-block of 4x4, once learns faster
    than twice (docs/log.md).
    """

    def __init__(self, teacher: Denoiser, levels: Levels, *, conditional: bool) -> None:
        """Make fresh heads.

        Args:
            teacher: whose features they judge.
            levels: where they stand.
            conditional: whether they get the features of x_t too.
        """
        spec = teacher.backbone.spec
        widths = spec.feature_widths[-1:] if levels == "mid" else spec.feature_widths
        super().__init__(
            _make_head(width, conditional, teacher.device, spec.feature_sides) for width in widths
        )

    def select(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return those of an encoder's features on which heads stand."""
        return list(features)[-len(self) :]

    def forward(self, before: Features | None, after: Features) -> Logits:
        """Return the sum of the heads' logits."""
        total: Tensor | None = None
        for position, head in enumerate(self):
            features = after[position]
            if before is not None:
                features = torch.cat([before[position], features], dim=1)
            logits = head(features.float()).float().flatten(1).mean(dim=1)
            total = logits if total is None else total + logits
        assert total is not None
        return total

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Restore weights; TrainingError if they are those of heads elsewhere, or of other form."""
        check_layout(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)


class _EncoderWithHeads:
    """How every discriminator judges."""

    precision: Precision
    heads: Heads
    _denoiser: Denoiser

    def features(self, x: Batch, t: Times, conditioning: Conditioning) -> Features:
        """Return the features of latents x at times t of the schedule."""
        with _computing_in(self.precision, x):
            return self.heads.select(self._denoiser.features(x, t, conditioning))

    def judge(self, before: Features | None, after: Features) -> Logits:
        """Return the logits, from the features of x_t, if conditional, and of x_s."""
        with _computing_in(self.precision, after[0]):
            logits: Tensor = self.heads(before, after)
        return logits


class Discriminator(_EncoderWithHeads, nn.Module):
    """An encoder of its own, which starts as the teacher's, and heads."""

    def __init__(
        self,
        teacher: Denoiser,
        *,
        conditional: bool,
        levels: Levels = "mid",
        precision: Precision = "stage",
    ) -> None:
        """Copy the teacher's encoder, with its LoRA merged in.

        Args:
            teacher: stays as it is.
            conditional: whether x_t is judged together with x_s.
            levels: where heads stand.
            precision: what it computes in; its weights are float32 either way.
        """
        super().__init__()
        self.conditional = conditional
        self.precision = precision
        self._denoiser = teacher.encoder_copy()
        self.encoder = self._denoiser.network.requires_grad_(True)
        self.heads = Heads(teacher, levels, conditional=conditional)

    def checkpoint_gradients(self) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping activations."""
        self._denoiser.checkpoint_gradients(True)

    def parameter_groups(self) -> tuple[Iterator[nn.Parameter], Iterator[nn.Parameter]]:
        """Return the parameters of the encoder, and those of the heads."""
        return self.encoder.parameters(), self.heads.parameters()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Restore weights; TrainingError if they are those of another discriminator."""
        check_layout(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @property
    def kept(self) -> nn.Module:
        """What the next stage of the same student goes on with: all but the heads."""
        return self.encoder


class LoraDiscriminator(_EncoderWithHeads):
    """The same with a LoRA on the teacher's network as its encoder, so the base is there once.

    It is no module, since the base is not its own.
    """

    NAME = "discriminator"

    def __init__(
        self,
        teacher: Denoiser,
        *,
        conditional: bool,
        rank: int,
        levels: Levels = "mid",
        precision: Precision = "stage",
    ) -> None:
        """Put the LoRA on the teacher's network; whatever could be trained there still can be.

        Args:
            teacher: the new LoRA starts as its LoRA.
            conditional: whether x_t is judged together with x_s.
            rank: of the new LoRA.
            levels: where heads stand.
            precision: what it computes in, if the base is float32; a base of 16 bits computes in
                its own precision, and only the heads in float32.
        """
        self.conditional = conditional
        self.precision = precision
        self.lora = place_lora(teacher, self.NAME, rank=rank, encoder_only=True)
        self._denoiser = replace(teacher, lora=self.NAME)
        self.heads = Heads(teacher, levels, conditional=conditional)

    def remove(self) -> None:
        """Take the LoRA off the teacher's network."""
        remove_lora(self._denoiser.network, self.NAME)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the LoRA and of the heads."""
        yield from self.lora.parameters()
        yield from self.heads.parameters()

    def parameter_groups(self) -> tuple[Iterator[nn.Parameter], Iterator[nn.Parameter]]:
        """Return the parameters of the LoRA, and those of the heads."""
        return iter(self.lora.parameters()), self.heads.parameters()

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let gradients flow into the LoRA and the heads, or not."""
        self.lora.requires_grad_(requires_grad)
        self.heads.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the LoRA and of the heads."""
        return {"lora": self.lora.state_dict(), "heads": self.heads.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; TrainingError if it is another discriminator's."""
        if state_dict.keys() != {"lora", "heads"}:
            raise TrainingError(_OTHER_LAYOUT.format(reason="its encoder is a network of its own"))
        check_layout(self.lora.state_dict(), state_dict["lora"])
        self.heads.load_state_dict(state_dict["heads"])
        self.lora.load_state_dict(state_dict["lora"])

    @property
    def kept(self) -> Any:
        """What the next stage of the same student goes on with: all but the heads."""
        return self.lora


_OTHER_LAYOUT = (
    "the checkpoint holds another discriminator than the recipe asks for: {reason}. Go on with the "
    "settings that it was made with (levels, objective, discriminator_lora), or start under "
    "another --out."
)


def check_layout(own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse weights of a discriminator of another form: TrainingError names the first of them."""
    for name in sorted(own.keys() ^ found.keys()):
        verb = "lacks" if name in own else "has"
        raise TrainingError(_OTHER_LAYOUT.format(reason=f"it {verb} {name}"))
    for name, value in own.items():
        if value.shape != found[name].shape:
            shapes = f"{list(found[name].shape)} instead of {list(value.shape)}"
            raise TrainingError(_OTHER_LAYOUT.format(reason=f"{name} is {shapes}"))


_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""By the number of sides that features have."""


def _make_head(
    width: int, conditional: bool, device: torch.device, num_sides: int
) -> nn.Sequential:
    """Return a head on features of `width` channels: one block that halves the sides, and logits.

    Args:
        width: channels of the features.
        conditional: whether it gets the features of x_t too.
        device: where it goes.
        num_sides: of the features beside channels: 2 for pictures.
    """
    convolution = _CONVOLUTIONS[num_sides]
    in_channels = 2 * width if conditional else width
    halving = convolution(in_channels, width, 4, stride=2, padding=1)
    num_groups = 32 if width % 32 == 0 else 16
    block = nn.Sequential(halving, nn.GroupNorm(num_groups, width), nn.SiLU())
    head = nn.Sequential(block, convolution(width, 1, 1))
    # Made on the CPU and moved, so that it starts the same on every device.
    return head if device.type == "cpu" else head.to(device)


def _computing_in(precision: Precision, like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which networks compute in a discriminator's precision."""
    if precision == "stage":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(like.device.type, enabled=False)
    return context
