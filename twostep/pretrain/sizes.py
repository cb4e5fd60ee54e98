"""The sizes of the built-in models: every number that makes one model larger than another."""

from dataclasses import dataclass
from typing import Literal

from twostep.training.recipe import RecipeError


@dataclass(frozen=True)
class ModelSize:
    """What a built-in model of the SDXL family is made of.

    Attributes:
        name: what recipes and contracts call the size.
        pixels: side of its pictures, which are square.
        latent_channels: channels of its latents.
        vae_channels: widths of the autoencoder, one per resolution; each but the first halves the
            picture.
        encoder_blocks: blocks of the autoencoder's encoder, per resolution.
        decoder_blocks: the same of its decoder, from the lowest resolution to the highest.
        unet_channels: widths of the UNet, one per resolution; all but the first attend to text.
        unet_heads: attention heads per resolution.
        unet_layers: residual blocks per resolution.
        transformer_layers: transformer layers per attention block, per resolution.
        norm_groups: groups of the UNet's normalisations.
        text_widths: widths of the two text encoders.
        text_layers: layers of the two text encoders.
        text_heads: attention heads of either text encoder.
        max_tokens: tokens of a caption, start and end included.
        time_id_width: width of the embedding of one number of the micro-conditioning.
        learns_from: drawings, of which one is on every picture, or scenes of one or two of them.
    """

    name: str
    pixels: int
    latent_channels: int
    vae_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_layers: int
    transformer_layers: tuple[int, ...]
    norm_groups: int
    text_widths: tuple[int, int]
    text_layers: tuple[int, int]
    text_heads: int
    max_tokens: int
    time_id_width: int
    learns_from: Literal["drawings", "scenes"] = "drawings"

    @property
    def latent_pixels(self) -> int:
        """Side of the latents."""
        num_halvings = len(self.vae_channels) - 1
        return int(self.pixels // 2**num_halvings)


NANO = ModelSize(
    name="nano",
    pixels=64,
    latent_channels=4,
    vae_channels=(48, 48, 48),
    encoder_blocks=(1, 1, 3),
    decoder_blocks=(3, 1, 1),
    unet_channels=(48, 96, 160),
    unet_heads=(2, 3, 5),
    unet_layers=1,
    transformer_layers=(1, 1, 1),
    norm_groups=16,
    text_widths=(64, 96),
    text_layers=(2, 3),
    text_heads=4,
    max_tokens=20,
    time_id_width=16,
)
"""64x64 pictures, latents of 4 channels on a 16x16 grid, a UNet of 7.3 million parameters.

It trains and draws on a laptop's CPU. Compared with SDXL: one layer a block instead of two, one
transformer layer instead of two and ten, a vocabulary of its own, and the tiny autoencoder class,
which without norms learns faster and draws in milliseconds.
"""

MINI = ModelSize(
    name="mini",
    pixels=256,
    latent_channels=4,
    vae_channels=(48, 48, 48, 48),
    encoder_blocks=(1, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 1),
    unet_channels=(80, 160, 256),
    unet_heads=(2, 4, 8),
    unet_layers=1,
    transformer_layers=(1, 1, 1),
    norm_groups=16,
    text_widths=(128, 192),
    text_layers=(4, 4),
    text_heads=4,
    max_tokens=32,
    time_id_width=32,
    learns_from="scenes",
)
"""256x256 pictures, latents as SDXL's (4 channels, an eighth of the side), a UNet of 19.2 million
parameters.

It trains on one GPU within minutes, and draws on a laptop's CPU.
"""

SIZES = {size.name: size for size in (NANO, MINI)}
"""The sizes that a recipe can name."""


def find_size(name: str) -> ModelSize:
    """Return the size of a name; RecipeError lists those there are."""
    if name not in SIZES:
        raise RecipeError(f'size = "{name}" is none of {", ".join(SIZES)}; give one of these.')
    return SIZES[name]
