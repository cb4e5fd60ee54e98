"""The discriminator of decoders: it judges patches of pictures, as in section 3.2.2 of
arXiv 1611.07004.
"""

from jaxtyping import Float
from torch import Tensor, nn

_SLOPE = 0.2
_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Four convolutions, of which each logit sees a patch of 34 pixels a side."""

    def __init__(self, width: int) -> None:
        """Make fresh weights; the first layer has `width` channels, the others twice as many."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
            nn.Conv2d(2 * width, 1, 4, padding=1),
        )

    def forward(
        self, pictures: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch 1 rows columns"]:
        """Return a logit for every patch, high for what the full decoder made."""
        logits: Tensor = self.layers(pictures)
        return logits


def _block(in_channels: int, out_channels: int, *, stride: int) -> tuple[nn.Module, ...]:
    groups = _GROUPS if out_channels % _GROUPS == 0 else 1
    return (
        nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=False),
        nn.GroupNorm(groups, out_channels),
        nn.LeakyReLU(_SLOPE),
    )
