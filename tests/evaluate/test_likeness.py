"""Looks are what they say: colour and detail, so that blur and a tint are seen, and what is shown
where is not.
"""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.likeness import looks


@pytest.fixture
def pictures() -> torch.Tensor:
    """Forty pictures of 32x48 pixels with detail of every size."""
    noise = torch.randn(40, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    coarse = interpolate(
        torch.randn(40, 3, 4, 6, generator=torch.Generator().manual_seed(1)), size=(32, 48)
    )
    return (0.2 * noise + 0.4 * coarse).clamp(-1, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(fit_features(looks(a)), fit_features(looks(b)))


def test_mean_colour_and_the_detail_of_every_size(pictures: torch.Tensor) -> None:
    seen = looks(pictures)
    assert seen.shape == (40, 3 * (1 + 4))  # 32 pixels are halved four times, down to 2
    torch.testing.assert_close(seen[:, :3], pictures.mean(dim=(2, 3)))
    # The bands of the pyramid share the variance out, all but that of the last mean pixels.
    rest = avg_pool2d(pictures, 16).mean(dim=(2, 3))
    whole = (
        (pictures - interpolate(avg_pool2d(pictures, 16), size=(32, 48))).square().mean(dim=(2, 3))
    )
    torch.testing.assert_close(seen[:, 3:].square().unflatten(1, (4, 3)).sum(dim=1), whole)
    torch.testing.assert_close(rest, seen[:, :3])


def test_blur_and_a_tint_are_seen_and_a_mirror_is_not(pictures: torch.Tensor) -> None:
    blurred = interpolate(avg_pool2d(pictures, 2), size=(32, 48))
    tinted = pictures + torch.tensor([0.1, 0, 0])[:, None, None]
    assert distance(pictures, pictures.flip(3)) < 1e-9 < 1e-3 < distance(pictures, tinted)
    assert distance(pictures, blurred) > distance(pictures, (pictures + blurred) / 2) > 1e-3
