"""SDXL's size on a CPU: engines and decoders beside vanilla diffusers, with peak memory.

    python benchmarks/full_size_compare.py --out runs/full-size.jsonl        # 512 px, 2 steps
    python benchmarks/full_size_compare.py --out runs/nano.jsonl --model nano --pixels 64

The weights are random, for the real ones are not needed to know time and memory. Every drawing runs
in a process of its own, one at a time, so its peak of resident memory is its own. A process draws
once unmeasured, which compiles, and once measured. In every round each variant takes a turn; ratios
are of the same rounds. What is done is in the file, one line each, and the same command goes on
where it was stopped. Before the first round every engine runs once uncounted, so that what it keeps
on the disk is there.

By their parameters, in float32: UNet 9.6 GiB, text encoders 3.0, autoencoder 0.3, so 13 GiB for
`diffusers` and `eager`, and what they compute with. OpenVINO holds the UNet once more: 9.6 GiB, so
23 in all, or 2.4 in 8 bits, so 16, and as much again while it compiles. What does not fit ends as
failed in the table, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from full_size_distill import GIB, filled
from full_size_generate import random_bundle

from twostep.engines import find_engine
from twostep.export.verification import vanilla_pipeline
from twostep.formats.tiny_decoder import TinyLayout
from twostep.media.codec import TINY, TinyDecoder
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.tiny_decoder import build_decoder
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.reports.speed import machine

PROMPT = "a 3d red apple on a blue background"
TAESD = TinyLayout(latent_channels=4, width=64, blocks=(3, 3, 3, 1))
VANILLA = "diffusers"
VARIANTS = (VANILLA, "eager", "eager:tiny", "openvino-int8", "openvino-int8:tiny", "openvino")
"""An engine, and `:tiny` after it where the tiny decoder draws. The largest comes last."""

Draw = Callable[[], dict[str, float]]
"""Draws, and returns the seconds of the stages, if it knows them."""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a process")
    parser.add_argument("--model", default="", help="load this instead of random SDXL weights")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only, options)))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.out)
    for number in range(-1, options.rounds):
        for variant in options.variants:
            is_needed = number >= 0 or variant.startswith("openvino")
            if is_needed and (number, variant) not in done:
                run(number, variant, options)
    print_table(read(options.out))


def run(number: int, variant: str, options: argparse.Namespace) -> None:
    """Measure a variant in a process of its own, and note what came of it."""
    command = [sys.executable, __file__, "--only", variant, "--out", str(options.out)]
    command += ["--model", options.model, "--pixels", str(options.pixels)]
    command += ["--steps", str(options.steps)]
    print(f"round {number}, {variant}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = {"failed": ended.returncode}
    if ended.returncode == 0:
        found = json.loads(ended.stdout.splitlines()[-1])
    shape = {"pixels": options.pixels, "steps": options.steps, "model": options.model or "sdxl"}
    with options.out.open("a") as file:
        file.write(json.dumps({"round": number, "variant": variant, **shape, **found}) + "\n")


def measured(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Draw with a variant in this process; return seconds, the peak, and the machine."""
    torch.manual_seed(0)
    began = time.perf_counter()
    draw = prepared(variant, options)
    ready = time.perf_counter()
    draw()
    warm = time.perf_counter()
    gc.collect()
    start = time.perf_counter()
    stages = draw()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "stages": stages,
        "making": ready - began,
        "first": warm - ready,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "machine": machine(),
    }


def prepared(variant: str, options: argparse.Namespace) -> Draw:
    """Return what draws a picture as a variant does it."""
    engine, _, decoder = variant.partition(":")
    bundle = load_bundle(options.model, steps=options.steps) if options.model else None
    bundle = bundle or random_bundle(options.steps)
    size = (options.pixels, options.pixels)
    bundle = replace(bundle, contract=replace(bundle.contract, sizes=(size,)))
    if engine == VANILLA:
        return vanilla(bundle, options)
    if decoder == TINY:
        bundle = with_tiny_decoder(bundle)
    bundle = find_engine(engine).prepare(bundle.remembering(), [size])
    return lambda: generate(bundle, Request(PROMPT, seed=7)).seconds


def vanilla(bundle: Bundle, options: argparse.Namespace) -> Draw:
    """Return the drawing by diffusers' own pipeline."""
    pipeline = vanilla_pipeline(bundle)

    def draw() -> dict[str, float]:
        pipeline(
            PROMPT,
            num_inference_steps=options.steps,
            guidance_scale=0,
            generator=torch.Generator().manual_seed(7),
            width=options.pixels,
            height=options.pixels,
        )
        return {}

    return draw


def with_tiny_decoder(bundle: Bundle) -> Bundle:
    """Return the bundle as its tiny decoder draws; a random one of TAESD's size if it has none."""
    codec: Any = bundle.codec
    tiny = codec.tiny
    if tiny is None:
        network = filled(build_decoder(TAESD).to("meta")).eval().requires_grad_(False)
        tiny = TinyDecoder(network)
    return replace(bundle, codec=replace(codec, tiny=tiny, decoder=TINY))


def read(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Return what is noted of every round and variant."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["round"], line["variant"]): line for line in lines}


def print_table(done: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Print medians with quartiles, ratios to diffusers of the same rounds, and peaks."""
    print("| | seconds (quartiles) | decode | times as fast as diffusers | peak, GiB |")
    print("|---|---:|---:|---:|---:|")
    variants = dict.fromkeys(variant for _, variant in done)
    for variant in variants:
        runs = {number: line for (number, name), line in done.items() if name == variant}
        counted = {number: line for number, line in runs.items() if number >= 0}
        whole = {number: line for number, line in counted.items() if "seconds" in line}
        if not whole:
            codes = {line.get("failed") for line in runs.values()}
            print(f"| {variant} | did not end: {sorted(map(str, codes))} | | | |")
            continue
        seconds = [line["seconds"] for line in whole.values()]
        ratios = [
            done[number, VANILLA]["seconds"] / line["seconds"]
            for number, line in whole.items()
            if "seconds" in done.get((number, VANILLA), {})
        ]
        decodes = [line["stages"]["decode"] for line in whole.values() if line["stages"]]
        peak = max(line["peak_gib"] for line in whole.values())
        print(
            f"| {variant} | {spread(seconds)} | {spread(decodes)} | {spread(ratios)} | {peak:.1f} |"
        )


def spread(values: list[float]) -> str:
    """Return a median with its quartiles; nothing of no values."""
    if not values:
        return ""
    low = high = values[0]
    if len(values) > 1:
        low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
