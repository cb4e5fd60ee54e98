"""What `generate` costs beside its networks, and beside vanilla diffusers with the same student.

    python benchmarks/pipeline_overhead.py [--steps 2] [--rounds 100]

*Bare* calls text encoders, UNet and decoder directly, with tokens, noise and times at hand: nothing
is checked, and no picture comes out. *Vanilla* is StableDiffusionXLPipeline with Euler at trailing
times and no guidance, on the very same networks. Each round runs all of them in changing order, on
one thread; a pair of a round gives one difference and one ratio, so what else the machine does
hardly matters. Processor time is counted, and the wall's beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Annotated

import torch
import typer
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from twostep.diffusion import initial_noise, trailing_times
from twostep.formats.diffusers_names import DIFFUSERS_NAMES
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

PROMPT = "a 3d red apple on a blue background"
TARGET_MILLISECONDS = 5
NUM_WARM = 5

Draw = Callable[[int], object]
"""Draws a batch whose first image has this seed."""


def bare(bundle: Bundle, steps: int, num_images: int) -> Draw:
    """Return the calls of the networks alone, as many and as large as `generate` makes them."""
    tokens = [
        tokenizer(
            [PROMPT],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        for tokenizer in bundle.text.tokenizers
    ]
    width, height = bundle.contract.sizes[0]
    conditioning = bundle.conditioning([PROMPT], width, height).expand(num_images)
    shape = bundle.latent_shape(width, height)
    noise = torch.stack([initial_noise(i, shape) for i in range(num_images)])
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
    indices = [torch.full((num_images,), t - 1) for t in trailing_times(steps)]
    unet = bundle.denoiser.network
    vae = bundle.codec.vae

    @torch.inference_mode()
    def draw(seed: int) -> object:
        for encoder, ids in zip(bundle.text.encoders, tokens, strict=True):
            encoder(ids, output_hidden_states=True)
        for index in indices:
            latents = unet(
                noise, index, conditioning.text, added_cond_kwargs=added, return_dict=False
            )[0]
        return vae.decode(latents / vae.config.scaling_factor).sample

    return draw


def ours(bundle: Bundle, steps: int, num_images: int) -> Draw:
    """Return what a user calls."""
    return lambda seed: generate(
        bundle, Request(PROMPT, seed=seed, num_images=num_images, steps=steps)
    )


def vanilla(bundle: Bundle, steps: int, num_images: int) -> Draw:
    """Return what a user of diffusers calls, with generators of the same seeds."""
    pipeline = StableDiffusionXLPipeline(
        vae=bundle.codec.vae,
        text_encoder=bundle.text.encoders[0],
        text_encoder_2=bundle.text.encoders[1],
        tokenizer=bundle.text.tokenizers[0],
        tokenizer_2=bundle.text.tokenizers[1],
        unet=bundle.denoiser.network,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="trailing",
            prediction_type=DIFFUSERS_NAMES[bundle.contract.prediction_type],
        ),
        force_zeros_for_empty_prompt=bundle.text.zeros_for_empty,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    width, height = bundle.contract.sizes[0]

    def draw(seed: int) -> object:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        return pipeline(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=0,
            num_images_per_prompt=num_images,
            generator=generators,
            width=width,
            height=height,
        )

    return draw


def measure(draws: dict[str, Draw], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (processor, wall) milliseconds of every round by name.

    The order changes from round to round. The first rounds warm up and are not counted.
    """
    names = list(draws)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-NUM_WARM, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            processor_start = time.process_time()
            wall_start = time.perf_counter()
            draws[name](number + NUM_WARM)
            processor = time.process_time() - processor_start
            wall = time.perf_counter() - wall_start
            if number >= 0:
                taken[name].append((1e3 * processor, 1e3 * wall))
    return taken


def quartiles(values: Sequence[float], form: str) -> str:
    """Write the median, and the quartiles in brackets."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main(
    model: Annotated[
        str, typer.Option(help="A small model, or its time hides what is measured.")
    ] = "nano",
    steps: Annotated[int, typer.Option(help="Which student.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of every measurement.")] = 100,
) -> None:
    """Measure one image and four, and print a table."""
    torch.set_num_threads(1)
    bundle = load_bundle(model, steps=steps)
    typer.echo(
        f"{bundle.contract.name}, {steps} steps, one thread, median (quartiles) of {rounds} rounds"
    )
    typer.echo(
        "| images | clock | bare ms | ours ms | vanilla ms "
        "| overhead, ms per image | ours / vanilla |"
    )
    typer.echo("|---:|---|---:|---:|---:|---:|---:|")
    kept = True
    for num_images in (1, 4):
        draws = {make.__name__: make(bundle, steps, num_images) for make in (bare, ours, vanilla)}
        taken = measure(draws, rounds)
        for place, clock in enumerate(("processor", "wall")):
            times = {
                name: list(map(itemgetter(place), measured)) for name, measured in taken.items()
            }
            more = [(a - b) / num_images for a, b in zip(times["ours"], times["bare"], strict=True)]
            ratios = [a / b for a, b in zip(times["ours"], times["vanilla"], strict=True)]
            alone = " | ".join(f"{statistics.median(times[name]):.1f}" for name in draws)
            typer.echo(
                f"| {num_images} | {clock} | {alone} "
                f"| {quartiles(more, '.2f')} | {quartiles(ratios, '.3f')} |"
            )
            kept &= statistics.median(more) < TARGET_MILLISECONDS and statistics.median(ratios) <= 1
    typer.echo(
        f"Wanted: overhead under {TARGET_MILLISECONDS} ms, a ratio of at most 1: "
        f"{'kept' if kept else 'missed'}"
    )
    raise typer.Exit(int(not kept))


if __name__ == "__main__":
    typer.run(main)
