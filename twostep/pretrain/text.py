"""The text encoders of a built-in model: captions against pictures, contrastively, then frozen.

The pooled outputs of both encoders are matched with those of one small image tower (CLIP,
arXiv 2103.00020), which is thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from twostep.diffusion.shapes import sent
from twostep.evaluate.attributes import BACKGROUNDS, STYLES
from twostep.pretrain.captions import Omission, caption
from twostep.pretrain.drawings import DrawingSet, Placement, compose, random_backgrounds
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.model import build_text_encoders
from twostep.pretrain.sizes import find_size
from twostep.text.clip import TextEncoders
from twostep.training.device import find_device
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder

OMISSION = Omission(everything=0.0, style=0.1, background=0.1, concept=0.02, subgroup_instead=0.05)
"""Less than elsewhere, for a caption that says little matches many pictures of a batch."""

_TOWER_WIDTHS = (3, 32, 64, 128, 192)


class TextSettings(PartSettings):
    """The recipe of the text encoders."""

    part: Literal["text"] = "text"
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss")
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )


class ContrastivePair(nn.Module):
    """Text encoders and the image tower they are matched with."""

    def __init__(self, text: TextEncoders, widths: tuple[int, int]) -> None:
        """Put the encoders, of these widths, beside a fresh image tower and a projection."""
        super().__init__()
        self.text = text
        self.encoders = nn.ModuleList(text.encoders)
        blocks = [_halve(before, after) for before, after in pairwise(_TOWER_WIDTHS)]
        self.tower = nn.Sequential(
            *blocks,
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * _TOWER_WIDTHS[-1], widths[1]),
        )
        # The second encoder is as wide as the tower's output, the first one is not.
        self.first_projection = nn.Linear(widths[0], widths[1], bias=False)

    def forward(
        self, pictures: Float[Tensor, "batch 3 h w"], captions: list[str], temperature: float
    ) -> Float[Tensor, ""]:
        """Return the symmetric contrastive loss, the mean of both encoders'.

        Of several processes each gives its share of the batch; every picture is told apart from the
        captions of all shares, and every caption from all pictures.
        """
        seen = _gathered(nn.functional.normalize(self.tower(pictures).float(), dim=-1))
        first, second = self._pooled(captions)
        loss = pictures.new_zeros(())
        for pooled in (self.first_projection(first), second):
            read = _gathered(nn.functional.normalize(pooled.float(), dim=-1))
            logits = read @ seen.T / temperature
            target = torch.arange(len(logits), device=logits.device)
            share = world().share(len(logits))
            loss = (
                loss
                + nn.functional.cross_entropy(logits[share], target[share])
                + nn.functional.cross_entropy(logits.T[share], target[share])
            )
        return loss / 4

    def _pooled(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return the pooled outputs of the first and of the second encoder."""
        tokenizer = self.text.tokenizers[0]
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.first_projection.weight.device)
        return self.encoders[0](tokens).pooler_output, self.encoders[1](tokens).text_embeds


def train_text(
    drawings: DrawingSet,
    settings: TextSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> TextEncoders:
    """Train both text encoders on captions of composed pictures, and return them frozen."""
    size = find_size(settings.size)
    device = find_device(settings.device)
    torch.manual_seed(settings.loop.seed)
    corpus = vocabulary_corpus([concept.names for concept in drawings.concepts], drawings.subgroups)
    pair = ContrastivePair(build_text_encoders(size, corpus), size.text_widths).to(device)
    if settings.gradient_checkpointing:
        for encoder in pair.text.encoders:
            encoder.gradient_checkpointing_enable()

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        pictures, captions = _random_pairs(
            drawings, settings.loop.batch_size, size.pixels, randomness
        )
        share = world().share(settings.loop.batch_size)
        half = sent(nn.functional.avg_pool2d(pictures[share], 2), device)
        contrastive: Tensor = pair(half, captions[share], settings.temperature)
        return contrastive

    train_network(
        pair,
        loss,
        settings.loop,
        folder,
        name="text",
        on_iteration=on_iteration,
        on_checkpoint=on_checkpoint,
    )
    for encoder in pair.text.encoders:
        encoder.requires_grad_(False).eval()
    return pair.text


def vocabulary_corpus(names: Sequence[tuple[str, ...]], subgroups: Sequence[str]) -> list[str]:
    """Return texts that hold every word a caption of these concepts can hold."""
    words = [*subgroups, *STYLES, *BACKGROUNDS, *(name for group in names for name in group)]
    return [*words, "a an on in of with the style background picture drawing emoji ,"]


def _random_pairs(
    drawings: DrawingSet, count: int, pixels: int, randomness: Randomness
) -> tuple[Float[Tensor, "count 3 pixels pixels"], list[str]]:
    """Compose random pictures and write a caption of each."""
    generator = randomness.tensors
    concept = torch.randint(len(drawings.concepts), (count,), generator=generator)
    style = torch.randint(len(drawings.styles), (count,), generator=generator)
    background = random_backgrounds(count, generator)
    pictures = compose(
        drawings.drawings[concept, style], background, Placement(), generator, pixels=pixels
    )
    labels = torch.stack([concept, style, background], dim=1)
    return pictures, [_caption(drawings, label, randomness) for label in labels]


def _caption(drawings: DrawingSet, label: Int[Tensor, "3"], randomness: Randomness) -> str:
    """Write a caption of a picture with this concept, style and background."""
    concept, style, background = label.tolist()
    attributes = OMISSION.apply(
        drawings.concepts[concept].names,
        drawings.concepts[concept].subgroup,
        style=drawings.styles[style],
        background=list(BACKGROUNDS)[background],
        rng=randomness.words,
    )
    return caption(attributes, randomness.words)


def _gathered(rows: Float[Tensor, "share width"]) -> Float[Tensor, "batch width"]:
    """Return the rows of all processes, in order, through which gradients flow back to each."""
    if world().size == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


def _halve(before: int, after: int) -> nn.Sequential:
    """Return a block that halves height and width."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()
    )
