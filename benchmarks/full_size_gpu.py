"""A recipe for SDXL on a GPU, at SDXL's full size with random weights: what its plan says beside
what is measured.

    python benchmarks/full_size_gpu.py sdxl-lora-24gb [-o stages.0.batch_size=2] [--pixels 1024]

Every stage is trained for a few iterations by the very trainer, on noise in the shapes of SDXL's
latents and texts; what is trained for so short a time is not looked at. Measured is the peak of
torch's allocator on the device, so neither the context of the driver (about half a GiB) nor what
the allocator keeps in reserve.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from full_size_distill import GIB, SDXL, RandomLatents, random_sdxl
from full_size_generate import ENCODERS, TOKENS, VOCABULARY, random_vae
from transformers import CLIPTextConfig

from twostep.diffusion import VariancePreserving
from twostep.distill import DistillRecipe
from twostep.distill.chain import prepared_stages
from twostep.distill.plan import plan
from twostep.distill.trainer import StageTrainer
from twostep.formats.locate import CONTRACT_FILE, WEIGHTS
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.training.device import find_device
from twostep.training.loop import Randomness
from twostep.training.recipe import load_recipe


def write_configs(folder: Path, pixels: int) -> Path:
    """Write a model folder with the configs of SDXL's networks and no weights; nano's tokenizers,
    at SDXL's length.
    """
    shutil.copytree(
        WEIGHTS / "nano", folder, ignore=shutil.ignore_patterns("*.safetensors", "students")
    )
    (folder / "unet" / "config.json").write_text(SDXL.read_text())
    random_vae().save_config(folder / "vae")
    for number, name in enumerate(("", "_2")):
        CLIPTextConfig(**ENCODERS[number], vocab_size=VOCABULARY).save_pretrained(
            folder / f"text_encoder{name}"
        )
        path = folder / f"tokenizer{name}" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": TOKENS}))
    contract = replace(load_bundle("nano").contract, name="sdxl", sizes=((pixels, pixels),))
    (folder / CONTRACT_FILE).write_text(contract.to_json())
    return folder


def random_teacher(device: torch.device, precision: str) -> Bundle:
    """Return a model with SDXL's UNet and autoencoder on the device; its text encoders, unused
    here, are nano's.
    """
    network = random_sdxl(device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    codec = ImageCodec(random_vae().to(device))
    return replace(
        load_bundle("nano"),
        denoiser=Denoiser(SdxlUnet(network), VariancePreserving.scaled_linear()),
        codec=codec,
    )


def main(
    recipe: Annotated[
        str, typer.Argument(help="A recipe that trains from a cache.")
    ] = "sdxl-lora-24gb",
    override: Annotated[
        list[str] | None, typer.Option("-o", help="Another value for a key of the recipe.")
    ] = None,
    pixels: Annotated[int, typer.Option(help="Side of the pictures.")] = 1024,
    iterations: Annotated[
        int, typer.Option(help="Iterations of each stage; the first is not timed.")
    ] = 3,
    device: Annotated[str, typer.Option(help="Where to measure; none only plans.")] = "cuda",
    planned: Annotated[bool, typer.Option(help="Also say what the plan says.")] = True,
) -> None:
    """Print the planned and the measured peak of every stage, and its seconds an iteration."""
    settings = load_recipe(recipe, DistillRecipe, override or [])
    if planned:
        with tempfile.TemporaryDirectory() as folder:
            model = write_configs(Path(folder) / "sdxl", pixels)
            changed = settings.model_copy(update={"model": str(model), "device": "cuda"})
            for stage in plan(changed).stages:
                typer.echo(f"planned  {stage.stage.name}: {stage.peak / GIB:.2f} GiB")
    if device == "none":
        return
    where = find_device(device)
    typer.echo(f"device: {torch.cuda.get_device_name(where)}, torch {torch.__version__}")
    teacher = random_teacher(where, settings.base_precision)
    source = RandomLatents(pixels)
    for prepared in prepared_stages(settings, teacher):
        gc.collect()
        trainer = StageTrainer(prepared.stage, source, prepared.teacher, prepared.student)
        seconds = []
        for iteration in range(iterations):
            if iteration == 1:
                torch.cuda.reset_peak_memory_stats(where)
            began = time.perf_counter()
            figures = trainer.iterate(iteration, Randomness.at(0, iteration))
            torch.cuda.synchronize(where)
            seconds.append(time.perf_counter() - began)
        trainer.remove_roles()
        peak = torch.cuda.max_memory_allocated(where) / GIB
        values = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
        typer.echo(
            f"measured {prepared.stage.name}: {peak:.2f} GiB, "
            f"{min(seconds[1:]):.2f} s an iteration; {values}"
        )
        del trainer, prepared


if __name__ == "__main__":
    typer.run(main)
