"""Two iterations of distillation on the real SDXL architecture, on a CPU with less memory than
three copies take.

    python benchmarks/full_size_distill.py [--pixels 256] [--iterations 2]

The weights are random, for the real ones are not needed to know memory and time. One frozen base
carries a teacher, a student and a discriminator as adapters, as the recipes of LoRA stages have it;
batch 1, fp32, blocks recomputed in the backward pass. Prints seconds per iteration and the peak of
resident memory, beside the arithmetic for three networks.
"""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from twostep.diffusion import VariancePreserving
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.networks.adapters import add_lora
from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.training.loop import Randomness

SDXL = Path(__file__).with_name("sdxl_unet.json")
TINY = {
    "block_out_channels": [32, 32, 64],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 1, 2],
    "layers_per_block": 1,
}
ENCODER_PARAMETERS = 1_243_367_040
GIB = 2**30
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class RandomLatents:
    """A source of noise in the shapes of SDXL's latents and embeddings."""

    def __init__(self, pixels: int) -> None:
        """Remember the size of the pictures that these latents would be of."""
        self.pixels = pixels

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return `count` latents and embeddings."""
        side = self.pixels // 8
        latents = torch.randn(count, 4, side, side, generator=tensors)
        text = torch.randn(count, 77, 2048, generator=tensors)
        pooled = torch.randn(count, 1280, generator=tensors)
        return latents, Conditioning(text, pooled, image_sizes(count, self.pixels, self.pixels))

    def empty(self, like: Conditioning) -> Conditioning:
        """Return embeddings of zeros."""
        return Conditioning(torch.zeros_like(like.text), torch.zeros_like(like.pooled), like.sizes)


def random_sdxl(device: torch.device | str = "cpu", *, tiny: bool = False) -> UNet2DConditionModel:
    """Return the architecture with small random weights, made in place: 2,567,463,684 parameters,
    9.6 GiB in fp32. With `tiny` it is as narrow and as shallow as can be, to rehearse with.
    """
    config = json.loads(SDXL.read_text())
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config({**config, **(TINY if tiny else {})})
    return filled(network, device)


def filled(network: NetworkT, device: torch.device | str = "cpu") -> NetworkT:
    """Give a network without memory small random weights; torch's own first weights would take
    minutes.
    """
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            normalises = isinstance(module, nn.GroupNorm | nn.LayerNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif normalises:
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, 0.02, generator=generator)
            for name, buffer in module.named_buffers(recurse=False):
                assert name == "position_ids", f"{name} would stay as the memory was found"
                buffer.copy_(torch.arange(buffer.shape[-1]))
    return network.requires_grad_(False).eval()


def peak() -> float:
    """Return the peak of resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main(
    pixels: Annotated[int, typer.Option(help="Side of the pictures.")] = 256,
    iterations: Annotated[int, typer.Option(help="Iterations of each of the two stages.")] = 2,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 64,
) -> None:
    """Run iterations of the conditional and of the unconditional stage, 8 steps from 32."""
    began = time.monotonic()
    network = random_sdxl()
    total = sum(parameter.numel() for parameter in network.parameters())
    typer.echo(
        f"base: {total:,} parameters, {time.monotonic() - began:.0f} s, peak {peak():.1f} GiB"
    )
    backbone = SdxlUnet(network)
    schedule = VariancePreserving.scaled_linear()
    add_lora(network, "32-step", rank=rank)
    lora = add_lora(network, "student", rank=rank)
    backbone.checkpoint_gradients(True)
    teacher = Denoiser(backbone, schedule, lora="32-step")
    student = Denoiser(backbone, schedule, lora="student")
    for objective in ("conditional", "unconditional"):
        stage = Stage(
            student_steps=8,
            teacher_steps=32,
            method={"name": "lightning", "objective": objective, "discriminator_lora": True},
            lora_rank=rank,
            iterations=iterations,
            batch_size=1,
            learning_rate=1e-6,
            precision="fp32",
            gradient_checkpointing=True,
        )
        lora.requires_grad_(True)
        trainer = StageTrainer(stage, RandomLatents(pixels), teacher, student)
        for iteration in range(iterations):
            began = time.monotonic()
            figures = trainer.iterate(iteration, Randomness.at(0, iteration))
            seconds = time.monotonic() - began
            values = " ".join(f"{key} {value:.4g}" for key, value in figures.items())
            typer.echo(
                f"{objective} {iteration + 1}: {seconds:.0f} s, peak {peak():.1f} GiB; {values}"
            )
        trainer.remove_roles()
    # Weights, gradients and two moments of Adam for what is trained; weights alone for what is not.
    separate = 4 * (total + 4 * total + 4 * ENCODER_PARAMETERS) / GIB
    frozen = 4 * (2 * total + ENCODER_PARAMETERS) / GIB
    typer.echo(f"measured peak: {peak():.1f} GiB")
    typer.echo(
        f"three networks, the weights alone: {frozen:.1f} GiB; "
        f"student and discriminator trained: {separate:.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
