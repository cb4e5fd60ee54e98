"""Recipes: what is built in is valid, and what is wrong is told with its place."""

from pathlib import Path

import pytest

from twostep.distill.recipe import DistillRecipe
from twostep.training.recipe import RecipeError, load_recipe, recipe_names

NAMES = {
    "nano",
    "nano-quick",
    "nano-lora",
    "nano-mse",
    "nano-style",
    "nano-full",
    "sdxl-lora-24gb",
    "sdxl-lora-80gb",
    "sdxl-full-8x80gb",
    "sdxl-2step-from-prompts",
}


def test_every_built_in_recipe_is_valid() -> None:
    assert set(recipe_names()) == NAMES
    for name in NAMES:
        load_recipe(name, DistillRecipe)


def test_an_override_reaches_into_lists() -> None:
    recipe = load_recipe("nano", DistillRecipe, ["phases.1.learning_rate=3e-7", "model=other"])
    assert recipe.phases[1].learning_rate == 3e-7
    assert recipe.model == "other"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.0.learning_rte=1", "Did you mean 'learning_rate'"),
        ("phases.99.learning_rate=1", "no position"),
        ("phases", "no override"),
        ("phases.0.iterations=0", "phases.0.iterations"),
        ("phases.0.objective=lcm", "phases.0.objective"),
        ("phases.0.student_steps=33", "no multiple"),
        ("phases.5.guidance=2", "of a student, into which"),
        ("phases.2.reuse=2", "only mse and convert"),
        ("phases.5.teacher_steps=16", "no phase before it"),
        ("phases.6.objective=conditional", "two phases train the same"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano", DistillRecipe, [override])


def test_a_missing_recipe_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'nano-lora'.*sdxl-lora-24gb"):
        load_recipe("nano-lroa", DistillRecipe)


def test_broken_toml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("loop = [")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(path, DistillRecipe)
