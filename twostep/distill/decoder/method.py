"""What a tiny decoder is shown in an iteration, and what it minimises.

The pair is two pictures of the same latents, the autoencoder's and the tiny decoder's. The loss is
L1 on pixels and on edges; a discriminator of patches adds the texture that an average over
possible pictures lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from twostep.diffusion.shapes import Batch, sent
from twostep.distill.decoder.discriminator import PatchDiscriminator
from twostep.distill.method import Cost, Models, Procedure
from twostep.distill.pairs import Batches
from twostep.distill.roles import OptimiserSettings, Role
from twostep.media.image import ImageCodec
from twostep.media.patches import edge_loss, psnr, random_crop
from twostep.training.loop import Randomness
from twostep.training.recipe import RecipeError

if TYPE_CHECKING:
    from twostep.distill.decoder.recipe import DecoderStage

DISCRIMINATOR = "discriminator"
STUDENT = "student"


@dataclass(frozen=True, eq=False)
class DecodedPair:
    """The same latents as two pictures, in -1..1.

    Args:
        full: by the autoencoder, without gradient.
        tiny: by the tiny decoder, with gradient, and not cut off.
        is_judged: whether the discriminator has come in.
    """

    full: Float[Tensor, "batch 3 height width"]
    tiny: Float[Tensor, "batch 3 height width"]
    is_judged: bool = False


class DecoderDistillation(Procedure[DecodedPair]):
    """The tiny decoder is pulled to the autoencoder's pictures."""

    def __init__(self, stage: DecoderStage) -> None:
        """Take the settings of the training."""
        self.stage = stage

    def roles(self, teacher: ImageCodec, student: nn.Module) -> Mapping[str, Role]:
        """Return the decoder and, if it counts, the discriminator."""
        stage = self.stage
        roles = {STUDENT: Role(student, student, OptimiserSettings.of(stage))}
        if stage.adversarial_weight > 0:
            judge = PatchDiscriminator(stage.discriminator_width)
            judge = judge.to(next(student.parameters()).device)
            rate = stage.discriminator_learning_rate
            roles[DISCRIMINATOR] = Role(
                judge, judge, OptimiserSettings.of(stage, learning_rate=rate)
            )
        return roles

    def draw(
        self, iteration: int, batches: Batches, models: Models, random: Randomness
    ) -> DecodedPair:
        """Draw latents, and decode them with both."""
        codec: ImageCodec = models["teacher"]
        latents = self._latents(batches, random)
        with torch.no_grad():
            full = codec.decode(latents).float()
        tiny: Tensor = models[STUDENT](codec.tiny_inputs(latents))
        return DecodedPair(full, tiny.float(), self._is_judged(iteration))

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the discriminator's turn before the decoder's, once it has come in."""
        return (DISCRIMINATOR, STUDENT) if self._is_judged(iteration) else (STUDENT,)

    def loss(self, role: str, pair: DecodedPair, models: Models) -> Mapping[str, Tensor]:
        """Return the loss of a role, with what it consists of for the log."""
        if role == DISCRIMINATOR:
            return _told_apart(models[DISCRIMINATOR], pair)
        difference = pair.tiny - pair.full
        pixels = difference.abs().mean()
        edges = edge_loss(difference)
        total = pixels + self.stage.edge_weight * edges
        figures = {"pixels": pixels, "edges": edges}
        if pair.is_judged:
            verdict = softplus(-models[DISCRIMINATOR](pair.tiny).float()).mean()
            total = total + self.stage.adversarial_weight * verdict
            figures["verdict"] = verdict
        near = psnr(pair.tiny.detach().clamp(-1, 1), pair.full)
        return {"total": total, **figures, "psnr": near}

    def cost(self) -> Cost:
        """Return that the autoencoder decodes once."""
        return Cost(teacher_evaluations=1)

    def _is_judged(self, iteration: int) -> bool:
        return self.stage.adversarial_weight > 0 and iteration >= self.stage.adversarial_from

    def _latents(self, batches: Batches, random: Randomness) -> Batch:
        """Draw this process's latents, cut and jittered as the stage says."""
        whole = batches.latents(random)
        side = self.stage.crop
        if side is not None:
            if side > min(whole.shape[-2:]):
                raise RecipeError(
                    f"decoder.crop is {side}, and the data has latents of "
                    f"{whole.shape[-1]}x{whole.shape[-2]}: give a smaller one, or leave it out."
                )
            whole = random_crop(whole, side, random.tensors)
        if self.stage.jitter > 0:
            whole = whole + self.stage.jitter * torch.randn(whole.shape, generator=random.tensors)
        return sent(batches.share(whole), batches.device)


def _told_apart(judge: Any, pair: DecodedPair) -> dict[str, Tensor]:
    """Return the discriminator's loss, on both pictures in one batch."""
    logits: Tensor = judge(torch.cat([pair.full, pair.tiny.detach()])).float()
    full, tiny = logits.chunk(2)
    total = softplus(-full).mean() + softplus(tiny).mean()
    return {"total": total, "full_logit": full.mean(), "tiny_logit": tiny.mean()}
