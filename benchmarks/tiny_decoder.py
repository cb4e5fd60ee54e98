"""What a tiny decoder saves and what it costs: time, likeness, and the judge's verdict.

On pictures of nano's student of two steps, of the prompts that models are measured on: both
decoders make pictures of the same latents. Times are the processor's, in turns, so that what else
the machine does hardly matters; take one thread (OMP_NUM_THREADS=1). With `--sdxl` also SDXL's
decoder beside one of TAESD's size, with random weights.

    python benchmarks/tiny_decoder.py [DECODER] [--count 480] [--sdxl 512]
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from twostep.engines.engine import registered_engine
from twostep.evaluate.judge import load_judge
from twostep.evaluate.measurements import measure
from twostep.evaluate.metrics import summarise
from twostep.formats.locate import SDXL_CONFIGS, read_json
from twostep.formats.tiny_decoder import TinyLayout
from twostep.media.codec import FULL, TINY
from twostep.media.patches import psnr
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.models.tiny_decoder import build_decoder
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.pretrain.prompt_sets import Task, complete_tasks

AT_ONCE = 16
RESAMPLES = 10_000


def main(
    decoder: Annotated[str, typer.Argument(help="as --decoder takes it")] = TINY,
    count: Annotated[int, typer.Option(help="pictures that are judged")] = 480,
    rounds: Annotated[int, typer.Option(help="timed calls of each")] = 60,
    sdxl: Annotated[int | None, typer.Option(help="also at SDXL's size, in pixels")] = None,
    out: Annotated[Path, typer.Option(help="folder of the figures")] = Path("out/decoder"),
) -> None:
    """Measure a tiny decoder of nano."""
    figures: dict[str, object] = {"decoder": decoder, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        figures |= nano(decoder, count, rounds)
        if sdxl is not None:
            figures["sdxl"] = at_sdxl_size(sdxl)
    text = json.dumps(figures, indent=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decoder.json").write_text(text)
    print(text)


def nano(decoder: str, count: int, rounds: int) -> dict[str, object]:
    """Return the figures on nano's pictures."""
    studio = Studio("cpu")
    bundle = studio.load(Request("x", steps=2))
    tiny = studio.load(Request("x", steps=2, decoder=decoder))
    judge = load_judge()
    tasks = complete_tasks(judge.classes.concepts, count)
    latents = torch.cat([draw(bundle, tasks[i : i + AT_ONCE]) for i in range(0, count, AT_ONCE)])
    pictures = {
        name: torch.cat([each.codec.decode(part) for part in latents.split(AT_ONCE)])
        for name, each in ((FULL, bundle), (TINY, tiny))
    }
    near = [psnr(a, b).item() for a, b in zip(*pictures.values(), strict=True)]
    figures: dict[str, object] = {
        "psnr": {"median": statistics.median(near), "quartiles": statistics.quantiles(near)},
        "judged": judged(pictures, tasks, judge),
        "milliseconds": {},
    }
    one, four = latents[:1], latents[:4]
    for engine in ("eager", "openvino"):
        ready = {
            name: registered_engine(engine).prepare(each, [(64, 64)]).codec
            for name, each in ((FULL, bundle), (TINY, tiny))
        }
        for batch in (one, four):
            calls = {name: lambda c=codec, x=batch: c.decode(x) for name, codec in ready.items()}
            figures["milliseconds"][f"{engine}, {len(batch)}"] = timed(calls, rounds)
    return figures


def draw(bundle, tasks: list[Task]) -> Tensor:
    """Return latents of tasks, each from its seed."""
    guided = encode_prompts(bundle, [task.prompt for task in tasks], (64, 64))
    return sample_prompts(bundle, guided, [task.seed for task in tasks], (64, 64))


def judged(pictures: dict[str, Tensor], tasks: list[Task], judge) -> dict[str, object]:
    """Return the judge's shares of right pictures, and how they differ, in paired resamples."""
    answers = {}
    figures: dict[str, object] = {}
    for name, images in pictures.items():
        measured = measure(images, [task.attributes for task in tasks], judge)
        report = summarise(measured, images)
        figures[name] = {
            each: [
                getattr(report, each).share,
                getattr(report, each).low,
                getattr(report, each).high,
            ]
            for each in ("concept", "style", "background")
        }
        right = {
            "concept": [
                task.attributes.names[0] in judge.classes.concepts[i].names
                for task, i in zip(tasks, measured.concept.tolist(), strict=True)
            ],
            "style": [
                task.attributes.style == judge.classes.styles[i]
                for task, i in zip(tasks, measured.style.tolist(), strict=True)
            ],
            "background": [
                task.attributes.background == judge.classes.backgrounds[i]
                for task, i in zip(tasks, measured.background.tolist(), strict=True)
            ],
        }
        answers[name] = np.array(list(right.values()), dtype=float)
    difference = answers[TINY] - answers[FULL]
    rows = np.random.default_rng(0).integers(len(tasks), size=(RESAMPLES, len(tasks)))
    for i, each in enumerate(("concept", "style", "background")):
        means = difference[i][rows].mean(axis=1)
        figures[f"change of {each}"] = [
            float(difference[i].mean()),
            *np.quantile(means, (0.025, 0.975)).tolist(),
        ]
    return figures


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, object]:
    """Time calls in turns, and return medians with quartiles, and of the ratio of each round."""
    for call in calls.values():
        call()  # the first one may compile
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    ratios = [full / tiny for full, tiny in zip(*seconds.values(), strict=True)]
    rows = {name: [1000 * each for each in values] for name, values in seconds.items()}
    rows["full over tiny"] = ratios
    return {
        name: [round(each, 3) for each in (statistics.median(row), *statistics.quantiles(row)[::2])]
        for name, row in rows.items()
    }


def at_sdxl_size(pixels: int, rounds: int = 5) -> dict[str, object]:
    """Time SDXL's decoder and one of TAESD's size in milliseconds, with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(read_json(SDXL_CONFIGS / "vae" / "config.json"))
    vae = vae.eval().to(memory_format=torch.channels_last)
    tiny = build_decoder(TinyLayout(4, 64, (3, 3, 3, 1))).eval()
    tiny = tiny.to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, pixels // 8, pixels // 8)
    calls = {FULL: lambda: vae.decode(x).sample, TINY: lambda: tiny(x)}
    return {"pixels": pixels, **timed(calls, rounds)}


if __name__ == "__main__":
    typer.run(main)
