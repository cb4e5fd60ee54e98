"""Samples: the pictures that requests with their seeds would give, at every size, drawn once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from twostep.contract import ContractError
from twostep.distill import DistillRecipe, distil
from twostep.distill.chain import sample_examples
from twostep.distill.samples import Examples, SampleSheets
from twostep.models.bundle import Bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.training.run_folder import RunFolder

from .test_chain import make_recipe, stage
from .test_trainer import REGRESSION


def recipe(**values: object) -> DistillRecipe:
    return make_recipe(stage(4, 4, REGRESSION), release=[], **values)


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_a_sample_is_what_its_seed_gives(sampler: str, teacher: Bundle) -> None:
    prompts = ("a red fox", "")
    examples = Examples.of(teacher, prompts, size=(64, 32), seeds=(7, 2**40))
    drawn = examples.draw(teacher.denoiser, examples.unguided, 2, sampler)
    assert drawn.shape == (2, 2, 3, 32, 64)
    guided = encode_prompts(teacher, prompts, (64, 32), scale=1.0)
    for row, seed in enumerate(examples.seeds):
        latents = sample_prompts(teacher, guided, [seed, seed], (64, 32), steps=2, sampler=sampler)
        with torch.no_grad():
            assert torch.allclose(drawn[row], decode(teacher, latents), atol=1e-4)
    assert (drawn[0] - drawn[1]).abs().mean() > 1e-3


def test_sizes_and_seeds_are_the_recipes(teacher: Bundle) -> None:
    contract = replace(teacher.contract, sizes=((64, 64), (64, 32)))
    settings = recipe(sample_sizes=[[64, 32], [64, 64]], sample_seeds=[3, 4, 5])
    sampled = sample_examples(settings, replace(teacher, contract=contract))
    assert [(each.size, each.seeds) for each in sampled] == [
        ((64, 32), (3, 4, 5)),
        ((64, 64), (3, 4, 5)),
    ]
    (default,) = sample_examples(recipe(), teacher)
    assert (default.size, default.seeds) == ((64, 64), (0, 1))


def test_what_cannot_be_drawn_is_refused(teacher: Bundle) -> None:
    with pytest.raises(ContractError, match="asked for 63x64"):
        sample_examples(recipe(sample_sizes=[[63, 64]]), teacher)
    for values in ({"sample_seeds": [1]}, {"sample_seeds": [1, -1]}, {"sample_sizes": [[64, 0]]}):
        with pytest.raises(ValueError, match="|".join(values)):
            recipe(**values)


def test_a_sheet_is_drawn_once_and_anew_after_a_rollback(teacher: Bundle) -> None:
    """What was drawn just before the checkpoint counts there; sizes lie below each other."""
    written: dict[int, tuple[int, int]] = {}
    drawn: list[tuple[int, int]] = []
    examples = [Examples.of(teacher, ("",), size=size) for size in ((64, 32), (32, 64))]

    def draw(each: Examples) -> tuple[Image.Image, dict[str, float]]:
        drawn.append(each.size)
        return Image.new("RGB", each.size), {"diversity": float(len(drawn))}

    def write(iteration: int, sheet: Image.Image) -> None:
        written[iteration] = sheet.size

    sheets = SampleSheets(examples, draw, write)
    sheets.show(4)
    assert sheets.examine(4) == {"diversity": 1.0}
    assert (drawn, written) == ([(64, 32), (32, 64)], {4: (64, 96)})
    assert sheets.examine(4) == {"diversity": 3.0}
    assert sheets.examine(8) == {"diversity": 5.0}
    assert sorted(written) == [4, 8]


@pytest.mark.slow
def test_the_student_is_shown_from_iteration_0_on(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    changes = {"iterations": 3, "checkpoint_every": 3, "sample_every": 2, "learning_rate": 1e-3}
    settings = make_recipe(stage(4, 8, REGRESSION, **changes), release=[])
    folder = RunFolder(tmp_path, settings)
    distil(settings, teacher, source, folder, version="0", recipe_name="test")
    names = [f"4-regression-{iteration:06d}.png" for iteration in (0, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    pictures = [line["picture"] for line in lines if "picture" in line]
    assert pictures == [f"samples/{name}" for name in names]
    first, second = (Image.open(tmp_path / "samples" / names[i]) for i in (0, 1))
    assert first.size == second.size
    height = first.height // 4
    for row, is_same in enumerate((True, False, True, False)):
        # Enlarging mixes rows at their edges.
        box = (0, row * height + 16, first.width, (row + 1) * height - 16)
        assert (first.crop(box).tobytes() == second.crop(box).tobytes()) == is_same
