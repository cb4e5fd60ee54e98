"""A style LoRA on a few-step student: put there as it is, and trained on it by `twostep distill
nano-style`.

    python benchmarks/nano_style.py train                    # a LoRA that draws like Noto where no style is named
    twostep cache runs/style/prompts.txt --lora runs/style/noto.safetensors --steps 16 --out runs/style/cache
    twostep distill nano-style --out runs/nano-style         # trains it on, on the 2-step student
    python benchmarks/nano_style.py table                    # judges teacher and student with it

The LoRA is trained as users train theirs: on the teacher, by the noise it has to predict, on
pictures of one style.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from nano_table import Sampler, draw, to_float
from nano_tasks import FIRST_SEED, Task, complete_tasks
from safetensors.torch import save_file
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.judge import load_judge
from twostep.evaluate.metrics import evaluate
from twostep.media.image import to_images
from twostep.models.loading import load_bundle, load_with_loras
from twostep.networks.adapters import PREFIX, add_lora
from twostep.pretrain.captions import Omission, with_article
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.latents import cache_latents
from twostep.pretrain.sizes import NANO
from twostep.pretrain.teacher import noise_loss
from twostep.training.loop import training_attention

STYLE = "noto"
LORA = Path("runs/style/noto.safetensors")
PROMPTS = LORA.with_name("prompts.txt")
RETRAINED = Path("runs/nano-style/model/students/noto_2step_lora.safetensors")
Drawings = Annotated[Path, typer.Option("--drawings", help="Folder of the drawings.")]
app = typer.Typer(no_args_is_help=True)


@app.command()
def train(
    drawings_path: Drawings = DRAWINGS,
    iterations: int = 500,
    rank: int = 8,
    batch_size: int = 32,
) -> None:
    """Train the style on the teacher."""
    bundle, emoji = load_bundle("nano"), load_drawings(drawings_path)
    column = emoji.styles.index(STYLE)
    drawings = replace(emoji, drawings=emoji.drawings[:, [column]], styles=(STYLE,))
    cached = cache_latents(drawings, bundle.codec, pixels=NANO.pixels, variants=24)
    latents = replace(cached, omission=Omission(everything=0.1, style=1.0, background=0.2))
    lora = add_lora(bundle.denoiser.network, "style", rank=rank)
    optimiser = torch.optim.AdamW(lora.parameters(), lr=1e-3, weight_decay=0.0)
    denoiser = replace(bundle.denoiser, lora=lora.name)
    tensors, words = torch.Generator().manual_seed(0), random.Random(0)
    for iteration in range(iterations):
        x0, captions = latents.draw(batch_size, tensors, words)
        told = bundle.text.conditioning(captions, NANO.pixels, NANO.pixels)
        with training_attention("cpu"):
            t = torch.randint(1, 1001, (batch_size,), generator=tensors)
            eps = torch.randn(x0.shape, generator=tensors)
            loss = noise_loss(denoiser, x0, told, t, eps, snr_limit=5)
            loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - iteration / iterations)
        optimiser.step()
        optimiser.zero_grad()
        if iteration % 50 == 0:
            typer.echo(f"{iteration} {loss.item():.4f}")
    LORA.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{PREFIX}{key}": value.contiguous() for key, value in lora.state_dict().items()}, LORA
    )
    PROMPTS.write_text("\n".join(filter(None, latents.draw(600, tensors, words)[1])))
    typer.echo(f"written: {LORA}, {PROMPTS}")


@app.command()
def table(
    drawings_path: Drawings = DRAWINGS,
    retrained: Path = RETRAINED,
    count: Annotated[int, typer.Option(help="Prompts, of which none names a style.")] = 256,
) -> None:
    """Judge pictures of prompts that name no style: does it draw in the style, and still the right
    thing.
    """
    emoji, judge = load_drawings(drawings_path), load_judge()
    tasks = [_without_style(task) for task in complete_tasks(emoji.concepts, count)]
    wishes = [replace(task.attributes, style=STYLE) for task in tasks]
    few, many = (
        Sampler("euler", 2, 1.0),
        Sampler("euler", 32, load_bundle("nano").contract.guidance),
    )
    rows = [
        ("teacher, 32 steps", 32, [], many),
        ("teacher with the style, 32 steps", 32, [str(LORA)], many),
        ("student, 2 steps", 2, [], few),
        ("student with the style as it is", 2, [str(LORA)], few),
        ("student with the style trained on it", 2, [str(retrained)], few),
    ]
    pictures: dict[str, Tensor] = {}
    for label, steps, loras, sampler in rows:
        bundle = load_with_loras("nano", loras, steps=steps)
        parts = [draw(bundle, sampler, tasks[start : start + 64]) for start in range(0, count, 64)]
        pictures[label] = to_float(torch.cat(parts))
    typer.echo(
        "| | concept | style | background | distance to the styled teacher |\n|---|---:|---:|---:|---:|"
    )
    reference = judge.statistics(pictures["teacher with the style, 32 steps"])
    for label, *_ in rows:
        report = evaluate(pictures[label], wishes, judge, reference=reference)
        shares = " | ".join(
            f"{100 * (score.share or 0):.1f} %"
            for score in (report.concept, report.style, report.background)
        )
        typer.echo(f"| {label} | {shares} | {report.frechet_to_reference:.2f} |")
    chosen = range(0, count, count // 12)
    lines = [(label, to_images(pictures[label][list(chosen)])) for label, *_ in rows]
    contact_sheet(lines, [tasks[i].prompt for i in chosen], scale=2).save(
        LORA.with_name("sheet.png")
    )


def _without_style(task: Task) -> Task:
    wish = task.attributes
    prompt = f"{with_article(wish.names[0])} on {with_article(f'{wish.background} background')}"
    return Task(prompt, Attributes(wish.names, None, wish.background), task.seed + FIRST_SEED)


if __name__ == "__main__":
    app()
