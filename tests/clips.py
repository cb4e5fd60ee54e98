"""Small models of clips: nano with a motion module of random weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from twostep.contract import student_name
from twostep.formats.motion_files import MotionConfig
from twostep.models.bundle import Bundle
from twostep.models.motion import load_pictures, motion_contract, with_motion
from twostep.models.saving import save_bundle, save_student
from twostep.networks.motion import MotionModule


def clips_of(
    pictures: Sequence[Bundle], network: MotionModule | None = None, frames: int = 3
) -> Bundle:
    """Return a model of clips of at most 8 frames; a fresh module moves nothing yet."""
    shape = MotionConfig.on(pictures[0].denoiser.network.config, max_frames=8)
    contract = motion_contract(pictures[0].contract, "clips", recipe="none", version="0")
    return with_motion(
        pictures, network or MotionModule(shape), contract, frames=frames, frames_per_second=5.0
    )


def save_clip_model(path: Path) -> Path:
    """Write a model of clips with a student of two steps, and return its folder."""
    torch.manual_seed(0)
    bundle = clips_of(load_pictures(["nano"]))
    for name, parameter in bundle.denoiser.network.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_bundle(bundle, path)
    contract = replace(
        bundle.contract,
        name=student_name("clips", 2),
        role="student",
        steps=2,
        trained_times=(500, 1000),
        guidance=1.0,
    )
    weights = {key: 2 * value for key, value in bundle.denoiser.network.state_dict().items()}
    save_student(weights, contract, path)
    return path
