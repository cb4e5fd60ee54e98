"""`twostep report --lora`: how strong a few-step LoRA should be on bases that it was not made for.

Every base draws the same prompts from the same noise: in its own steps with its own guidance, in as
few steps as the LoRA makes, and with the LoRA at several scales. The table says how far each set of
pictures is from the base's own.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from rich.console import Console
from rich.table import Table
from torch import Tensor

from twostep.contract import ContractError
from twostep.distill.samples import Examples
from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.likeness import looks
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.training.device import find_device

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The scales of a LoRA that are compared."""

_THINGS = (
    "a red apple",
    "a dog",
    "a car",
    "a house",
    "a tree",
    "a fish",
    "a guitar",
    "a smiling face",
)
PROMPTS = tuple(
    f"{thing} on a {colour} background" for thing, colour in product(_THINGS, ("blue", "white"))
)
"""What is drawn where no prompts are given: words that every model knows."""


def print_scales(lora: str, bases: Sequence[str], prompts: tuple[str, ...]) -> None:
    """Print how near a LoRA comes to every base's own pictures, and its best scale.

    The best scale, on each base and on all together, is that whose pictures look most like the
    base's own. Raises ContractError for a LoRA that makes no few-step students, and ModelError or
    ContractError for a base that is not there or does not take it.
    """
    table = Table("base", "drawn")
    table.add_column("difference", justify="right")
    table.add_column("looks", justify="right")
    distances: dict[str, list[float]] = {}
    for base in bases:
        distances[base] = _compare(lora, base, prompts, table)
    distances["all"] = [sum(at_scale) for at_scale in zip(*distances.values(), strict=True)]
    Console().print(table)
    for name, at_scales in distances.items():
        best = SCALES[at_scales.index(min(at_scales))]
        Console().print(f"best scale on {name}: {best:g}")


def _compare(lora: str, base: str, prompts: tuple[str, ...], table: Table) -> list[float]:
    """Add a row for every way of drawing to the table.

    Returns the distance in `looks` to the base's own pictures at each of `SCALES`.
    """
    (_, reference), *drawn = _drawings(lora, base, prompts)
    reference_features = fit_features(looks(reference))
    distances = []
    for label, pictures in drawn:
        distance = frechet_distance(fit_features(looks(pictures)), reference_features)
        # root mean square of each picture, in values of -1..1
        difference = (pictures - reference).square().mean(dim=(1, 2, 3)).sqrt().mean()
        table.add_row(base, label, f"{difference:.4f}", f"{distance:.5f}")
        distances.append(distance)
    return distances[-len(SCALES) :]


def _drawings(lora: str, base: str, prompts: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield labels and pictures [pictures, 3, height, width] in -1..1.

    The first are the base's own, in its steps with its guidance. Then come those in as few steps as
    the LoRA makes, with guidance and without, and those with the LoRA at each of `SCALES`.
    """
    cache = LoraCache(load_bundle(base).to(find_device("auto")), num_kept=1)
    bundle = cache.bundle
    student = cache.apply([lora]).contract
    if student.role != "student":
        raise ContractError(
            f"{lora} makes no few-step students, so there is no best scale. Give a LoRA that does."
        )
    examples = Examples.of(bundle, prompts)
    for steps in (bundle.contract.steps, student.steps):
        pictures = examples.draw(bundle.denoiser, examples.guided, steps)
        yield f"{steps} steps, guidance {bundle.contract.guidance:g}", pictures.flatten(0, 1)
    pictures = examples.draw(bundle.denoiser, examples.unguided, student.steps)
    yield f"{student.steps} steps, no guidance", pictures.flatten(0, 1)
    for scale in SCALES:
        scaled = cache.apply([f"{lora}:{scale}"])
        examples = Examples.of(scaled, prompts)
        pictures = examples.draw(scaled.denoiser, examples.unguided, student.steps)
        yield f"{student.steps} steps, LoRA x {scale:g}", pictures.flatten(0, 1)
