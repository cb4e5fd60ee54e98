"""A style variant: LoRAs that were distilled on the original teacher, put on a teacher that was fine-tuned since.

    python benchmarks/nano_variant.py examples/openmoji --judge examples/openmoji/judge.safetensors --style openmoji \
        --out runs/variant

The variant draws its own pictures, 32 guided steps of every prompt. Then the 8-, 4- and 2-step LoRAs of nano are put
on it as they are, at the scales of `twostep report`, and judged: is it the right thing, in the variant's style, how far
from the variant's own pictures; beside the variant at the same steps without them. The best scale is chosen on the
first prompts, by the report's `looks`, and by the judge's distance for comparison; the table is over the others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nano_table import TEACHER_STEPS, Row, Sampler, draw_row, to_float, write_sheet
from nano_tasks import Task, complete_tasks
from torch import Tensor

from twostep.evaluate.attributes import Attributes
from twostep.evaluate.diversity import pixel_diversity
from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.judge import Judge, load_judge
from twostep.evaluate.likeness import looks
from twostep.evaluate.metrics import evaluate
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.pretrain.captions import with_article
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import load_drawings
from twostep.reports.portability import SCALES

STEPS = (8, 4, 2)


def main(
    variant: Annotated[str, typer.Argument(help="The fine-tuned teacher: a model folder.")],
    out: Annotated[Path, typer.Option(help="Folder for table, sheet and cache.")] = Path(
        "runs/variant"
    ),
    judge_path: Annotated[
        Path | None, typer.Option("--judge", help="One that knows the variant's style.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="What that judge calls the variant's style.")
    ] = None,
    word: Annotated[
        str, typer.Option(help="The style word of the prompts; none at all if empty.")
    ] = "",
    drawings_path: Annotated[
        Path, typer.Option("--drawings", help="Folder of the drawings.")
    ] = DRAWINGS,
    count: Annotated[int, typer.Option(help="Prompts of the table.")] = 512,
    num_first: Annotated[
        int, typer.Option(help="Prompts before these, on which the scale is chosen.")
    ] = 128,
) -> None:
    """Randomness, judge, and write the table."""
    judge = load_judge(judge_path) if judge_path else load_judge()
    every = [
        _worded(task, word)
        for task in complete_tasks(load_drawings(drawings_path).concepts, num_first + count)
    ]
    first, tasks = every[:num_first], every[num_first:]
    base = load_bundle(variant)
    loras = LoraCache(base, fused=True, num_kept=1)
    guidance = base.contract.guidance
    cache = out / "cache"

    def drawn(row: Row, asked: list[Task]) -> Tensor:
        return draw_row(row, {"complete": asked}, cache)["complete"]

    def bare(steps: int, scale: float) -> Row:
        said = "guidance" if scale > 1 else "no guidance"
        return Row(
            f"{steps}-{scale:g}",
            f"{steps} steps, {said}",
            Sampler("euler", steps, scale),
            lambda: base,
        )

    def worn(steps: int, scale: float) -> Row:
        label = f"LoRA x {scale:g}, {steps} steps"
        stack = [f"nano_{steps}step_lora:{scale}"]
        return Row(
            f"lora-{steps}-{scale:g}",
            label,
            Sampler("euler", steps, 1.0),
            lambda: loras.apply(stack),
        )

    own = bare(TEACHER_STEPS, guidance)
    rows, sweep, of_first = [own], [], to_float(drawn(own, first))
    for steps in STEPS:
        seen = {scale: to_float(drawn(worn(steps, scale), first)) for scale in SCALES}
        found = {scale: _figures(seen[scale], of_first, first, judge, style) for scale in SCALES}
        sweep += [{"steps": steps, "scale": scale, **figures} for scale, figures in found.items()]
        best = min(found, key=lambda scale: found[scale]["looks"])
        rows += [bare(steps, guidance), bare(steps, 1.0), worn(steps, 1.0)]
        rows += [worn(steps, best)] if best != 1 else []
    pictures = {row.key: {"complete": drawn(row, tasks)} for row in rows}
    reference = to_float(pictures[own.key]["complete"])
    table = [
        {"label": row.label, "evaluations": row.sampler.num_evaluations}
        | _figures(to_float(pictures[row.key]["complete"]), reference, tasks, judge, style)
        for row in rows
    ]
    (out / "table.json").write_text(json.dumps({"rows": table, "sweep": sweep}, indent=2))
    text = _markdown(table, sweep)
    (out / "table.md").write_text(text)
    write_sheet(rows, pictures, tasks, out / "sheet.png")
    typer.echo(text)


def _worded(task: Task, word: str) -> Task:
    """Say the task with another word for the style, or with none; which style it shall be is asked
    for apart.
    """
    wish = task.attributes
    thing = with_article(f"{word} {wish.names[0]}".strip())
    prompt = f"{thing} on {with_article(f'{wish.background} background')}"
    return replace(task, prompt=prompt, attributes=Attributes(wish.names, None, wish.background))


def _figures(
    pictures: Tensor, reference: Tensor, tasks: list[Task], judge: Judge, style: str | None
) -> dict[str, Any]:
    statistics = judge.statistics(reference)
    report = evaluate(pictures, [task.attributes for task in tasks], judge, reference=statistics)
    in_style = None
    if style is not None:
        is_style = judge.judge(pictures).style.argmax(dim=1) == judge.classes.styles.index(style)
        in_style = is_style.float().mean().item()
    return {
        "concept": report.concept.share,
        "style": in_style,
        "background": report.background.share,
        "distance": report.frechet_to_reference,
        "looks": frechet_distance(fit_features(looks(pictures)), fit_features(looks(reference))),
        "difference": pixel_diversity(
            torch.cat([pictures, reference]), [*range(len(pictures))] * 2
        ),
    }


def _markdown(table: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> str:
    def shares(row: dict[str, Any]) -> str:
        return " | ".join(
            "" if row[k] is None else f"{100 * row[k]:.1f} %"
            for k in ("concept", "style", "background")
        )

    head = "concept | style | background | distance | looks | difference |"
    lines = [f"| | evaluations | {head}", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['label']} | {row['evaluations']} | {shares(row)} | {_distances(row)} |"
        for row in table
    ]
    lines += ["", f"| steps | scale | {head}", "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['steps']} | {row['scale']:g} | {shares(row)} | {_distances(row)} |"
        for row in sweep
    ]
    for steps in STEPS:
        mine = [row for row in sweep if row["steps"] == steps]
        by = {
            key: min(mine, key=lambda row: row[key])["scale"]
            for key in ("looks", "distance", "difference")
        }
        lines.append(
            f"\n{steps} steps, best scale: "
            + ", ".join(f"{scale:g} by {key}" for key, scale in by.items())
        )
    return "\n".join(lines) + "\n"


def _distances(row: dict[str, Any]) -> str:
    return f"{row['distance']:.2f} | {row['looks']:.5f} | {row['difference']:.4f}"


if __name__ == "__main__":
    typer.run(main)
