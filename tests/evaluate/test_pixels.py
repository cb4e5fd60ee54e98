"""Measures that look at pixels alone: the border's colour, fine detail."""

import math
from itertools import combinations

import pytest
import torch

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.detail import high_pass_energy
from twostep.evaluate.palette import OFF_PALETTE, border_colour, palette_distance


def plain(*levels: float) -> torch.Tensor:
    """A picture of one colour, RGB in 0..255."""
    colour = torch.tensor(levels) / 127.5 - 1
    return colour[None, :, None, None].expand(1, 3, 64, 64).clone()


def test_the_border_is_read_whatever_is_in_the_middle():
    picture = plain(10, 20, 30)
    picture[:, :, 5:59, 5:59] = 1
    torch.testing.assert_close(
        border_colour(picture), torch.tensor([[10.0, 20.0, 30.0]]), atol=1e-3, rtol=0
    )
    # A drawing that touches less than half of the border does not move its median.
    picture[:, :, :3, 10:50] = 1
    torch.testing.assert_close(
        border_colour(picture), torch.tensor([[10.0, 20.0, 30.0]]), atol=1e-3, rtol=0
    )


def test_every_background_is_on_the_palette():
    pictures = torch.cat([plain(*colour) for colour in BACKGROUNDS.values()])
    assert palette_distance(pictures).max() < 1e-3


def test_the_distance_is_euclidean_in_levels():
    red, green, blue = BACKGROUNDS["teal"]
    pictures = torch.cat([plain(red + 3, green - 4, blue), plain(red, green, blue + 26)])
    distances = palette_distance(pictures)
    torch.testing.assert_close(distances, torch.tensor([5.0, 26.0]), atol=1e-2, rtol=0)
    assert (distances > OFF_PALETTE).tolist() == [False, True]


def test_mixtures_of_two_backgrounds_are_off_but_for_five_that_make_a_third():
    mixtures = [
        plain(*[(a + b) / 2 for a, b in zip(one, other, strict=True)])
        for one, other in combinations(BACKGROUNDS.values(), 2)
    ]
    distances = palette_distance(torch.cat(mixtures))
    assert len(distances) == 66
    assert int((distances <= OFF_PALETTE).sum()) == 5


def test_a_plain_picture_has_no_detail():
    assert high_pass_energy(plain(200, 20, 90)).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_wave_loses_what_the_gaussian_takes(period: int):
    """A symmetric filter leaves the sum of its weights times cosines of a wave."""
    omega = 2 * math.pi / period
    weights = [math.exp(-(j**2) / 2) for j in range(-3, 4)]
    left = sum(w * math.cos(omega * j) for w, j in zip(weights, range(-3, 4), strict=True))
    left /= sum(weights)
    # About what the whole Gaussian leaves.
    assert left == pytest.approx(math.exp(-(omega**2) / 2), abs=0.01)
    # So wide that its edges, where the wave is cut off, count for less than a percent.
    wave = torch.sin(omega * torch.arange(4096))
    picture = wave.expand(1, 3, 16, 4096).contiguous()
    assert high_pass_energy(picture).item() == pytest.approx(0.5 * (1 - left) ** 2, rel=0.01)
    # The same along the other side of the picture.
    turned = picture.transpose(2, 3).contiguous()
    torch.testing.assert_close(high_pass_energy(turned), high_pass_energy(picture))


def test_each_picture_is_measured_by_itself():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    alone = torch.cat([high_pass_energy(picture[None]) for picture in pictures])
    torch.testing.assert_close(high_pass_energy(pictures), alone)
