"""SDXL's size on a CPU: engines and decoders beside vanilla diffusers, with peak memory.

    python benchmarks/full_size_compare.py --out runs/full-size        # 512 px, 2 steps
    python benchmarks/full_size_compare.py --out runs/nano --model nano --pixels 64
    python benchmarks/full_size_compare.py --out runs/curves --pixels 256 512 1024 2048 \\
        --rounds 1 --variants diffusers eager eager:tiny        # and again with --steps, --batch

The weights are random, for the real ones are not needed to know time and memory. They are written
once, as a model folder in float32 of 13 GB for every number of steps (`--out` needs the room), and
every drawing reads them in a process of its own, one at a time, so its peak of resident memory is
its own. A process draws once unmeasured, which compiles, and once measured; `recorded` after an
engine draws without PyTorch from what that engine recorded (`pipeline.recorded`), and of its
seconds those in which networks are opened are counted apart. In every round each variant takes a
turn; ratios are of the same rounds. What is done is in `runs.jsonl`, one line each, and the same
command goes on where it was stopped. Before the first round every engine runs once uncounted, so
that what it keeps on the disk is there. Several `--pixels`, `--steps` or `--batch` make
`curves.svg`: seconds and memory along each, and what the arithmetic of PyTorch's variants would
take alone.

By their parameters, in float32: UNet 9.6 GiB, text encoders 3.0, autoencoder 0.3, so 13 GiB for
`diffusers` and `eager`, and what they compute with. OpenVINO holds the UNet once more while PyTorch
has it too. What does not fit ends as failed in the table, and the others go on.
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
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from full_size_distill import GIB, filled
from full_size_generate import random_bundle
from torch.utils.flop_counter import FlopCounterMode

from twostep.export.verification import vanilla_pipeline
from twostep.files import folder_atomically
from twostep.formats.locate import CONTRACT_FILE
from twostep.formats.tiny_decoder import DECODER_FILE, TinyLayout
from twostep.media.codec import FULL, TINY
from twostep.models.loading import load_bundle
from twostep.models.sdxl import diffusers_scheduler
from twostep.models.tiny_decoder import build_decoder, write_decoder
from twostep.pipeline.generation import generate
from twostep.pipeline.recording import record
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.reports.curves import plot_curves
from twostep.reports.speed import ROOF, Case, Row, Timing, machine, rate
from twostep.reports.starts import Start

PROMPT = "a 3d red apple on a blue background"
TAESD = TinyLayout(latent_channels=4, width=64, blocks=(3, 3, 3, 1))
VANILLA = "diffusers"
RECORDED = "recorded"
LARGER = ((1536, 1536), (2048, 2048))
"""Sizes that are for the curves alone, in pixels."""

VARIANTS = (
    VANILLA,
    "eager",
    "eager:tiny",
    "openvino-int8",
    "openvino-int8:recorded",
    "openvino-int8:tiny",
    "openvino-int8:tiny:recorded",
)
"""An engine, and after it `:tiny` where the tiny decoder draws, and `:recorded`."""

FILE = "runs.jsonl"
WRITE = "write"
"""What a process does that draws nothing: it writes the model."""

Draw = Callable[[], dict[str, float]]
"""Draws, and returns the seconds of the stages, if it knows them."""

Key = tuple[int, str, int, int, int]
"""Round, variant, pixels, steps and batch of a process."""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--model", default="", help="load this instead of random SDXL weights")
    parser.add_argument("--pixels", type=int, nargs="+", default=[512])
    parser.add_argument("--steps", type=int, nargs="+", default=[2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == WRITE:
        write(options.out, options.steps[0])
        return
    if options.only:
        print(json.dumps(measured(options.only, options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    done = read(options.out)
    cases = list(product(options.pixels, options.steps, options.batch))
    if not options.model:
        for steps in options.steps:
            write_model(options.out, steps)
    for number, case, variant in product(range(-1, options.rounds), cases, options.variants):
        is_needed = number >= 0 or variant.startswith("openvino")
        if is_needed and (number, variant, *case) not in done:
            run((number, variant, *case), options)
    done = read(options.out)
    for case in dict.fromkeys(key[2:] for key in done):
        print_table(case, {key[:2]: line for key, line in done.items() if key[2:] == case})
    if curves := plotted(done):
        (options.out / "curves.svg").write_text(curves)


def run(key: Key, options: argparse.Namespace) -> None:
    """Measure a variant in a process of its own, and note what came of it."""
    number, variant, pixels, steps, batch = key
    shape = {"pixels": pixels, "steps": steps, "batch": batch}
    if variant.endswith(RECORDED):
        # It loads nothing that a drawing without PyTorch does without.
        command = [sys.executable, str(Path(__file__).with_name("recorded_draw.py"))]
        command += [json.dumps(asked(variant, options, pixels, steps, batch))]
    else:
        command = [sys.executable, __file__, "--only", variant, "--out", str(options.out)]
        command += ["--model", options.model]
        command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    print(f"round {number}, {variant}, {shape}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = {"failed": ended.returncode}
    if ended.returncode == 0:
        found = json.loads(ended.stdout.splitlines()[-1])
    line = {"round": number, "variant": variant, **shape, "model": options.model or "sdxl", **found}
    with (options.out / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_model(folder: Path, steps: int) -> None:
    """Write a student of SDXL's size with random weights, in a process that then ends."""
    path = model_path(folder, steps)
    if path.exists():
        return
    print(f"writing {path}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--only", WRITE, "--out", str(path)]
    subprocess.run([*command, "--steps", str(steps)], check=True)


def model_path(folder: Path, steps: int) -> Path:
    """Return the folder of the model with random weights."""
    return folder / f"sdxl-{steps}step"


def write(path: Path, steps: int) -> None:
    """Write the model, whole or not at all."""
    bundle = random_bundle(steps)
    text: Any = bundle.text
    # SDXL itself draws nothing larger than about 1024 x 1024.
    contract = replace(bundle.contract, sizes=(*bundle.contract.sizes, *LARGER))
    pipeline = StableDiffusionXLPipeline(
        **bundle.parts,
        vae=bundle.codec.vae.to(memory_format=torch.contiguous_format),  # type: ignore[attr-defined]
        tokenizer=text.tokenizers[0],
        tokenizer_2=text.tokenizers[1],
        scheduler=diffusers_scheduler(contract),
        force_zeros_for_empty_prompt=text.zeros_for_empty,
        add_watermarker=False,
    )
    with folder_atomically(path) as partial:
        # In one file each, as the hub has them.
        pipeline.save_pretrained(partial, max_shard_size="20GB")
        (partial / CONTRACT_FILE).write_text(contract.to_json())
        decoder = filled(build_decoder(TAESD).to("meta"))
        write_decoder(decoder, {}, partial / DECODER_FILE)


def measured(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Draw with a variant in this process; return seconds, the peak, and the machine."""
    torch.manual_seed(0)
    began = time.perf_counter()
    draw = prepared(variant, options)
    ready = time.perf_counter()
    # Counted in the drawing that is not timed, and only where PyTorch computes.
    is_eager = variant.split(":")[0] == "eager"
    with FlopCounterMode(display=False) if is_eager else nullcontext() as counter:
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
        "least": counter.get_total_flops() / rate() if counter else None,
        "machine": machine(),
    }


def asked(
    variant: str, options: argparse.Namespace, pixels: int, steps: int, batch: int
) -> dict[str, Any]:
    """Return the request of a variant in a case, as plain values."""
    engine, *ways = variant.split(":")
    return {
        "prompt": PROMPT,
        "model": options.model or str(model_path(options.out, steps)),
        "engine": engine,
        "decoder": TINY if TINY in ways else FULL,
        "seed": 7,
        "num_images": batch,
        "steps": steps,
        "width": pixels,
        "height": pixels,
    }


def prepared(variant: str, options: argparse.Namespace) -> Draw:
    """Return what draws a picture as a variant does it."""
    (pixels,), (steps,), (batch,) = options.pixels, options.steps, options.batch
    values = asked(variant, options, pixels, steps, batch)
    if values["engine"] == VANILLA:
        return vanilla(Request(**{**values, "engine": "eager"}))
    request = Request(**values)
    bundle = Studio(device="cpu").load(request)
    is_first = True

    def draw() -> dict[str, float]:
        nonlocal is_first
        result = generate(bundle, request)
        if is_first and request.engine.startswith("openvino"):
            # For the variants that draw from what was recorded.
            print(f"recorded: {record(bundle, request, result)}", file=sys.stderr, flush=True)
        is_first = False
        return dict(result.seconds)

    return draw


def vanilla(request: Request) -> Draw:
    """Return the drawing by diffusers' own pipeline, from the same folder."""
    path = Path(request.model)
    if path.exists():
        pipeline = StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=torch.float32)
    else:
        pipeline = vanilla_pipeline(load_bundle(request.model, steps=request.steps))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> dict[str, float]:
        pipeline(
            PROMPT,
            num_inference_steps=request.steps,
            num_images_per_prompt=request.num_images,
            guidance_scale=0,
            generator=torch.Generator().manual_seed(request.seed),
            width=request.width,
            height=request.height,
        )
        return {}

    return draw


def read(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return what is noted of every process."""
    path = folder / FILE
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("round", "variant", "pixels", "steps", "batch")
    return {tuple(line[name] for name in names): line for line in lines}  # type: ignore[misc]


def print_table(case: tuple[int, ...], done: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Print medians with quartiles, ratios to diffusers of the same rounds, and peaks."""
    pixels, steps, batch = case
    print(f"\n{pixels} px, {steps} steps, {batch} at once\n")
    print("| | seconds (quartiles) | decode | times as fast as diffusers | peak, GiB |")
    print("|---|---:|---:|---:|---:|")
    for variant in dict.fromkeys(name for _, name in done):
        runs = {number: line for (number, name), line in done.items() if name == variant}
        whole = {n: line for n, line in runs.items() if n >= 0 and "seconds" in line}
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


def plotted(done: dict[Key, dict[str, Any]]) -> str | None:
    """Return curves of seconds and memory, with what the arithmetic alone takes; None of none."""
    groups: dict[tuple[str, Case], list[dict[str, Any]]] = {}
    for (number, variant, pixels, steps, batch), line in done.items():
        if number >= 0 and "seconds" in line:
            case = Case(steps, (pixels, pixels), batch)
            groups.setdefault((variant, case), []).append(line)
    rows, starts = [], []
    for (variant, case), lines in groups.items():
        seconds = Timing(tuple(line["seconds"] for line in lines))
        rows.append(Row(variant, case, {"total": seconds}))
        peak = max(line["peak_gib"] for line in lines)
        starts.append(Start(variant, case, seconds, int(peak * GIB)))
        if least := tuple(line["least"] for line in lines if line["least"]):
            name = ROOF if variant == "eager" else f"{ROOF}, {TINY} decoder"
            rows.append(Row(name, case, {"total": Timing(least)}))
    return plot_curves(rows, starts)


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
