"""Every method through the whole chain on a random nano: trained, resumed, released, drawn from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twostep.distill import DistillRecipe, distil
from twostep.distill.plan import plan
from twostep.export.writing import export
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.training.recipe import find_recipe, load_recipe, recipe_names
from twostep.training.run_folder import RunFolder

from ..conftest import Handful

METHODS = {
    "lcm": {"method": {"name": "lcm", "least_guidance": 2.0}, "guidance": 4.0},
    "lcm-lora": {"method": {"name": "lcm"}, "guidance": 4.0, "lora_rank": 4},
    "add": {"method": {"name": "add"}, "guidance": 2.0},
    "add-judge": {"method": {"name": "add", "features": "judge"}},
    "ladd": {"method": {"name": "ladd", "low_noise_iterations": 1}},
    "ladd-lora": {
        "method": {"name": "ladd", "real": "teacher"},
        "teacher_steps": 4,
        "lora_rank": 4,
    },
    "dmd2": {"method": {"name": "dmd2", "fake_turns": 2}, "guidance": 2.0},
    "dmd2-lora": {
        "method": {"name": "dmd2", "fake_turns": 2},
        "lora_rank": 4,
        "gradient_checkpointing": True,
    },
    "dmd2-1": {
        "method": {"name": "dmd2", "regression_iterations": 2},
        "student_steps": 1,
        "teacher_steps": 4,
    },
}


def make_recipe(stage: dict[str, object]) -> DistillRecipe:
    values = {
        "student_steps": 4,
        "iterations": 4,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "warmup_iterations": 0,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
        **stage,
    }
    return DistillRecipe.model_validate(
        {"sample_prompts": ["a red fox"], "stages": [values], "release": [4, 1]}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_resumes_is_released_and_draws(name: str, bundle: Bundle, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die(stage: object, iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    teacher = replace(bundle, contract=replace(bundle.contract, steps=2))
    recipe = make_recipe(METHODS[name])
    source = Handful(teacher.text)
    base = {key: value.clone() for key, value in teacher.denoiser.network.state_dict().items()}
    options = {"version": "0", "recipe_name": "test"}
    whole = distil(recipe, teacher, source, RunFolder(tmp_path / "whole", recipe), **options)
    with pytest.raises(Killed):
        folder = RunFolder(tmp_path / "cut", recipe)
        distil(recipe, teacher, source, folder, on_iteration=die, **options)
    folder = RunFolder(tmp_path / "cut", recipe)
    (path,) = distil(recipe, teacher, source, folder, **options).values()
    assert path.read_bytes() == next(iter(whole.values())).read_bytes()
    # Whatever was put on the teacher's network is off it again.
    now = teacher.denoiser.network.state_dict()
    assert list(now) == list(base)
    assert all(torch.equal(value, base[key]) for key, value in now.items())

    student = load_bundle(path)
    steps = recipe.stages[0].student_steps
    assert (student.contract.steps, student.contract.sampler) == (steps, "renoise")
    seen = []
    result = generate(student, Request("a red fox", seed=3), on_step=seen.append)
    assert (len(seen), len(result.images)) == (steps, 1)
    again = generate(student, Request("a red fox", seed=3))
    assert again.images[0].tobytes() == result.images[0].tobytes()

    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [line["student_loss"] for line in log if "student_loss" in line]
    assert losses and all(torch.isfinite(torch.tensor(losses)))
    card = tmp_path / "out.md"
    if student.contract.lora_rank is not None:
        export(path, "lora-peft", tmp_path / "out.safetensors", base=str(tmp_path / "whole/model"))
    else:
        export(path, "diffusers", tmp_path / "out")
        card = tmp_path / "out" / "README.md"
    text = card.read_text()
    times = {"lcm": "[999, 759, 499, 259]", "dmd2-1": "[399]"}
    expected = times.get(name.removesuffix("-lora"), "[999, 749, 499, 249]")
    assert f"timesteps={expected}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in recipe_names()
        if name.endswith(("-lcm", "-lcm-lora", "-add", "-ladd", "-dmd2"))
    ],
)
def test_the_built_in_recipe_is_planned(name: str, bundle: Bundle, tmp_path: Path) -> None:
    """On nano's networks, whatever the recipe's own model is: a plan needs no weights."""
    save_bundle(bundle, tmp_path / "model")
    recipe = load_recipe(name, DistillRecipe, [f"model={tmp_path / 'model'}", "data=builtin"])
    planned = plan(recipe)
    assert [entry.stage.name for entry in planned.stages] == [recipe.stages[0].name]
    assert planned.stages[0].trained["student"] > 0
    head = find_recipe(name).read_text().split("\n\n")[0]
    assert "# sources:" in head and "not run" in head
