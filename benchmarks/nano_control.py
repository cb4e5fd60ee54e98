"""The silhouette ControlNet, trained on the teacher, used unchanged on it and on its students.

    twostep pretrain nano-judge --out runs/judge-wide -o name=wide-judge -o loop.iterations=2500 \\
        -o placement.smallest_scale=0.6 -o placement.shift_pixels=9 -o placement.rotation_degrees=20
    python benchmarks/nano_control.py --judge runs/judge-wide/judge.safetensors

Every prompt is complete ("a 3d red apple on a blue background"), and its silhouette is that of a
real drawing of the same thing in the same style, at a place, size and angle of which none was drawn
in training, and which are freer than those of the teacher's own pictures: the judge that ships has
not seen such places, hence one of its own. Measured: how far the drawn silhouette agrees with the
one asked for (intersection over union; in the drawn picture, what differs from its background), and
what the judge sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.judge import BUILT_IN, load_judge
from twostep.evaluate.metrics import evaluate
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.networks.control import Hint, load_control
from twostep.pretrain.control import PLACEMENT, hints_of
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import DrawingSet, lay_on, load_drawings, place_drawings
from twostep.pretrain.prompt_sets import Task, complete_tasks
from twostep.pretrain.sizes import NANO

HELD_OUT_SEED = 2**20
"""Above every seed that a recipe may have."""

THRESHOLD = 0.25
"""How far the colour of a pixel, in 0..1, is from the background where it belongs to the drawing.
"""

BATCH = 64


@dataclass(frozen=True)
class Targets:
    """What is to be drawn: prompts, their silhouettes, and real pictures that are right in every
    way.
    """

    tasks: list[Task]
    masks: UInt8[Tensor, "tasks height width"]
    real: Float[Tensor, "tasks 3 height width"]
    backgrounds: Float[Tensor, "tasks 3"]


def make_targets(drawings: DrawingSet, count: int) -> Targets:
    """Return prompts with silhouettes at held-out places."""
    tasks = complete_tasks(drawings.concepts, count)
    numbers = {concept.names[0]: number for number, concept in enumerate(drawings.concepts)}
    concept = [numbers[task.attributes.names[0]] for task in tasks]
    style = [drawings.styles.index(str(task.attributes.style)) for task in tasks]
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    chosen = drawings.drawings[concept, style]
    placed = place_drawings(chosen, PLACEMENT, generator, pixels=NANO.pixels)
    background = torch.tensor(
        [list(BACKGROUNDS).index(str(task.attributes.background)) for task in tasks]
    )
    colours = torch.tensor(list(BACKGROUNDS.values()))[background] / 255
    masks = (placed[:, 3] > 0.5).to(torch.uint8)
    return Targets(tasks, masks, real=lay_on(placed, background), backgrounds=colours)


@torch.no_grad()
def draw(
    bundle: Bundle, targets: Targets, control: Path | None, scale: float
) -> Float[Tensor, "tasks 3 height width"]:
    """Draw every task, with the silhouettes given to a ControlNet, or without if there is none."""
    size = (NANO.pixels, NANO.pixels)
    network = None
    if control is not None:
        pixels_per_latent = NANO.pixels // bundle.latent_shape(*size)[-1]
        network = load_control(str(control), bundle.denoiser.network, pixels_per_latent)
    pictures = []
    for start in range(0, len(targets.tasks), BATCH):
        tasks = targets.tasks[start : start + BATCH]
        guided = encode_prompts(bundle, [task.prompt for task in tasks], size)
        if network is not None:
            silhouette = hints_of(targets.masks[start : start + BATCH])
            hint = Hint(network, silhouette, scale, frozenset(range(1, 1001)))
            guided = guided.shown(None, (hint,))
        latents = sample_prompts(bundle, guided, [task.seed for task in tasks], size)
        pictures.append(decode(bundle, latents))
    return torch.cat(pictures)


def silhouettes(
    pictures: Float[Tensor, "tasks 3 height width"], backgrounds: Float[Tensor, "tasks 3"]
) -> Bool[Tensor, "tasks height width"]:
    """Return where pictures differ from the background that was asked for."""
    difference = ((pictures + 1) / 2 - backgrounds[:, :, None, None]).abs().amax(1)
    return difference > THRESHOLD


def agreement(
    drawn: Bool[Tensor, "tasks height width"], wanted: UInt8[Tensor, "tasks 64 64"]
) -> Float[Tensor, " tasks"]:
    """Return the intersection over the union of each pair of silhouettes, in 0..1."""
    intersection = (drawn & wanted.bool()).flatten(1).sum(1)
    union = (drawn | wanted.bool()).flatten(1).sum(1)
    return intersection / union.clamp(min=1)


def main(
    control: Annotated[Path, typer.Option(help="The ControlNet's folder.")] = Path(
        "twostep/weights/nano/controlnet"
    ),
    drawings_path: Annotated[
        Path, typer.Option("--drawings", help="Folder of the drawings.")
    ] = DRAWINGS,
    count: Annotated[int, typer.Option(help="Prompts.")] = 512,
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps to draw in; 32 is the teacher.")
    ] = None,
    judge_path: Annotated[
        Path, typer.Option("--judge", help="A judge that has seen such places.")
    ] = BUILT_IN,
    scale: Annotated[float, typer.Option(help="How strongly the ControlNet acts.")] = 1.0,
    sheet: Annotated[Path, typer.Option(help="Where to write a sheet of pictures.")] = Path(
        "runs/silhouette.png"
    ),
) -> None:
    """Print agreement and accuracy, for real pictures and for every model with and without the
    ControlNet.
    """
    drawings = load_drawings(drawings_path)
    judge = load_judge(judge_path)
    targets = make_targets(drawings, count)
    rows: list[tuple[str, Tensor]] = [("real pictures", targets.real)]
    for number in steps or (32, 8, 4, 2, 1):
        bundle = load_bundle("nano", steps=number)
        is_teacher = bundle.contract.role == "teacher"
        name = "teacher, 32 steps" if is_teacher else f"student, {number} steps"
        rows.append((name, draw(bundle, targets, control, scale)))
        rows.append((f"{name}, without", draw(bundle, targets, None, scale)))
    typer.echo("| | agreement | concept | style | background |\n|---|---:|---:|---:|---:|")
    attributes = [task.attributes for task in targets.tasks]
    for name, pictures in rows:
        report = evaluate(pictures, attributes, judge)
        drawn = silhouettes(pictures, targets.backgrounds)
        agreed = agreement(drawn, targets.masks).mean()
        scores = (report.concept, report.style, report.background)
        shares = " | ".join(f"{100 * (score.share or 0):.1f} %" for score in scores)
        typer.echo(f"| {name} | {100 * agreed:.1f} % | {shares} |")
    _write_sheet(targets, rows, sheet)


def _write_sheet(targets: Targets, rows: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Lay out ten of the prompts: their silhouettes, and the pictures of every row."""
    stride = max(1, len(targets.tasks) // 10)
    chosen: Int[Tensor, " few"] = torch.arange(0, len(targets.tasks), stride)[:10]
    wanted = ("silhouette", hints_of(targets.masks) * 2 - 1)
    lines = [(name, to_images(pictures[chosen])) for name, pictures in (wanted, *rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(lines, [targets.tasks[int(i)].prompt for i in chosen], scale=2).save(path)


if __name__ == "__main__":
    typer.run(main)
