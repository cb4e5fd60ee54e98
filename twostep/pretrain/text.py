"""The nano text encoders: captions against drawings, contrastively (arXiv 2103.00020), then frozen.

Both encoders' pooled outputs are matched with one small image tower, which is thrown away
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from twostep.evaluate.attributes import BACKGROUNDS, STYLES
from twostep.pretrain.captions import Omission, caption
from twostep.pretrain.descent import DescentSettings, silent, train
from twostep.pretrain.drawings import EmojiSet, Placement, compose
from twostep.pretrain.model import TEXT_WIDTHS, build_text_encoders
from twostep.text.clip import TextEncoders
from twostep.training.loop import OnIteration, Randomness
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder


class TextSettings(Settings):
    """The recipe part of the text encoders."""

    loop: DescentSettings
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss")


class ContrastivePair(nn.Module):
    """Text encoders and the image tower they are matched with."""

    def __init__(self, text: TextEncoders) -> None:
        """Put the encoders beside a fresh image tower and one projection each."""
        super().__init__()
        self.text = text
        self.encoders = nn.ModuleList(text.encoders)
        widths = (3, 32, 64, 128, 192)
        blocks = [_halve(before, after) for before, after in pairwise(widths)]
        self.tower = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 192, TEXT_WIDTHS[1])
        )
        self.first_projection = nn.Linear(TEXT_WIDTHS[0], TEXT_WIDTHS[1], bias=False)

    def forward(
        self, pictures: Float[Tensor, "batch 3 h w"], captions: list[str], temperature: float
    ) -> Float[Tensor, ""]:
        """Return the symmetric contrastive loss, summed over both encoders."""
        seen = nn.functional.normalize(self.tower(pictures).float(), dim=-1)
        first, second = self._pooled(captions)
        loss = pictures.new_zeros(())
        for said in (self.first_projection(first), second):
            logits = nn.functional.normalize(said.float(), dim=-1) @ seen.T / temperature
            target = torch.arange(len(logits))
            loss = (
                loss
                + nn.functional.cross_entropy(logits, target)
                + nn.functional.cross_entropy(logits.T, target)
            )
        return loss / 4

    def _pooled(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer = self.text.tokenizers[0]
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.encoders[0](tokens).pooler_output, self.encoders[1](tokens).text_embeds


def train_text(
    emoji: EmojiSet,
    settings: TextSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> TextEncoders:
    """Train both text encoders on captions of composited drawings, and return them frozen."""
    torch.manual_seed(settings.loop.seed)
    corpus = vocabulary_corpus([concept.names for concept in emoji.concepts], emoji.subgroups)
    pair = ContrastivePair(build_text_encoders(corpus))
    omission = Omission(
        everything=0.0, style=0.1, background=0.1, concept=0.02, subgroup_instead=0.05
    )
    backgrounds = list(BACKGROUNDS)

    def loss(iteration: int, draw: Randomness) -> Tensor:
        count = settings.loop.batch_size
        concept = torch.randint(len(emoji.concepts), (count,), generator=draw.tensors)
        style = torch.randint(len(emoji.styles), (count,), generator=draw.tensors)
        background = torch.randint(len(backgrounds), (count,), generator=draw.tensors)
        pictures = compose(emoji.drawings[concept, style], background, Placement(), draw.tensors)
        captions = [
            caption(
                omission.apply(
                    emoji.concepts[c].names,
                    emoji.concepts[c].subgroup,
                    emoji.styles[s],
                    backgrounds[b],
                    draw.words,
                ),
                draw.words,
            )
            for c, s, b in zip(concept.tolist(), style.tolist(), background.tolist(), strict=True)
        ]
        answer: Tensor = pair(nn.functional.avg_pool2d(pictures, 2), captions, settings.temperature)
        return answer

    train(
        pair,
        loss,
        settings.loop,
        folder,
        "text",
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


def _halve(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()
    )
