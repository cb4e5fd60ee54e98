"""A style LoRA on a few-step student: put there as it is, and trained on it by a recipe.

    twostep pretrain nano-noto --out runs/style         # a LoRA that draws as Noto does
    twostep cache runs/style/prompts.txt --lora runs/style/noto.safetensors \\
        --steps 16 --out runs/style/cache
    twostep distill nano-style --out runs/nano-style    # trains it on, on the 2-step student
    python benchmarks/nano_style.py                     # judges teacher and student with it
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.judge import load_judge
from twostep.evaluate.measurements import measure
from twostep.evaluate.metrics import evaluate
from twostep.media.image import from_levels, to_images
from twostep.models.loading import load_with_loras
from twostep.pretrain.captions import with_article
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.prompt_sets import FIRST_SEED, Task, complete_tasks
from twostep.reports.benchmark import draw_tasks

STYLE = "noto"
STYLED_TEACHER = "teacher with the style, 32 steps"
SHEET_COLUMNS = 12
LORA = Path("runs/style/noto.safetensors")
RETRAINED = Path("runs/nano-style/model/students/noto_2step_lora.safetensors")
Drawings = Annotated[Path, typer.Option("--drawings", help="Folder of the drawings.")]


def main(
    drawings_path: Drawings = DRAWINGS,
    retrained: Annotated[Path, typer.Option(help="The LoRA that was trained on.")] = RETRAINED,
    count: Annotated[int, typer.Option(help="Prompts, of which none names a style.")] = 256,
) -> None:
    """Judge pictures of prompts that name no style: is it the style, and still the right thing."""
    drawings = load_drawings(drawings_path)
    judge = load_judge()
    tasks = [_without_style(task) for task in complete_tasks(drawings.concepts, count)]
    attributes = [replace(task.attributes, style=STYLE) for task in tasks]
    rows = [
        ("teacher, 32 steps", [], 32),
        (STYLED_TEACHER, [str(LORA)], 32),
        ("student, 2 steps", [], 2),
        ("student with the style as it is", [str(LORA)], 2),
        ("student with the style trained on it", [str(retrained)], 2),
    ]
    pictures: dict[str, Tensor] = {}
    for label, loras, steps in rows:
        bundle = load_with_loras("nano", loras, steps=steps)
        pictures[label] = from_levels(draw_tasks(bundle, tasks, steps=steps))
    typer.echo("| | concept | style | background | distance to the styled teacher |")
    typer.echo("|---|---:|---:|---:|---:|")
    reference = measure(pictures[STYLED_TEACHER], attributes, judge)
    for label, drawn in pictures.items():
        report = evaluate(drawn, attributes, judge, reference=reference)
        scores = (report.concept, report.style, report.background)
        shares = " | ".join(f"{100 * (score.share or 0):.1f} %" for score in scores)
        typer.echo(f"| {label} | {shares} | {report.frechet_to_reference.value:.2f} |")
    chosen = list(range(0, count, max(1, count // SHEET_COLUMNS)))
    lines = [(label, to_images(drawn[chosen])) for label, drawn in pictures.items()]
    sheet = contact_sheet(lines, [tasks[i].prompt for i in chosen], scale=2)
    sheet.save(LORA.with_name("sheet.png"))


def _without_style(task: Task) -> Task:
    """Return the task without the word for its style, from another seed."""
    attributes = task.attributes
    background = with_article(f"{attributes.background} background")
    prompt = f"{with_article(attributes.names[0])} on {background}"
    return Task(
        prompt, Attributes(attributes.names, None, attributes.background), task.seed + FIRST_SEED
    )


if __name__ == "__main__":
    typer.run(main)
