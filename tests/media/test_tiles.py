"""Tiles give what the whole gives, wherever a decoder sees no farther than they overlap."""

import pytest
import torch
from torch import Tensor, nn

from twostep.media.tiles import decode_in_tiles


class Near(nn.Module):
    """Twice the sides, and a look at the eight neighbours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1))
        self.seen: list[tuple[int, ...]] = []

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        self.seen.append(tuple(latents.shape[2:]))
        pictures: Tensor = self.layers(latents)
        return pictures


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 16), (16, 50), (9, 100)])
def test_a_decoder_that_sees_near(height: int, width: int) -> None:
    decode = Near()
    latents = torch.randn(2, 4, height, width)
    tiled = decode_in_tiles(decode, latents, 16)
    assert set(decode.seen) == {(min(16, height), min(16, width))}
    torch.testing.assert_close(tiled, decode(latents), rtol=0, atol=1e-6)


def test_seams_are_faded() -> None:
    """A decoder that gives each tile a colour of its own shows how they are mixed."""
    colours = iter([0.0, 1.0])

    def decode(tile: Tensor) -> Tensor:
        return torch.full((1, 3, *tile.shape[2:]), next(colours))

    row = decode_in_tiles(decode, torch.zeros(1, 4, 16, 28), 16)[0, 0, 0]
    assert row[:13].tolist() == [0.0] * 13  # up to the outermost quarter of the overlap
    assert row[15:].tolist() == [1.0] * 13
    assert row[13] == pytest.approx(0.25) and row[14] == pytest.approx(0.75)
