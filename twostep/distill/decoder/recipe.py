"""Recipes of tiny decoders: they have a table `[decoder]` where others have stages."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import Field, PositiveInt

from twostep.distill.decoder.method import DecoderDistillation
from twostep.distill.recipe import RunRecipe, TrainedStage
from twostep.formats.tiny_decoder import TinyLayout
from twostep.media.image import ImageCodec
from twostep.training.recipe import ANY_TIME, WHILE_RUNNING, RecipeError, recipe_text

_TABLE = "decoder"


class DecoderStage(TrainedStage):
    """How large the decoder is, and how it is trained."""

    width: int = Field(64, gt=0, description="channels of all layers; TAESD has 64")
    blocks: tuple[int, ...] = Field(
        (3, 3, 3, 1),
        min_length=1,
        description="blocks at every resolution, from the latents' to the picture's",
    )
    crop: int | None = Field(
        None,
        gt=0,
        description="side of the piece that is cut out of latents; all of them if not given",
        json_schema_extra=WHILE_RUNNING,
    )
    jitter: float = Field(
        0.0,
        ge=0,
        description="deviation of the noise added to latents, as a denoiser's are not exact; both "
        "decoders are shown it",
        json_schema_extra=WHILE_RUNNING,
    )
    edge_weight: float = Field(
        0.5,
        ge=0,
        description="weight of the L1 on differences of neighbouring pixels, beside that on pixels",
        json_schema_extra=WHILE_RUNNING,
    )
    adversarial_weight: float = Field(
        0.02,
        ge=0,
        description="weight of the patch discriminator's verdict; 0 for none",
        json_schema_extra=WHILE_RUNNING,
    )
    adversarial_from: int = Field(
        0,
        ge=0,
        description="iterations before the discriminator comes in",
        json_schema_extra=WHILE_RUNNING,
    )
    discriminator_width: PositiveInt = Field(
        32, description="channels of the discriminator's first layer"
    )
    discriminator_learning_rate: float | None = Field(
        None,
        gt=0,
        description="its peak rate; the decoder's if not given",
        json_schema_extra=WHILE_RUNNING,
    )

    @property
    def name(self) -> str:
        """The stage's name in the log, the checkpoints and the samples."""
        return _TABLE

    def make_method(self) -> DecoderDistillation:
        """Return what is done in every iteration."""
        return DecoderDistillation(self)

    def layout(self, codec: ImageCodec, model: str) -> TinyLayout:
        """Return the decoder's size for a codec; RecipeError where it makes other pictures."""
        channels, *_ = codec.latent_shape(64, 64)
        layout = TinyLayout(channels, self.width, self.blocks)
        if layout.pixels_per_latent != codec.pixels_per_latent:
            raise RecipeError(
                f"decoder.blocks has {len(self.blocks)} resolutions, which makes "
                f"{layout.pixels_per_latent} pixels a side of every latent, and {model} has "
                f"{codec.pixels_per_latent}: give {codec.pixels_per_latent.bit_length()} numbers."
            )
        return layout


class DecoderRecipe(RunRecipe):
    """A tiny decoder for the autoencoder of a model."""

    num_samples: int = Field(
        8,
        ge=2,
        description="latents that are shown at every checkpoint, decoded by both",
        json_schema_extra=ANY_TIME,
    )
    decoder: DecoderStage = Field(description="the decoder and its training")

    @property
    def trained_stages(self) -> tuple[DecoderStage, ...]:
        """The decoder alone."""
        return (self.decoder,)


def is_decoder_recipe(path: Path) -> bool:
    """Tell whether a file is the recipe of a decoder; False also for what is no TOML."""
    try:
        return _TABLE in tomllib.loads(recipe_text(path))
    except (tomllib.TOMLDecodeError, RecipeError, OSError):
        return False
