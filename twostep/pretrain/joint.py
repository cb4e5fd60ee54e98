"""A teacher that learns together with its text encoders, on encoded scenes.

Nano's encoders learn to match captions with pictures first and are then frozen. Here the error of
the predicted noise is all that teaches them, so they learn what the pictures need of a caption:
which of two things is on the left, and which style is whose.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twostep.diffusion.shapes import sent
from twostep.models.bundle import Bundle
from twostep.models.sdxl import text_encoders
from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.pretrain.encoded_scenes import EncodedScenes
from twostep.pretrain.loop import BLOCKS, silent, train_network
from twostep.pretrain.scene_captions import tokens_of
from twostep.pretrain.teacher import DenoiserSettings, noise_loss
from twostep.training.compiling import compile_blocks
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder


class JointSettings(DenoiserSettings):
    """The recipe of a teacher with its text encoders."""

    part: Literal["joint"] = "joint"
    autoencoder: Path = Field(Path("runs/mini-vae/model"), description="folder that holds `vae`")
    scenes: int = Field(200_000, gt=0, description="scenes that are composed and encoded once")
    captions: int = Field(3, gt=0, description="captions of each scene")
    caption_dropout: float = Field(
        0.06, ge=0, lt=1, description="share of examples whose caption is taken away"
    )
    guidance: float = Field(3.0, ge=1, description="guidance scale that the teacher recommends")
    compile: bool = Field(
        False, description="compile the blocks: half a minute at first, less for every iteration"
    )
    sample_prompts: tuple[str, ...] = Field(
        ("a 3d red apple on a blue background",),
        min_length=1,
        description="prompts of the sample sheets",
    )
    sample_seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="seeds of each of them")


def train_joint(
    teacher: Bundle,
    scenes: EncodedScenes,
    settings: JointSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train a teacher's UNet and its text encoders, in place; they end with averaged weights.

    Args:
        teacher: on the scenes' device; its autoencoder is not trained.
        scenes: what it learns from.
        settings: the recipe.
        folder: the run's folder.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint with the averaged weights in the teacher.
    """
    networks = nn.ModuleDict(teacher.parts)
    networks.requires_grad_(True).train()
    if settings.gradient_checkpointing:
        teacher.denoiser.checkpoint_gradients(True)
        for encoder in text_encoders(teacher).encoders:
            encoder.gradient_checkpointing_enable()
    if settings.compile:
        # Convolutions in bfloat16 want it, and norms, which do not, are compiled with them.
        teacher.denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compile_blocks(networks, BLOCKS)
    train_network(
        networks,
        Loss(teacher, scenes, settings),
        settings.loop,
        folder,
        name="joint",
        on_iteration=on_iteration,
        on_checkpoint=on_checkpoint,
    )
    networks.requires_grad_(False).eval()


class Loss:
    """The loss of an iteration: the error of the predicted noise, through the text encoders.

    Examples, captions and times are drawn on the CPU, where they are numbers; the noise, which is
    as large as the latents, on the device.
    """

    def __init__(self, teacher: Bundle, scenes: EncodedScenes, settings: JointSettings) -> None:
        """Take what an iteration needs, and bring what is the same in all of them to the device."""
        self.denoiser = teacher.denoiser
        self.text = text_encoders(teacher)
        self.scenes = scenes
        self.settings = settings
        width, height = teacher.contract.sizes[0]
        self._sizes = image_sizes(1, width, height).to(scenes.device)
        self._empty = tokens_of([""], self.text.tokenizers[0]).long().to(scenes.device)

    def __call__(self, iteration: int, randomness: Randomness) -> Tensor:
        """Return the mean weighted error of this process's share of the batch."""
        batch_size = self.settings.loop.batch_size
        share = world().share(batch_size)
        generator = randomness.tensors
        device = self.scenes.device
        x0, tokens = self.scenes.draw(batch_size, generator)
        is_dropped = torch.rand(batch_size, 1, generator=generator) < self.settings.caption_dropout
        tokens = torch.where(sent(is_dropped, device), self._empty, tokens)[share]
        top = int(self.denoiser.schedule.top)  # SDXL's times are integers
        t = torch.randint(1, top + 1, (batch_size,), generator=generator)[share]
        eps = randomness.normal(x0.shape, device)[share]
        text, pooled = self.text.encode_tokens(tokens, tokens)
        conditioning = Conditioning(text, pooled, self._sizes.expand(len(text), -1))
        return noise_loss(
            self.denoiser,
            x0[share],
            conditioning,
            t,
            eps,
            snr_limit=self.settings.snr_limit,
            snr_floor=self.settings.snr_floor,
        )
