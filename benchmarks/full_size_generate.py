"""Pictures from the real SDXL architecture in fp32 on a CPU: memory, and where the time goes.

    python benchmarks/full_size_generate.py draw [--pixels 512] [--steps 2]
    python benchmarks/full_size_generate.py write-cache runs/hub
    HF_HUB_CACHE=runs/hub HF_HUB_OFFLINE=1 python benchmarks/full_size_generate.py draw \\
        --model ByteDance/SDXL-Lightning

The weights are random, for the real ones are not needed to know memory and time; the networks,
their sizes and their files are the real ones, and so is the contract. `write-cache` lays out what
the hub's library would have downloaded: the 2-step UNet alone in 16 bits, 5.1 GB, and the parts of
the base that it needs.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from full_size_distill import GIB, SDXL, filled, peak, random_sdxl
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.diffusion import VariancePreserving
from twostep.formats.contracts import official_contract
from twostep.formats.lightning import LIGHTNING, official_file
from twostep.formats.locate import INDEX_FILE, SDXL_BASE
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.text.clip import TextEncoders

LIMIT_GIB = 20
VOCABULARY = 49_408
TOKENS = 77
ENCODERS: tuple[dict[str, Any], dict[str, Any]] = (
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
)
"""What SDXL's two text encoders are, as their configs on the hub have it."""

app = typer.Typer(pretty_exceptions_enable=False)


def random_text(device: torch.device | str = "cpu") -> TextEncoders:
    """Return SDXL's text encoders, 818 million parameters; their tokenizers know letters alone."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"unused{number}" for number in range(VOCABULARY - len(tokens) - 2)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizers = [
        CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS) for _ in ENCODERS
    ]
    configs = [
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS,
            eos_token_id=VOCABULARY - 1,
            **sizes,
        )
        for sizes in ENCODERS
    ]
    with torch.device("meta"):
        encoders = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
    return TextEncoders(
        (tokenizers[0], tokenizers[1]),
        (filled(encoders[0], device), filled(encoders[1], device)),
        zeros_for_empty=True,
    )


def random_vae(device: torch.device | str = "cpu") -> AutoencoderKL:
    """Return SDXL's autoencoder, 84 million parameters."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=1024,
            scaling_factor=0.13025,
        )
    return filled(vae, device)


def random_bundle(steps: int, device: torch.device | str = "cpu") -> Bundle:
    """Return the student of so many steps as if its official file had been loaded on a device."""
    contract = official_contract(str(official_file(LIGHTNING[0], steps)))
    assert contract is not None
    vae: Any = random_vae(device)
    denoiser = Denoiser(
        SdxlUnet(random_sdxl(device)), VariancePreserving.scaled_linear(), contract.prediction_type
    )
    codec = ImageCodec(vae.to(memory_format=torch.channels_last))
    return Bundle(denoiser, codec, random_text(device), contract)


@app.command()
def draw(
    model: Annotated[
        str, typer.Option(help="Load this; nothing for random weights made in memory.")
    ] = "",
    pixels: Annotated[int, typer.Option(help="Side of the picture.")] = 512,
    steps: Annotated[int, typer.Option(help="Which student.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Keep the picture here.")] = None,
) -> None:
    """Draw one picture, and report the seconds of each stage and the peak of resident memory."""
    began = time.monotonic()
    bundle = load_bundle(model, steps=steps) if model else random_bundle(steps)
    networks = (*bundle.parts.values(), bundle.codec.vae)
    counts = [num_parameters(network) for network in networks]
    typer.echo(f"{bundle.contract.name}: {' + '.join(f'{count:,}' for count in counts)} parameters")
    typer.echo(f"ready: {time.monotonic() - began:.0f} s, peak {peak():.1f} GiB")
    bundle = replace(bundle, contract=replace(bundle.contract, sizes=((pixels, pixels),)))
    reached = []
    processor = time.process_time()
    result = generate(
        bundle,
        Request("a 3d red apple on a blue background", seed=7),
        on_step=lambda progress: reached.append(f"step {progress.num_done}: peak {peak():.1f} GiB"),
    )
    typer.echo("\n".join(reached))
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    typer.echo(f"{pixels} px, {steps} steps, {torch.get_num_threads()} threads: {stages}")
    typer.echo(f"processor time of all threads: {time.process_time() - processor:.0f} s")
    typer.echo(f"measured peak: {peak():.2f} GiB (wanted: under {LIMIT_GIB})")
    if out is not None:
        result.images[0].save(out)
    raise typer.Exit(int(peak() >= LIMIT_GIB))


@app.command()
def write_cache(
    folder: Annotated[Path, typer.Argument(help="An empty folder; it takes 6.9 GB.")],
    steps: Annotated[int, typer.Option(help="Which student.")] = 2,
) -> None:
    """Write a hub cache with the official UNet of so many steps, and of the base what that
    needs.
    """
    student = repository(folder, LIGHTNING[0]) / str(official_file(LIGHTNING[0], steps))
    base = repository(folder, SDXL_BASE)
    text = random_text()
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for number, name in enumerate(("", "_2")):
        text.tokenizers[number].save_pretrained(base / f"tokenizer{name}")
        text.encoders[number].half().save_pretrained(base / f"text_encoder{name}", variant="fp16")
    random_vae().half().save_pretrained(base / "vae", variant="fp16")
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).save_pretrained(base / "scheduler")
    (base / "unet").mkdir()
    (base / "unet" / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", **json.loads(SDXL.read_text())})
    )
    (base / INDEX_FILE).write_text(json.dumps(index))
    save_file(halved(random_sdxl()), student)
    typer.echo(f"{student}: {student.stat().st_size / GIB:.2f} GiB, peak {peak():.1f} GiB")


def num_parameters(network: nn.Module) -> int:
    """Count the numbers that a network has learned."""
    return sum(parameter.numel() for parameter in network.parameters())


def repository(cache: Path, hub_id: str) -> Path:
    """Begin the cache of a hub repository, as the hub's library lays it out; return the folder
    that its files go to.
    """
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    return folder / "snapshots" / "0123"


def halved(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights in 16 bits; those in 32 are freed on the way, which halves the peak."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half()
    return dict(network.state_dict())


if __name__ == "__main__":
    app()
