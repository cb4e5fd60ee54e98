"""Folders of pictures as `twostep generate` writes them, of any pictures and prompts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from twostep.contract import Contract
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import Request, Result


def write_drawn(folder: Path, pictures: torch.Tensor, prompts: Sequence[str]) -> Path:
    """Write pictures [count, 3, side, side] in -1..1, each with its prompt; return the folder."""
    side = pictures.shape[-1]
    contract = Contract(
        name="drawn-by-hand",
        role="teacher",
        steps=32,
        trained_times=(),
        prediction_type="eps",
        spacing="trailing",
        guidance=4.0,
        sizes=((side, side),),
        base="none",
        lora_rank=None,
        lora_alpha=None,
        recipe="none",
        version="0",
    )
    levels = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    for seed, (level, prompt) in enumerate(zip(levels, prompts, strict=True)):
        request = Request(prompt, seed=seed, steps=32, guidance=4.0, width=side, height=side)
        image = Image.fromarray(level.numpy())
        save_images(Result([image], [seed], {"denoise": 1.0}, [], contract, request), folder)
    return folder
