"""A tiny decoder that needs no training: nano's own, a little darker, by TAESD's names."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from twostep.formats.locate import WEIGHTS
from twostep.formats.tiny_decoder import DECODER_FILE
from twostep.models.loading import load_bundle

DARKER = 0.02
"""By how much, of the way from black to white: five levels."""


def taesd_weights(vae: AutoencoderTiny) -> dict[str, torch.Tensor]:
    """The decoder as `taesdxl_decoder.safetensors` names it: one number further each."""
    renamed = {}
    for name, value in vae.decoder.state_dict().items():
        _, number, rest = name.split(".", 2)
        renamed[f"{int(number) + 1}.{rest}"] = value.clone().contiguous()
    return renamed


def nano_with_decoder(folder: Path) -> Path:
    """nano as a model folder that has a tiny decoder, and nothing else of its own."""
    plain_nano(folder)
    weights = taesd_weights(load_bundle("nano").codec.vae)
    last = max(int(name.split(".")[0]) for name in weights)
    weights[f"{last}.bias"] -= DARKER
    save_file(weights, folder / DECODER_FILE)
    return folder


def plain_nano(folder: Path) -> Path:
    """nano as a model folder without a tiny decoder."""
    ignored = shutil.ignore_patterns(DECODER_FILE)
    shutil.copytree(WEIGHTS / "nano", folder, ignore=ignored, copy_function=os.symlink)
    return folder
