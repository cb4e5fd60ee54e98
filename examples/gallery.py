"""A gallery of the 2-step student beside its teacher, from the same noise, and the seconds that
every student takes.

    python examples/gallery.py [--model nano] [--seed 7] [--out out/gallery.png]
"""

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from contact_sheet import contact_sheet
from rich.console import Console
from rich.table import Table
from rich.text import Text

import twostep
from twostep.formats import read_contracts
from twostep.pipeline.output import prepare_folder

PROMPTS = (
    "a 3d red apple on a blue background",
    "a flat fox on a green background",
    "a noto penguin on a teal background",
    "a twemoji pizza on a purple background",
    "a 3d octopus on a yellow background",
    "a flat sunflower on a brown background",
    "a noto strawberry on a white background",
    "a twemoji owl on an orange background",
    "a 3d birthday cake on a pink background",
    "a flat cactus on a red background",
    "a noto ladybug on a gray background",
    "a twemoji mushroom on a black background",
)
NUM_SEEDS = 2
PIXELS = 128


def main(
    model: Annotated[str, typer.Option(help="A built-in name or a model folder.")] = "nano",
    seed: Annotated[int, typer.Option(help="The first seed of the gallery.")] = 7,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path(
        "out/gallery.png"
    ),
) -> None:
    """Draw every prompt with every step count, show two of them, and compare their times."""
    prepare_folder(out.parent)
    counts = sorted({contract.steps for contract in read_contracts(model)}, reverse=True)
    results_by_steps = {steps: draw(model, steps, seed) for steps in counts}
    fewest = 2 if 2 in counts else counts[-1]
    shown = [results_by_steps[counts[0]], results_by_steps[fewest]]
    rows = []
    for number, prompt in enumerate(PROMPTS):
        # Teacher and student of one noise stand side by side.
        pairs = zip(*(results[number].images for results in shown), strict=True)
        rows.append((prompt, list(chain.from_iterable(pairs))))
    contracts = [results[0].contract for results in shown]
    labels = [f"{contract.role}, {contract.steps} steps" for contract in contracts]
    scale = max(1, PIXELS // rows[0][1][0].width)
    contact_sheet(rows, labels * NUM_SEEDS, scale=scale).save(out)
    Console().print(speed_table(list(results_by_steps.values())))
    typer.echo(out)


def draw(model: str, steps: int, seed: int) -> list[twostep.Result]:
    """Draw all prompts in so many steps."""
    bundle = twostep.load(model, steps=steps)
    twostep.generate(bundle, twostep.Request(PROMPTS[0]))  # the first one takes longer
    requests = [twostep.Request(prompt, num_images=NUM_SEEDS, seed=seed) for prompt in PROMPTS]
    with Console(stderr=True).status(f"{steps} steps"):
        return [twostep.generate(bundle, request) for request in requests]


def speed_table(results: list[list[twostep.Result]]) -> Table:
    """Compare seconds per image; the first list is the teacher's."""
    table = Table("model", "steps", "seconds per image", "speed-up")
    teacher_seconds = mean_seconds(results[0])
    for drawn in results:
        contract = drawn[0].contract
        seconds = mean_seconds(drawn)
        speed_up = teacher_seconds / seconds
        table.add_row(
            Text(contract.name), str(contract.steps), f"{seconds:.3f}", f"{speed_up:.1f}x"
        )
    return table


def mean_seconds(results: list[twostep.Result]) -> float:
    """Return the mean seconds per image."""
    return sum(result.seconds_per_image for result in results) / len(results)


if __name__ == "__main__":
    typer.run(main)
