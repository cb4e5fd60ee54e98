"""A gallery of the 2-step student beside its teacher, from the same noise, and the seconds that
every student takes.

python examples/gallery.py [--model nano] [--seed 7] [--out out/gallery.png]
"""

from pathlib import Path
from typing import Annotated

import typer
from contact_sheet import contact_sheet
from rich.console import Console
from rich.table import Table
from rich.text import Text

import twostep
from twostep.formats import read_contracts
from twostep.pipeline.png import prepare_folder

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
    """Draw every prompt with every step count, show two of them side by side, and compare their
    times.
    """
    prepare_folder(out.parent)
    counts = sorted({contract.steps for contract in read_contracts(model)}, reverse=True)
    drawn = {steps: draw(model, steps, seed) for steps in counts}
    shown = [drawn[counts[0]], drawn[2 if 2 in drawn else counts[-1]]]
    rows = [
        (
            prompt,
            [
                image
                for pair in zip(*(results[i].images for results in shown), strict=True)
                for image in pair
            ],
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    labels = [
        f"{contract.role}, {contract.steps} steps"
        for contract in (results[0].contract for results in shown)
    ]
    contact_sheet(rows, labels * NUM_SEEDS, scale=max(1, PIXELS // rows[0][1][0].width)).save(out)
    Console().print(speed_table(list(drawn.values())))
    typer.echo(out)


def draw(model: str, steps: int, seed: int) -> list[twostep.Result]:
    """Draw all prompts; one picture goes first, so that the times are those of a machine that has
    run before.
    """
    bundle = twostep.load(model, steps=steps)
    twostep.generate(bundle, twostep.Request(PROMPTS[0]))
    with Console(stderr=True).status(f"{steps} steps"):
        return [
            twostep.generate(bundle, twostep.Request(p, num_images=NUM_SEEDS, seed=seed))
            for p in PROMPTS
        ]


def speed_table(results: list[list[twostep.Result]]) -> Table:
    """Compare seconds per image; the first list is the teacher's."""
    table = Table("model", "steps", "seconds per image", "speed-up")
    seconds = [sum(result.seconds_per_image for result in drawn) / len(drawn) for drawn in results]
    for drawn, each in zip(results, seconds, strict=True):
        contract = drawn[0].contract
        table.add_row(
            Text(contract.name), str(contract.steps), f"{each:.3f}", f"{seconds[0] / each:.1f}x"
        )
    return table


if __name__ == "__main__":
    typer.run(main)
