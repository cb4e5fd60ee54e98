"""Drawings, on the committed sample: pictures, latents, and what is wrong with a folder or file."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.pretrain.drawings import (
    BUILT_IN,
    DrawingsError,
    DrawingSet,
    Placement,
    built_in_concepts,
    compose,
    load_drawings,
    save_drawings,
)
from twostep.pretrain.latents import cache_latents, load_latents
from twostep.pretrain.model import random_bundle


def test_a_set_comes_back_as_it_was(emoji: DrawingSet, tmp_path: Path) -> None:
    save_drawings(emoji, tmp_path / "again")
    again = load_drawings(tmp_path / "again")
    assert torch.equal(again.drawings, emoji.drawings)
    assert again.concepts == emoji.concepts


def test_the_background_is_the_colour_asked_for(emoji: DrawingSet) -> None:
    every = torch.arange(len(BACKGROUNDS))
    drawings = emoji.drawings[0, 0].expand(len(every), -1, -1, -1)
    pictures = compose(drawings, every, Placement(), torch.Generator().manual_seed(0), pixels=64)
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    assert pictures.shape == (len(every), 3, 64, 64)
    assert torch.allclose(pictures[:, :, 0, 0], colours, atol=1e-5)


def test_placements_differ_but_repeat_with_their_seed(emoji: DrawingSet) -> None:
    drawings = emoji.drawings[0, 0].expand(4, -1, -1, -1)
    behind = torch.zeros(4, dtype=torch.long)
    first, again = (
        compose(drawings, behind, Placement(), torch.Generator().manual_seed(5), pixels=64)
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert (first[0] - first[1]).abs().max() > 0.1


def test_the_built_in_concepts_are_over_a_hundred_and_distinct() -> None:
    concepts = built_in_concepts()
    names = [name for concept in concepts for name in concept.names]
    assert len(concepts) >= 100
    assert len(names) == len(set(names))


def test_latents_are_cached_with_their_labels(emoji: DrawingSet, tmp_path: Path) -> None:
    cache = cache_latents(emoji, random_bundle().codec, pixels=64, variants=2)
    cache.save(tmp_path / "latents.safetensors")
    again = load_latents(tmp_path / "latents.safetensors")
    assert torch.equal(again.latents, cache.latents)
    assert again.latents.shape == (2 * emoji.drawings.shape[0] * 4, 4, 16, 16)
    drawn, captions = again.draw(16, torch.Generator().manual_seed(0), random.Random(0))
    assert drawn.shape == (16, 4, 16, 16)
    assert len(captions) == 16
    assert max(captions) != ""


def test_nan_in_cached_latents_is_told(emoji: DrawingSet, tmp_path: Path) -> None:
    cache = cache_latents(emoji, random_bundle().codec, pixels=64, variants=1)
    cache.latents[0, 0, 0, 0] = float("nan")
    cache.save(tmp_path / "latents.safetensors")
    with pytest.raises(DrawingsError, match="no numbers"):
        load_latents(tmp_path / "latents.safetensors")


def test_a_picture_is_as_large_as_asked(emoji: DrawingSet) -> None:
    behind = torch.zeros(4, dtype=torch.long)
    large, small = (
        compose(
            emoji.drawings[:4, 0],
            behind,
            Placement(shift_pixels=0.0, rotation_degrees=0.0, flip=False),
            torch.Generator().manual_seed(5),
            pixels=pixels,
        )
        for pixels in (64, 32)
    )
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert small.shape == (4, 3, 32, 32)
    assert (halved - small).abs().mean() < 0.04


def test_the_built_in_drawings_are_those_that_were_rendered() -> None:
    """Lossless: the digest is that of what resvg drew, before it was written to sheets."""
    built_in = load_drawings()
    assert built_in.drawings.shape == (115, 4, 4, 128, 128)
    assert built_in.concepts == built_in_concepts()
    digest = hashlib.sha256(built_in.drawings.numpy().tobytes()).hexdigest()
    assert digest == "7dd7d6e8e9daced919ec1e3ef57e0249a78483566246435ba40595a3d02809cf"


def test_the_built_in_drawings_are_small() -> None:
    assert sum(path.stat().st_size for path in BUILT_IN.iterdir()) < 3_000_000


@pytest.mark.parametrize("damage", ["a sheet cut off", "no sheet", "another size", "no listing"])
def test_a_damaged_folder_is_told(damage: str, emoji: DrawingSet, tmp_path: Path) -> None:
    save_drawings(emoji, tmp_path)
    sheet = tmp_path / "3d.webp"
    if damage == "a sheet cut off":
        sheet.write_bytes(sheet.read_bytes()[:200])
    elif damage == "no sheet":
        sheet.unlink()
    elif damage == "another size":
        Image.new("RGBA", (64, 64)).save(sheet, "WEBP", lossless=True)
    else:
        (tmp_path / "drawings.json").write_text('{"styles": []')
    with pytest.raises(DrawingsError, match=r"are damaged.*render them anew"):
        load_drawings(tmp_path)


def test_a_missing_set_says_how_to_render_it(tmp_path: Path) -> None:
    with pytest.raises(DrawingsError, match="twostep drawings"):
        load_drawings(tmp_path / "nothing")


def test_a_file_that_holds_no_latents_is_told(tmp_path: Path) -> None:
    (tmp_path / "latents").write_bytes(b"not a safetensors file at all")
    with pytest.raises(DrawingsError, match="no latent cache"):
        load_latents(tmp_path / "latents")
