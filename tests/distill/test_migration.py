"""Old recipes, of phases and objectives, are refused, and mean the same once rewritten."""

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill.migration import migrate
from twostep.distill.recipe import DistillRecipe
from twostep.training.recipe import RecipeError, load_recipe

OLD = sorted((Path(__file__).parent / "old_recipes").glob("*.toml"))
METHODS = {
    "mse": ("regression", None),
    "convert": ("conversion", None),
    "conditional": ("lightning", "conditional"),
    "unconditional": ("lightning", "unconditional"),
}
OF_METHODS = {
    "reuse": 1,
    "discriminator_learning_rate": None,
    "discriminator_lora": False,
    "r1_weight": 0.0,
    "early_weight": 1,
}
"""Settings that every phase had, with the defaults that they had."""


@pytest.fixture(params=OLD, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_it_is_refused_with_the_command_that_rewrites_it(old: Path) -> None:
    with pytest.raises(RecipeError, match=r"twostep recipe --migrate OLD\.toml"):
        load_recipe(old, DistillRecipe)


def test_every_stage_means_what_its_phase_meant(old: Path) -> None:
    before = tomllib.loads(old.read_text())
    after = DistillRecipe.model_validate(tomllib.loads(migrate(old.read_text())))
    assert len(after.stages) == len(before["phases"])
    for phase, stage in zip(before["phases"], after.stages, strict=True):
        objective = phase.pop("objective")
        name, variant = METHODS[objective]
        assert (stage.method.name, stage.method.variant) == (name, variant)
        settings = {key: phase.pop(key, default) for key, default in OF_METHODS.items()}
        for key, value in settings.items():
            if hasattr(stage.method, key):
                assert getattr(stage.method, key) == value, key
        if objective == "convert":
            assert stage.teacher_steps is None
            del phase["teacher_steps"]
        left = {key: field.default for key, field in type(stage).model_fields.items()}
        for key in left.keys() - {"method", "teacher_steps"}:
            assert getattr(stage, key) == phase.pop(key, left[key]), key
        assert phase.pop("teacher_steps", None) == stage.teacher_steps
        assert not phase
    dumped = after.model_dump(mode="json", exclude_none=True)
    for key in before.keys() - {"phases"}:
        assert dumped[key] == before[key], key


def test_it_says_common_things_once_and_keeps_its_first_comment(old: Path) -> None:
    text = migrate(old.read_text())
    assert text.startswith(old.read_text().splitlines()[0])
    stages = [part.split("[stages.method]")[0] for part in text.split("[[stages]]")[1:]]
    assert "[defaults]" in text
    assert not any("gradient_checkpointing" in stage for stage in stages)


def test_a_limit_of_the_gap_becomes_a_setting_of_the_method() -> None:
    phase = (
        "student_steps = 4\nteacher_steps = 8\niterations = 1\nbatch_size = 2\nlearning_rate = 1e-4"
    )
    text = "\n".join(
        [
            'sample_prompts = ["x"]',
            "[health]\naction = 'pause'\nlargest_gap = 3.0",
            f"[[phases]]\nobjective = 'mse'\n{phase}",
            f"[[phases]]\nobjective = 'conditional'\nr1_weight = 2.0\n{phase}",
            f"[[phases]]\nobjective = 'unconditional'\n{phase}",
            "lora_rank = 4\ndiscriminator_lora = true",
        ]
    )
    recipe = DistillRecipe.model_validate(tomllib.loads(migrate(text)))
    assert recipe.health.action == "pause"
    _, first, second = (stage.method for stage in recipe.stages)
    assert (first.largest_gap, second.largest_gap) == (3.0, 3.0)
    assert (first.name, second.name) == ("adversarial", "lightning")
    assert (first.r1_weight, first.perturbation, first.levels) == (2.0, 0.01, "mid")
    assert (first.loss, first.discriminator_precision) == ("non-saturating", "stage")
    assert first.noised_weights == (1.0, 1.0, 1.0, 1.0)
    assert (first.discriminator_lora, second.discriminator_lora) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases = [", "not valid TOML"),
        ("model = 'nano'", "nothing to rewrite"),
        ("[[phases]]\nobjective = 'lcm'", "objective is 'lcm'"),
        ("[[phases]]\nobjective = 'mse'", "no valid recipe before"),
    ],
)
def test_what_cannot_be_rewritten_says_why(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        migrate(text)


def test_the_command_prints_it(old: Path, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["recipe", "--migrate", str(old)])
    assert answer.exit_code == 0, answer.output
    new = tmp_path / "new.toml"
    new.write_text(answer.stdout)
    assert load_recipe(new, DistillRecipe).stages
    both = CliRunner().invoke(app, ["recipe", "nano", "--migrate", str(old)])
    assert both.exit_code == 2
