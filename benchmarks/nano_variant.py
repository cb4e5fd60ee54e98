"""A style variant: LoRAs that were distilled on the original teacher, on a fine-tuned one.

    python benchmarks/nano_variant.py examples/openmoji --style openmoji \\
        --judge examples/openmoji/judge.safetensors --out runs/variant

The variant is a teacher that was fine-tuned after the LoRAs had been distilled. It draws its own
pictures, 32 guided steps of every prompt. Then the 8-, 4- and 2-step LoRAs of nano are applied to
it unchanged, at the scales of `twostep report`, and judged: is it the right thing, in the variant's
style, how far from the variant's own pictures; beside the variant at the same steps without them.
The best scale is chosen on the first prompts, by the report's `looks`, and by the judge's distance
for comparison; the table is over the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.diversity import pixel_diversity
from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.judge import Judge, load_judge
from twostep.evaluate.likeness import looks
from twostep.evaluate.measurements import measure
from twostep.evaluate.metrics import evaluate
from twostep.media.image import from_levels, to_images
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.pretrain.captions import with_article
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.prompt_sets import Task, complete_tasks
from twostep.reports.benchmark import draw_tasks
from twostep.reports.portability import SCALES

STEPS = (8, 4, 2)
TEACHER_STEPS = 32
SHEET_COLUMNS = 16


@dataclass(frozen=True)
class Row:
    """One row of the table: what it is called, how it is drawn, and how to load what draws it."""

    key: str
    label: str
    steps: int
    guidance: float
    load: Callable[[], Bundle]

    @property
    def num_evaluations(self) -> int:
        """Network evaluations per picture."""
        return self.steps * (2 if self.guidance > 1 else 1)


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
    """Draw, judge, and write the table."""
    judge = load_judge(judge_path) if judge_path else load_judge()
    concepts = load_drawings(drawings_path).concepts
    every = [_worded(task, word) for task in complete_tasks(concepts, num_first + count)]
    first = every[:num_first]
    tasks = every[num_first:]
    base = load_bundle(variant)
    loras = LoraCache(base, fused=True, num_kept=1)
    guidance = base.contract.guidance
    cache = out / "cache"

    def pictures_of(row: Row, wanted: list[Task]) -> Tensor:
        return draw_tasks(row.load(), wanted, steps=row.steps, scale=row.guidance, cache=cache)

    variant_row = _row_without_lora(base, TEACHER_STEPS, guidance)
    reference_of_first = from_levels(pictures_of(variant_row, first))
    rows = [variant_row]
    sweep: list[dict[str, Any]] = []
    for steps in STEPS:
        first_pictures = {
            scale: from_levels(pictures_of(_row_with_lora(loras, steps, scale), first))
            for scale in SCALES
        }
        figures_by_scale = {
            scale: _figures(drawn, reference_of_first, first, judge=judge, style=style)
            for scale, drawn in first_pictures.items()
        }
        for scale, figures in figures_by_scale.items():
            sweep.append({"steps": steps, "scale": scale, **figures})
        best = min(figures_by_scale, key=lambda scale: figures_by_scale[scale]["looks"])
        rows.append(_row_without_lora(base, steps, guidance))
        rows.append(_row_without_lora(base, steps, 1.0))
        rows.append(_row_with_lora(loras, steps, 1.0))
        if best != 1:
            rows.append(_row_with_lora(loras, steps, best))
    pictures = {row.key: pictures_of(row, tasks) for row in rows}
    reference = from_levels(pictures[variant_row.key])
    table = []
    for row in rows:
        drawn = from_levels(pictures[row.key])
        figures = _figures(drawn, reference, tasks, judge=judge, style=style)
        evaluations = row.num_evaluations
        table.append({"label": row.label, "evaluations": evaluations, **figures})
    (out / "table.json").write_text(json.dumps({"rows": table, "sweep": sweep}, indent=2))
    text = _markdown(table, sweep)
    (out / "table.md").write_text(text)
    _write_sheet(rows, pictures, tasks, out / "sheet.png")
    typer.echo(text)


def _write_sheet(
    rows: Sequence[Row], pictures: Mapping[str, Tensor], tasks: Sequence[Task], path: Path
) -> None:
    """Lay the same prompts of every row out, from the same noise."""
    chosen = list(range(0, len(tasks), max(1, len(tasks) // SHEET_COLUMNS)))[:SHEET_COLUMNS]
    lines = [(row.label, to_images(from_levels(pictures[row.key][chosen]))) for row in rows]
    contact_sheet(lines, [tasks[i].prompt for i in chosen], scale=2).save(path)


def _row_without_lora(variant: Bundle, steps: int, guidance: float) -> Row:
    """Return the row of the variant by itself, at a guidance scale; 1 is none."""
    guided = "guidance" if guidance > 1 else "no guidance"
    return Row(
        key=f"{steps}-{guidance:g}",
        label=f"{steps} steps, {guided}",
        steps=steps,
        guidance=guidance,
        load=lambda: variant,
    )


def _row_with_lora(loras: LoraCache, steps: int, scale: float) -> Row:
    """Return the row of the variant with nano's LoRA for so many steps on it, at a scale."""
    stack = [f"nano_{steps}step_lora:{scale}"]
    return Row(
        key=f"lora-{steps}-{scale:g}",
        label=f"LoRA x {scale:g}, {steps} steps",
        steps=steps,
        guidance=1.0,
        load=lambda: loras.apply(stack),
    )


def _worded(task: Task, word: str) -> Task:
    """Return the task with another word for the style in its prompt, or with none.

    Its attributes name no style: whether pictures are in the variant's is judged apart.
    """
    attributes = task.attributes
    thing = with_article(f"{word} {attributes.names[0]}".strip())
    background = with_article(f"{attributes.background} background")
    return replace(
        task,
        prompt=f"{thing} on {background}",
        attributes=Attributes(attributes.names, None, attributes.background),
    )


def _figures(
    pictures: Tensor, reference: Tensor, tasks: list[Task], *, judge: Judge, style: str | None
) -> dict[str, Any]:
    """Return what the table says of pictures, against the variant's own of the same prompts."""
    attributes = [task.attributes for task in tasks]
    measured = measure(reference, attributes, judge)
    report = evaluate(pictures, attributes, judge, reference=measured)
    distance = report.frechet_to_reference
    in_style = None
    if style is not None:
        is_style = judge.judge(pictures).style.argmax(dim=1) == judge.classes.styles.index(style)
        in_style = is_style.float().mean().item()
    return {
        "concept": report.concept.share,
        "style": in_style,
        "background": report.background.share,
        "distance": None if distance is None else distance.value,
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
        of_steps = [row for row in sweep if row["steps"] == steps]
        best = {
            key: min(of_steps, key=lambda row: row[key])["scale"]
            for key in ("looks", "distance", "difference")
        }
        scales = ", ".join(f"{scale:g} by {key}" for key, scale in best.items())
        lines.append(f"\n{steps} steps, best scale: {scales}")
    return "\n".join(lines) + "\n"


def _distances(row: dict[str, Any]) -> str:
    return f"{row['distance']:.2f} | {row['looks']:.5f} | {row['difference']:.4f}"


if __name__ == "__main__":
    typer.run(main)
