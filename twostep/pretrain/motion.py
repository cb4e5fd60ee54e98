"""A teacher of clips: a motion module that learns on a frozen picture teacher.

As in arXiv 2307.04725: the picture model stays as it is, and the module learns from clips by the
noise that it has to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from twostep.formats.motion_files import MotionConfig
from twostep.models.bundle import Bundle
from twostep.models.motion import load_pictures, motion_contract, picture_unet, with_motion
from twostep.networks.motion import MotionModule
from twostep.pretrain.clips import MovingDrawings
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.loop import silent, train_network
from twostep.pretrain.teacher import DenoiserSettings, noise_loss_on_latents
from twostep.training.loop import OnIteration
from twostep.training.run_folder import RunFolder


class MotionSettings(DenoiserSettings):
    """The recipe of a motion module."""

    part: Literal["motion"] = "motion"
    model: str = Field("nano", description="the picture teacher that it goes on")
    further_models: tuple[str, ...] = Field(
        (),
        description="picture models of the same shape that students of it are distilled on too; "
        "their text encoders and autoencoders are not used",
    )
    name: str = Field("nano-motion", description="what the teacher of clips is called")
    frames: int = Field(16, ge=2, description="of the clips that it learns from")
    max_frames: int = Field(32, ge=2, description="the longest clip that it can draw")
    frames_per_second: float = Field(8.0, gt=0, description="of the clips that it draws")
    heads: int = Field(8, gt=0, description="of each attention along time")
    guidance: float | None = Field(
        None, ge=1, description="that the teacher recommends; the picture teacher's if not given"
    )
    sample_prompts: tuple[str, ...] = Field(
        ("a 3d fox on a blue background, spinning",),
        min_length=1,
        description="drawn at every checkpoint",
    )
    sample_seeds: tuple[int, ...] = Field((0,), min_length=1, description="of each of these")


def new_motion_teacher(settings: MotionSettings, *, recipe: str, version: str) -> Bundle:
    """Return a picture teacher with a fresh motion module, which draws still clips so far.

    Args:
        settings: the recipe.
        recipe: its name, for the contract.
        version: of twostep, for the contract.

    Raises:
        ModelError: the picture model cannot be had, or takes no motion module.
    """
    pictures = load_pictures([settings.model, *settings.further_models])
    torch.manual_seed(settings.loop.seed)
    shape = MotionConfig.on(
        picture_unet(pictures[0]).config,
        heads=settings.heads,
        max_frames=max(settings.frames, settings.max_frames),
    )
    contract = motion_contract(pictures[0].contract, settings.name, recipe=recipe, version=version)
    if settings.guidance is not None:
        contract = replace(contract, guidance=settings.guidance)
    return with_motion(
        pictures,
        MotionModule(shape),
        contract,
        frames=settings.frames,
        frames_per_second=settings.frames_per_second,
    )


def train_motion(
    drawings: DrawingSet,
    teacher: Bundle,
    settings: MotionSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train a motion module, where it is, on clips of drawings that move.

    Args:
        drawings: what moves.
        teacher: of which the motion module alone is trained, in place.
        settings: the recipe.
        folder: the run's folder.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint with the averaged weights in the teacher.
    """
    denoiser = teacher.denoiser
    denoiser.network.requires_grad_(True)
    denoiser.checkpoint_gradients(settings.gradient_checkpointing)
    loss = noise_loss_on_latents(
        denoiser,
        MovingDrawings(drawings, teacher),
        teacher.text,
        batch_size=settings.loop.batch_size,
        size=teacher.contract.sizes[0],
        snr_limit=settings.snr_limit,
        snr_floor=settings.snr_floor,
    )
    train_network(
        denoiser.network,
        loss,
        settings.loop,
        folder,
        name="motion",
        on_iteration=on_iteration,
        on_checkpoint=on_checkpoint,
    )
