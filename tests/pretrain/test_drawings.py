"""The emoji set, on the committed sample: composites, latents, and what is wrong with a file."""

import random
from pathlib import Path

import pytest
import torch

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.pretrain.drawings import (
    EmojiError,
    EmojiSet,
    Placement,
    built_in_concepts,
    compose,
    load_emoji,
    save_emoji,
)
from twostep.pretrain.latents import cache_latents, load_latents
from twostep.pretrain.model import random_bundle


def test_a_set_comes_back_as_it_was(emoji: EmojiSet, tmp_path: Path) -> None:
    save_emoji(emoji, tmp_path / "again.safetensors")
    again = load_emoji(tmp_path / "again.safetensors")
    assert torch.equal(again.drawings, emoji.drawings)
    assert again.concepts == emoji.concepts


def test_the_background_is_the_colour_asked_for(emoji: EmojiSet) -> None:
    every = torch.arange(len(BACKGROUNDS))
    drawings = emoji.drawings[0, 0].expand(len(every), -1, -1, -1)
    pictures = compose(drawings, every, Placement(), torch.Generator().manual_seed(0))
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    assert pictures.shape == (len(every), 3, 64, 64)
    assert torch.allclose(pictures[:, :, 0, 0], colours, atol=1e-5)


def test_placements_differ_but_repeat_with_their_seed(emoji: EmojiSet) -> None:
    drawings = emoji.drawings[0, 0].expand(4, -1, -1, -1)
    behind = torch.zeros(4, dtype=torch.long)
    first, again = (
        compose(drawings, behind, Placement(), torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert (first[0] - first[1]).abs().max() > 0.1


def test_the_built_in_concepts_are_over_a_hundred_and_distinct() -> None:
    concepts = built_in_concepts()
    names = [name for concept in concepts for name in concept.names]
    assert len(concepts) >= 100
    assert len(names) == len(set(names))


def test_latents_are_cached_with_their_labels(emoji: EmojiSet, tmp_path: Path) -> None:
    cache = cache_latents(emoji, random_bundle().codec, variants=2)
    cache.save(tmp_path / "latents.safetensors")
    again = load_latents(tmp_path / "latents.safetensors")
    assert torch.equal(again.latents, cache.latents)
    assert again.latents.shape == (2 * emoji.drawings.shape[0] * 4, 4, 16, 16)
    drawn, captions = again.draw(16, torch.Generator().manual_seed(0), random.Random(0))
    assert drawn.shape == (16, 4, 16, 16)
    assert len(captions) == 16
    assert max(captions) != ""


def test_nan_in_cached_latents_is_told(emoji: EmojiSet, tmp_path: Path) -> None:
    cache = cache_latents(emoji, random_bundle().codec, variants=1)
    cache.latents[0, 0, 0, 0] = float("nan")
    cache.save(tmp_path / "latents.safetensors")
    with pytest.raises(EmojiError, match="no numbers"):
        load_latents(tmp_path / "latents.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all"])
def test_a_file_that_is_no_emoji_set_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(EmojiError, match="no emoji set"):
        load_emoji(tmp_path / "file")


def test_a_missing_set_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(EmojiError, match=r"twostep drawings"):
        load_emoji(tmp_path / "nothing")
