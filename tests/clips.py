"""Small models of clips: nano with a motion module of random weights."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twostep.contract import Contract, student_name
from twostep.formats.checkpoint import read_contracts
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
    weights = {key: 2 * value for key, value in bundle.denoiser.network.state_dict().items()}
    save_student(weights, _of_two_steps(bundle.contract), path)
    return path


def save_lora_student(
    model: Path, weights: Mapping[str, Tensor], apart: Path, *, rank: int = 2
) -> Path:
    """Write a LoRA that makes a student of two steps of a model of clips, without its others.

    Returns its file, in the folder of students of a copy of the model.
    """
    others = shutil.ignore_patterns("students")
    folder = Path(shutil.copytree(model, apart / model.name, ignore=others))
    contract = _of_two_steps(read_contracts(folder)[0])
    return save_student(weights, replace(contract, lora_rank=rank, lora_alpha=float(rank)), folder)


def _of_two_steps(teacher: Contract) -> Contract:
    return replace(
        teacher,
        name=student_name("clips", 2),
        role="student",
        steps=2,
        trained_times=(500, 1000),
        guidance=1.0,
    )
