"""What `twostep report --lora` draws, compares and prints: a few-step LoRA on several bases, at
several strengths.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from twostep.contract import ContractError
from twostep.distill.samples import Examples
from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.likeness import looks
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.training.device import find_device

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
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
    """Print how near a LoRA comes to every base's own pictures, and the scale that looks most like
    them.
    """
    table, found = (
        Table(
            "base", "drawn", *(Column(name, justify="right") for name in ("difference", "looks"))
        ),
        {},
    )
    for base in bases:
        (_, own), *drawn = _drawn(lora, base, prompts)
        as_own = fit_features(looks(own))
        distances = [
            frechet_distance(fit_features(looks(pictures)), as_own) for _, pictures in drawn
        ]
        for (label, pictures), distance in zip(drawn, distances, strict=True):
            apart = (pictures - own).square().mean(dim=(1, 2, 3)).sqrt().mean()  # per pixel value
            table.add_row(base, label, f"{apart:.4f}", f"{distance:.5f}")
        found[base] = distances[-len(SCALES) :]
    Console().print(table)
    for name, distances in (
        found | {"all": list(map(sum, zip(*found.values(), strict=True)))}
    ).items():
        Console().print(f"best scale on {name}: {SCALES[distances.index(min(distances))]:g}")


def _drawn(lora: str, base: str, prompts: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield pictures with how they were drawn: by the base in its own steps, in as few as the
    LoRA's, and with it.
    """
    cache = LoraCache(load_bundle(base).to(find_device("auto")), num_kept=1)
    bundle, few = cache.bundle, cache.apply([lora]).contract
    if few.role != "student":
        raise ContractError(
            f"{lora} makes no few-step students, so there is no best scale. Give a LoRA that does."
        )
    examples = Examples.of(bundle, prompts)
    for steps in (bundle.contract.steps, few.steps):
        label = f"{steps} steps, guidance {bundle.contract.guidance:g}"
        yield label, examples.draw(bundle.denoiser, examples.guided, steps).flatten(0, 1)
    yield (
        f"{few.steps} steps, no guidance",
        examples.draw(bundle.denoiser, examples.unguided, few.steps).flatten(0, 1),
    )
    for scale in SCALES:
        worn = cache.apply([f"{lora}:{scale}"])
        examples = Examples.of(worn, prompts)
        pictures = examples.draw(worn.denoiser, examples.unguided, few.steps)
        yield f"{few.steps} steps, LoRA x {scale:g}", pictures.flatten(0, 1)
