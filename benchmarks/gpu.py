"""What a GPU draws and trains in a second, in parts that end before a limit.

    python benchmarks/gpu.py --out runs/gpu                       # 8 minutes on one GPU of 80 GB
    python benchmarks/gpu.py --out runs/rehearsal --device cpu --tiny --seconds 1800

Every part is a process of its own. What it measures stands in `figures.jsonl` at once, a line each,
and pictures lie beside it; `table.md` sums it up. The same command goes on where it stopped: what
is done is left out, what was cut off is begun again. `--seconds` ends the part that is at work, and
none is begun for which less time is left than it needs at least. In their order:

- start: SDXL's size with random weights, 1024 px, 2 steps: the first picture of the last of
  `--engines` in a new process, with nothing compiled before;
- draw-1: the same, one picture: diffusers beside our engines in turns: two calls of the UNet,
  decoding, and the whole picture, with the whole decoder and with one of TAESD's size;
- train: the first stage of `sdxl-lora-80gb`: seconds of an iteration, its arithmetic against one
  large product, and how often Python waits for the GPU;
- nano: iterations a second of two stages of nano, at batch 256;
- bench: nano, engines beside diffusers at 1, 2 and 4 steps, as `twostep bench` has it;
- draw-4: as draw-1, four pictures at once;
- train-bf16: as train, with the frozen weights in 16 bits;
- train-compiled: as train, with compiled blocks;
- nano-cpu: as nano, on two cores of the CPU; only with `--cpu`, or among `--parts`.

With `--tiny` the parts take nano, or SDXL's architecture as narrow as can be, small batches and few
rounds. On a CPU all is drawn in float32, and trained in bfloat16 where it has instructions for it.
Counted as arithmetic of a stage is what it must compute; what gradient checkpointing computes twice
is not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from full_size_compare import TAESD
from full_size_distill import GIB, RandomLatents, filled, random_sdxl
from full_size_generate import random_bundle
from PIL import Image, ImageChops, ImageStat
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trainer_overhead import random_source

from twostep.diffusion import VariancePreserving, trailing_times
from twostep.distill import DistillRecipe
from twostep.distill.chain import prepared_stages
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.engines import find_engine
from twostep.export.verification import vanilla_pipeline
from twostep.files import write_atomically
from twostep.media.codec import FULL, TINY, TinyDecoder
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sdxl_networks import build_network
from twostep.models.tiny_decoder import build_decoder
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.reports.speed import (
    PROMPT,
    VANILLA,
    Timing,
    as_json,
    compare_speed,
    every_case,
    machine,
    plot,
    rate,
    wait_for,
)
from twostep.training.device import computes_bfloat16, drawing_dtype, find_device
from twostep.training.loop import Randomness
from twostep.training.recipe import load_recipe

FIGURES = "figures.jsonl"
TABLE = "table.md"
ENDED = "end"
"""What the last line of a part that was measured whole is called."""

STEPS = 2
SEED = 7

RECIPE = "sdxl-lora-80gb"
NANO_METHODS = ("regression", "lightning")
"""Of each the first stage of the recipe `nano` is measured."""


@dataclass(frozen=True)
class Part:
    """A part: what measures it, the seconds that it may take, and those without which it is not
    begun.
    """

    measure: Callable[[argparse.Namespace, Recorder], None]
    limit: float
    least: float


class Recorder:
    """Writes what a part measured, and knows what was measured before."""

    def __init__(self, out: Path, part: str) -> None:
        """Write into a folder, for a part."""
        self.path = out / FIGURES
        self.part = part

    def has(self, what: str) -> bool:
        """Tell whether this was measured before."""
        return (self.part, what) in done_in(self.path)

    def write(self, what: str, **figures: Any) -> None:
        """Append a line."""
        line = {"part": self.part, "what": what, **figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def lines_in(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of figures but for one that a killed process left unfinished."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"left out of {path}: {line[:80]}", file=sys.stderr)
    return lines


def done_in(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the last line of everything that was measured."""
    return {(line["part"], line["what"]): line for line in lines_in(path)}


# What is drawn with


def models(options: argparse.Namespace) -> tuple[Bundle, Bundle]:
    """Return a 2-step model as diffusers runs it, and as our engines do, on the same weights."""
    device = find_device(options.device)
    whole = load_bundle("nano", steps=STEPS) if options.tiny else random_bundle(STEPS, device)
    whole = whole.to(device, drawing_dtype(device))
    pixels = whole.contract.sizes[0][0] if options.tiny else options.pixels
    whole = replace(whole, contract=replace(whole.contract, sizes=((pixels, pixels),)))
    return whole, with_tiny(to_draw(whole)).remembering()


def to_draw(whole: Bundle) -> Bundle:
    """Return a model with the networks that draw, on the same weights."""
    codec: Any = whole.codec
    unet = lean(whole.denoiser.network, "unet")
    vae = lean(codec.vae, "vae").to(memory_format=torch.channels_last)
    return replace(whole, denoiser=whole.denoiser.with_network(unet), codec=replace(codec, vae=vae))


def lean(network: Any, name: str) -> Any:
    """Return a network's counterpart in PyTorch alone, on the same weights."""
    config = {**network.config, "_class_name": type(network).__name__}
    with torch.device("meta"):
        made = build_network(config, name, lean=True)
    made.load_state_dict(network.state_dict(), assign=True)
    return made.eval().requires_grad_(False)


def with_tiny(bundle: Bundle) -> Bundle:
    """Return a model with a tiny decoder: its own, or a random one of TAESD's size."""
    codec: Any = bundle.codec
    tiny = codec.tiny or TinyDecoder(filled(build_decoder(TAESD).to("meta")))
    tiny.network.to(bundle.denoiser.device, bundle.denoiser.dtype)
    return replace(bundle, codec=replace(codec, tiny=tiny, decoder=FULL))


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to draw: its parts as calls.

    Args:
        picture: draws and returns a seed's pictures.
        unet: does as many calls of the UNet as there are steps.
        decode: decodes latents.
    """

    picture: Callable[[], list[Image.Image]]
    unet: Callable[[], object]
    decode: Callable[[], object]

    def timed(self, device: torch.device) -> dict[str, float]:
        """Return the seconds of each."""
        calls = {"picture": self.picture, "unet": self.unet, "decode": self.decode}
        return {name: seconds_of(call, device) for name, call in calls.items()}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until everything that a call queues is done."""
    wait_for(device)
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    wait_for(device)
    return time.perf_counter() - start


def ours(bundle: Bundle, engine: str, decoder: str, batch: int) -> Variant:
    """Return the drawing by one of our engines."""
    codec: Any = bundle.codec
    bundle = replace(bundle, codec=replace(codec, decoder=decoder))
    size = bundle.contract.sizes[0]
    bundle = find_engine(engine).prepare(bundle, [size])
    request = Request(PROMPT, seed=SEED, num_images=batch)
    device = bundle.denoiser.device
    x = random_latents(bundle, batch)
    conditioning = bundle.conditioning([PROMPT] * batch, *size).to(device)
    times = trailing_times(STEPS)[:STEPS]

    def unet() -> None:
        for time_of_step in times:
            bundle.denoiser(x, torch.full((batch,), time_of_step), conditioning)

    return Variant(
        picture=lambda: generate(bundle, request).images,
        unet=unet,
        decode=lambda: bundle.codec.decode(x),
    )


def vanilla(whole: Bundle, batch: int) -> Variant:
    """Return the drawing by diffusers' own pipeline."""
    pipeline = vanilla_pipeline(whole)
    # As diffusers loads it: weights lie as torch makes them.
    vae: Any = copy.deepcopy(pipeline.vae)
    pipeline.vae = vae.to(memory_format=torch.contiguous_format)
    # Or else it would decode in float32; the autoencoder that people use in 16 bits says so too.
    if "force_upcast" in pipeline.vae.config:
        pipeline.vae.register_to_config(force_upcast=False)
    width, height = whole.contract.sizes[0]
    device = whole.denoiser.device
    dtype = whole.denoiser.dtype
    x = random_latents(whole, batch).to(dtype)
    conditioning = whole.conditioning([PROMPT] * batch, width, height).to(device)
    added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.sizes}
    text = conditioning.text.to(dtype)
    times = torch.tensor([time - 1 for time in trailing_times(STEPS)[:STEPS]], device=device)
    z = x / pipeline.vae.config.scaling_factor

    def picture() -> list[Image.Image]:
        drawn = pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            num_images_per_prompt=batch,
            guidance_scale=0,
            generator=[torch.Generator().manual_seed(SEED + i) for i in range(batch)],
            width=width,
            height=height,
        )
        images: list[Image.Image] = drawn.images
        return images

    def unet() -> None:
        for t in times:
            pipeline.unet(x, t, text, added_cond_kwargs=added, return_dict=False)

    return Variant(
        picture=picture,
        unet=unet,
        decode=lambda: pipeline.vae.decode(z, return_dict=False),
    )


def random_latents(bundle: Bundle, batch: int) -> Tensor:
    """Return noise in the shape of a model's latents, on its device."""
    shape = bundle.latent_shape(*bundle.contract.sizes[0])
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(batch, *shape, generator=generator).to(bundle.denoiser.device)


# The parts


def measure_start(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the first picture of the last engine, in this process that has just begun."""
    imported = time.time()
    device = find_device(options.device)
    _, bundle = models(options)
    wait_for(device)
    ready = time.time()
    drawing = ours(bundle, options.engines[-1], FULL, 1)
    first = seconds_of(drawing.picture, device)
    recorder.write(
        options.engines[-1],
        imports=imported - options.begun,
        weights=ready - imported,
        first_picture=first,
        whole_start=time.time() - options.begun,
        second_picture=seconds_of(drawing.picture, device),
        peak_gib=peak(device),
    )


def measure_drawing(options: argparse.Namespace, recorder: Recorder, batch: int) -> None:
    """Measure diffusers beside the engines: first those that need no compiling, then all."""
    device = find_device(options.device)
    whole, bundle = models(options)
    variants = {VANILLA: vanilla(whole, batch)}
    for engine in options.engines:
        for decoder in (FULL, TINY):
            name = engine if decoder == FULL else f"{engine}:{TINY}"
            variants[name] = ours(bundle, engine, decoder, batch)
            first = seconds_of(variants[name].picture, device)
            recorder.write(f"first {name}", seconds=first, peak_gib=peak(device))
        if not recorder.has(f"up to {engine}"):
            measure_beside(variants, f"up to {engine}", options, recorder)
    images = {name: variant.picture()[0] for name, variant in variants.items()}
    differences = {name: difference(image, images[VANILLA]) for name, image in images.items()}
    recorder.write("differences", levels=differences)
    sheet(list(images.values())).save(options.out / f"{recorder.part}.png")
    measure_memory_formats(bundle, batch, recorder)
    last = list(variants.values())[-1]
    with counted_waits(device) as waits:
        last.picture()
    recorder.write("waits", of_a_picture=waits())


def measure_beside(
    variants: dict[str, Variant], what: str, options: argparse.Namespace, recorder: Recorder
) -> None:
    """Time variants in turns, after a round that does not count, and write medians and ratios."""
    device = find_device(options.device)
    rounds = 2 if options.tiny else 10
    names = list(variants)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            for stage, seconds in variants[name].timed(device).items():
                if number >= 0:
                    taken[name].setdefault(stage, []).append(seconds)
    rows = {}
    for name in names:
        rows[name] = {stage: Timing(tuple(each)).as_json() for stage, each in taken[name].items()}
        for stage, seconds in taken[name].items():
            pairs = zip(seconds, taken[VANILLA][stage], strict=True)
            ratio = Timing(tuple(theirs / mine for mine, theirs in pairs))
            rows[name][stage]["times_as_fast"] = ratio.median
    recorder.write(what, rounds=rounds, rows=rows, peak_gib=peak(device))


def measure_memory_formats(bundle: Bundle, batch: int, recorder: Recorder) -> None:
    """Time the whole decoder as it is loaded, and with weights that lie as torch makes them."""
    codec: Any = bundle.codec
    # What is compiled shares the autoencoder's weights, and must find them where they were.
    codec = replace(codec, vae=copy.deepcopy(codec.vae))
    device = bundle.denoiser.device
    x = random_latents(bundle, batch)
    seconds = {}
    for name in ("channels_last", "contiguous_format"):
        codec.vae.to(memory_format=getattr(torch, name))
        taken = [seconds_of(lambda: codec.decode(x), device) for _ in range(4)]
        seconds[name] = min(taken[1:])
    recorder.write("decode by memory format", seconds=seconds)


def measure_training(
    options: argparse.Namespace, recorder: Recorder, overrides: Sequence[str] = ()
) -> None:
    """Measure the first stage of the recipe: its arithmetic, a part of a batch, whole batches.

    Of a variant, with `overrides`, no whole batches.
    """
    device = find_device(options.device)
    is_variant = bool(overrides)
    overrides = list(overrides)
    if options.tiny:
        overrides += ["defaults.batch_size=4", "defaults.accumulate=2", "stages.0.lora_rank=2"]
        overrides += ["stages.0.teacher_steps=64"]
    recipe = load_recipe(RECIPE, DistillRecipe, overrides)
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
    dtype = torch.bfloat16 if computes_bfloat16(device.type) else torch.float32
    # The first product of a process also finds out how it is computed best.
    reached = max(rate(device, dtype) for _ in range(3))
    teacher = random_teacher(options, recipe, device)
    pixels = 64 if options.tiny else options.pixels
    (prepared,) = prepared_stages(recipe, teacher)
    stage = prepared.stage

    source = KeptLatents(pixels, stage.batch_size)

    def trainer_of(**changes: Any) -> StageTrainer:
        # Those before it, with their optimisers, hold themselves in cycles.
        gc.collect()
        changed = stage.model_copy(update=changes)
        prepared.student.checkpoint_gradients(changed.gradient_checkpointing)
        return StageTrainer(changed, source, prepared.teacher, prepared.student)

    plain = {"batch_size": 1, "accumulate": 1, "gradient_checkpointing": False, "compile": False}
    with FlopCounterMode(display=False) as counter:
        seconds_of_iteration(trainer_of(**plain), 0, device)
    work = counter.get_total_flops()
    recorder.write(
        "arithmetic", tflop_of_example=work / 1e12, product_tflops=reached / 1e12, dtype=str(dtype)
    )
    part = stage.batch_size // stage.accumulate
    batches: list[tuple[dict[str, Any], int]] = [({"batch_size": part, "accumulate": 1}, 3)]
    if not is_variant:
        batches.append(({}, 2))
    for changes, timed in batches:
        trainer = trainer_of(**changes)
        reset_peak(device)
        first = seconds_of_iteration(trainer, 0, device)
        with counted_waits(device) as waits:
            seconds_of_iteration(trainer, 1, device)
        seconds = [seconds_of_iteration(trainer, 2 + i, device) for i in range(timed)]
        examples = trainer.stage.batch_size
        timing = Timing(tuple(seconds))
        recorder.write(
            f"batch {examples}",
            first=first,
            seconds=timing.as_json(),
            examples_a_second=examples / timing.median,
            utilisation=work * examples / timing.median / reached,
            waits=waits(),
            peak_gib=peak(device),
        )
        trainer.remove_roles()
        del trainer


class KeptLatents(RandomLatents):
    """Noise that is drawn once: what is timed is the trainer, and a cache is read ahead of it."""

    def __init__(self, pixels: int, count: int) -> None:
        """Draw so many latents and embeddings."""
        super().__init__(pixels)
        self.latents, self.conditioning = super().draw(
            count, torch.Generator().manual_seed(SEED), random.Random(SEED)
        )

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return the first of them."""
        return self.latents[:count], self.conditioning[:count]


def random_teacher(
    options: argparse.Namespace, recipe: DistillRecipe, device: torch.device
) -> Bundle:
    """Return SDXL's UNet with random weights; codec and text encoders, unused here, are nano's."""
    network = random_sdxl(device, tiny=options.tiny)
    network.to(torch.bfloat16 if recipe.base_precision == "bf16" else torch.float32)
    denoiser = Denoiser(SdxlUnet(network), VariancePreserving.scaled_linear())
    return replace(load_bundle("nano"), denoiser=denoiser)


def seconds_of_iteration(trainer: StageTrainer, number: int, device: torch.device) -> float:
    """Return the seconds of an iteration until its device is done."""
    wait_for(device)
    start = time.perf_counter()
    trainer.iterate(number, Randomness.at(0, number))
    wait_for(device)
    return time.perf_counter() - start


def measure_nano(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measure iterations a second of nano's stages on the device."""
    device = find_device(options.device)
    for name in NANO_METHODS:
        if not recorder.has(name):
            rounds = 2 if options.tiny else 10
            recorder.write(name, **nano_iterations(options, name, device, rounds, warm=2))


def measure_nano_on_cpu(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the same on two cores of the CPU."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    torch.set_num_threads(2)
    for name in NANO_METHODS:
        if not recorder.has(name):
            found = nano_iterations(options, name, torch.device("cpu"), rounds=1, warm=1)
            recorder.write(name, **found, threads=torch.get_num_threads())


def nano_iterations(
    options: argparse.Namespace, name: str, device: torch.device, rounds: int, warm: int
) -> dict[str, Any]:
    """Train one of nano's stages for some iterations, and return how fast that was."""
    batch = 4 if options.tiny else 256
    recipe = load_recipe("nano", DistillRecipe, [f"defaults.batch_size={batch}"])
    stage = nano_stage(recipe, name)
    recipe = recipe.model_copy(update={"stages": (stage,)})
    teacher = load_bundle("nano").to(device)
    (prepared,) = prepared_stages(recipe, teacher)
    trainer = StageTrainer(
        prepared.stage,
        random_source(teacher),
        prepared.teacher,
        prepared.student,
        codec=teacher.codec,
    )
    for number in range(warm):
        seconds_of_iteration(trainer, number, device)
    with counted_waits(device) as waits:
        seconds = [seconds_of_iteration(trainer, warm + number, device) for number in range(rounds)]
    timing = Timing(tuple(seconds))
    return {
        "stage": stage.name,
        "batch": batch,
        "seconds": timing.as_json(),
        "iterations_a_second": 1 / timing.median,
        "iterations": rounds,
        "waits": waits(),
        "peak_gib": peak(device),
    }


def nano_stage(recipe: DistillRecipe, method: str) -> Stage:
    """Return the first stage of a recipe that has a method."""
    return next(stage for stage in recipe.stages if stage.method.name == method)


def measure_bench(options: argparse.Namespace, recorder: Recorder) -> None:
    """Time engines beside diffusers on nano, step by step."""
    all_steps = [STEPS] if options.tiny else [1, 2, 4]
    size = load_bundle("nano").contract.sizes[0]
    drawn = []
    for case in every_case(all_steps, [size], [1] if options.tiny else [1, 8]):
        if recorder.has(str(case)):
            continue
        rows = compare_speed(
            "nano",
            engines=options.engines,
            cases=[case],
            rounds=2 if options.tiny else 20,
            device=options.device,
        )
        recorder.write(str(case), rows=as_json(rows))
        drawn += rows
        with write_atomically(options.out / "bench.svg") as file:
            file.write(plot(drawn).encode())


PARTS = {
    "start": Part(measure_start, limit=150, least=40),
    "draw-1": Part(lambda *given: measure_drawing(*given, batch=1), limit=240, least=60),
    "train": Part(measure_training, limit=130, least=60),
    "nano": Part(measure_nano, limit=60, least=25),
    "bench": Part(measure_bench, limit=90, least=30),
    "draw-4": Part(lambda *given: measure_drawing(*given, batch=4), limit=150, least=60),
    "train-bf16": Part(
        lambda *given: measure_training(*given, ['base_precision="bf16"']), limit=130, least=60
    ),
    "train-compiled": Part(
        lambda *given: measure_training(*given, ["defaults.compile=true"]), limit=150, least=90
    ),
    "nano-cpu": Part(measure_nano_on_cpu, limit=300, least=60),
}


# What is measured with


def peak(device: torch.device) -> float:
    """Return the peak of a device's memory in GiB, on a CPU of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def reset_peak(device: torch.device) -> None:
    """Let the peak of a GPU's memory begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield what returns how often Python waited for a GPU in the block; None of another device.

    torch warns of every wait but those for all of the device, by which seconds are measured.
    `trainer_profile.py` counts what would wait on a CPU.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(each.message) for each in told)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def difference(image: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of two pictures in levels of 255."""
    means = ImageStat.Stat(ImageChops.difference(image, other)).mean
    return sum(means) / len(means)


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Return pictures beside each other, of at most 512 pixels each."""
    side = min(512, images[0].width)
    drawn = Image.new("RGB", (side * len(images), side))
    for number, image in enumerate(images):
        drawn.paste(image.resize((side, side)), (side * number, 0))
    return drawn


# The whole


def main() -> None:
    """Run the parts that are not done, one after the other, until the seconds are over."""
    options = parsed()
    if options.only:
        recorder = Recorder(options.out, options.only)
        PARTS[options.only].measure(options, recorder)
        recorder.write(ENDED)
        return
    end = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.out.mkdir(parents=True, exist_ok=True)
    Recorder(options.out, "machine").write("machine", **machine(find_device(options.device)))
    names = options.parts or [name for name in PARTS if name != "nano-cpu" or options.cpu]
    codes = []
    for name in names:
        codes.append(run(name, options, end))
        write_table(options)
    print((options.out / TABLE).read_text(encoding="utf-8"))
    sys.exit(max(codes))


def run(name: str, options: argparse.Namespace, end: float) -> int:
    """Run a part in a process of its own, if it is not done, and note how it ended if not well.

    Returns 1 if it failed, and 0 if it was done, stopped, or not begun.
    """
    recorder = Recorder(options.out, name)
    if recorder.has(ENDED):
        return 0
    left = end - time.monotonic() - 3
    part = PARTS[name]
    if left < (10 if options.tiny else part.least):
        print(f"{name}: {left:.0f} s are left, too few", flush=True)
        return 0
    compiled = compiled_folder(options)
    if name == "start":
        shutil.rmtree(compiled, ignore_errors=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    command += ["--begun", str(time.time())]
    limit = left if options.tiny else min(left, part.limit)
    code = code_of(command, environment, limit)
    if code is None:
        recorder.write("stopped", after_seconds=limit)
        return 0
    if code:
        recorder.write("failed", code=code)
    return int(code != 0)


def code_of(command: Sequence[str], environment: dict[str, str], limit: float) -> int | None:
    """Return how a command ended; None where it was at work for so many seconds and was ended."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also where this process is to end, and with what it started itself: compilers run in
        # processes of their own.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compiled_folder(options: argparse.Namespace) -> Path:
    """Return where compiled kernels are kept between parts and calls."""
    return options.compiled or Path(tempfile.gettempdir()) / "twostep-gpu-compiled"


def write_table(options: argparse.Namespace) -> None:
    """Write what is known so far as a page."""
    done = done_in(options.out / FIGURES)
    rows = []
    for (part, what), line in done.items():
        if what == ENDED:
            continue
        if "rows" in line and isinstance(line["rows"], dict):
            for name, stages in line["rows"].items():
                cells = [
                    f"{stage} {1e3 * each['median']:.1f} ms ({each['times_as_fast']:.2f} x)"
                    for stage, each in stages.items()
                ]
                rows.append(f"| {part} | {what}: {name} | {', '.join(cells)} |")
        elif "rows" in line:
            for row in line["rows"]:
                median = 1e3 * row["seconds"]["total"]["median"]
                rows.append(f"| {part} | {what}: {row['name']} | {median:.1f} ms |")
        else:
            figures = {key: value for key, value in line.items() if key not in ("part", "what")}
            cells = [f"{key} {shown(value)}" for key, value in figures.items()]
            rows.append(f"| {part} | {what} | {', '.join(cells)} |")
    for name in NANO_METHODS:
        rows += ratio_to_cpu(name, done, options)
    text = "\n".join(["| part | what | figures |", "|---|---|---|", *rows, ""])
    with write_atomically(options.out / TABLE) as file:
        file.write(text.encode())


def ratio_to_cpu(
    name: str, done: dict[tuple[str, str], dict[str, Any]], options: argparse.Namespace
) -> list[str]:
    """Return the row that says how many times two cores of a CPU a device trains nano as fast."""
    ours = done.get(("nano", name))
    theirs = done.get(("nano-cpu", name), {}).get("iterations_a_second")
    if name == "regression" and options.cpu_rate:
        theirs = options.cpu_rate
    if ours is None or theirs is None:
        return []
    ratio = ours["iterations_a_second"] / theirs
    return [f"| nano | {name}: times two cores of a CPU | {ratio:.1f} |"]


def shown(value: Any) -> str:
    """Return a figure as a person reads it."""
    if isinstance(value, dict):
        return " ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parsed() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at the smallest size")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these, in this order")
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--compiled", type=Path, help="keep compiled kernels here")
    parser.add_argument("--cpu", action="store_true", help="also measure nano on two cores")
    parser.add_argument(
        "--cpu-rate", type=float, help="iterations a second of nano's regression on two cores"
    )
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
