"""Recipes: what is built in is valid, and what is wrong is told with its place."""

from pathlib import Path

import pytest

from twostep.distill.decoder import DecoderRecipe
from twostep.distill.recipe import DistillRecipe
from twostep.training.recipe import RecipeError, find_recipe, load_recipe, recipe_names

NAMES = {
    "nano",
    "nano-quick",
    "nano-lora",
    "nano-mse",
    "nano-style",
    "nano-full",
    "sdxl-lora-24gb",
    "sdxl-lora-80gb",
    "mini",
    "mini-lora",
    "sdxl-full-8x80gb",
    "sdxl-2step-from-prompts",
    "nano-audio",
    "nano-audio-mse",
    "nano-audio-all",
    "nano-motion-chain",
    "nano-motion-lora",
    "animatediff-sd15",
    "animatediff-sdxl",
    "stable-audio",
    *(f"nano-{method}" for method in ("lcm", "lcm-lora", "add", "ladd", "dmd2")),
    *(f"sdxl-{method}" for method in ("lcm", "lcm-lora", "add", "ladd", "dmd2")),
}
DECODERS = {"nano-decoder", "sdxl-decoder"}


def test_every_built_in_recipe_is_valid() -> None:
    assert set(recipe_names()) == NAMES | DECODERS
    for name in NAMES:
        load_recipe(name, DistillRecipe)
    for name in DECODERS:
        load_recipe(name, DecoderRecipe)


def test_an_override_reaches_into_lists() -> None:
    overrides = ["stages.1.learning_rate=3e-7", "model=other", "stages.2.method.early_weight=2"]
    recipe = load_recipe("nano", DistillRecipe, overrides)
    assert recipe.stages[1].learning_rate == 3e-7
    assert recipe.stages[2].method.early_weight == 2
    assert recipe.model == "other"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_recipes_are_read_as_editors_and_shells_save_them(encoding: str, tmp_path: Path) -> None:
    """Windows' Notepad puts a mark in front, and `>` of its shell writes UTF-16."""
    text = find_recipe("nano").read_text(encoding="utf-8").replace("\n", "\r\n")
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode(encoding))
    assert load_recipe(path, DistillRecipe) == load_recipe("nano", DistillRecipe)


def test_a_recipe_in_no_encoding_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for data in (b"\xff\xfe\0", "# caf\u00e9".encode("latin-1"), b"\x89PNG\r\n"):
        path.write_bytes(data)
        with pytest.raises(RecipeError, match="is not valid TOML") as caught:
            load_recipe(path, DistillRecipe)
        assert len(str(caught.value).splitlines()) == 1


def test_what_is_wrong_in_every_stage_is_told_once_for_each() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("nano-quick", DistillRecipe, ["defaults.optimiser=nope"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(load_recipe("nano-quick", DistillRecipe).stages) == 2
    for number, line in enumerate(lines):
        assert f"stages.{number}.optimiser" in line and "'prodigy'" in line


BRIEF = """
sample_prompts = ["x"]

[defaults]
batch_size = 4
iterations = 1
learning_rate = 1e-4
student_steps = 4
teacher_steps = 8

[defaults.methods.adversarial]
r1_weight = 3.0

[[stages]]
batch_size = 8
method = { name = "regression" }

[[stages]]
method = { name = "adversarial", objective = "conditional" }

[[stages]]
method = { name = "adversarial", objective = "unconditional", r1_weight = 0.0 }
"""


def test_a_stage_says_what_differs_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(BRIEF)
    stages = load_recipe(path, DistillRecipe, ["defaults.iterations=7"]).stages
    assert [stage.batch_size for stage in stages] == [8, 4, 4]
    assert [stage.iterations for stage in stages] == [7, 7, 7]
    assert [stage.method.r1_weight for stage in stages[1:]] == [3.0, 0.0]
    assert [stage.name for stage in stages] == [
        *("4-regression", "4-adversarial-conditional", "4-adversarial-unconditional")
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("defaults.batch_sise=2", "defaults.batch_sise: no such key. Did you mean 'batch_size'"),
        ("defaults.r1_weight=2", r"belongs in \[defaults.methods.adversarial\]"),
        ("defaults.methods.adversarial.r3_weight=2", "Did you mean 'r[12]_weight'"),
        ("defaults.methods.thunder.r1_weight=2", "there is no method 'thunder'"),
    ],
)
def test_a_wrong_default_is_named(override: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(BRIEF)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path, DistillRecipe, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.learning_rte=1", "Did you mean 'learning_rate'"),
        ("stages.99.learning_rate=1", "no position"),
        ("stages", "no override"),
        ("model.0=other", "'nano' is a value, which has no '0'"),
        ("model.a.b=1", "is a value, which has no 'a'"),
        ("stages.0.iterations=0", "stages.0.iterations"),
        ("stages.0.method.name=magic", "there is no method 'magic'"),
        ("stages.0.method.name=regresion", "Did you mean 'regression'"),
        ("stages.0.method.name=nowhere:Nothing", "cannot be imported"),
        ("stages.0.method.r1_weight=1", "no setting 'r1_weight'. It is one of 'adversarial'"),
        ("stages.2.method.erly_weight=1", "Did you mean 'early_weight'"),
        (
            "stages.2.method.early_weight=0",
            "stages.2.method: .*early_weight: .*greater than or equal",
        ),
        (
            "stages.2.r1_weight=1",
            r"r1_weight is a setting of the method adversarial.*\[stages.method\]",
        ),
        ("stages.0.student_steps=33", "no multiple"),
        ("stages.5.guidance=2", "of a student, into which"),
        ("stages.2.method.levels=mid", "no setting 'levels'. It is one of 'adversarial'"),
        ("stages.5.teacher_steps=16", "no stage before it"),
        ("stages.6.method.objective=conditional", "two stages train the same"),
        ("stages.10.teacher_steps=2", "own frozen copy teaches: leave teacher_steps out"),
        ("phases=[]", "twostep recipe --migrate OLD.toml"),
        ("stages.1.optimiser=adam", "stages.1.optimiser: .*'adafactor', 'prodigy' or 'lion'"),
        ("stages.1.schedule=step", "stages.1.schedule: .*'constant', 'cosine' or 'linear'"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano", DistillRecipe, [override])


@pytest.mark.parametrize("optimiser", ["adamw8bit", "adafactor", "prodigy"])
def test_shards_are_not_for_optimisers_that_look_at_whole_tensors(optimiser: str) -> None:
    said = f"asks for {optimiser}, .*shard = true: choose adamw or lion"
    changes = [f"defaults.optimiser={optimiser}", "shard=true"]
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano-full", DistillRecipe, changes)
    load_recipe("nano-full", DistillRecipe, ["defaults.optimiser=lion", "shard=true"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shard=true", "asks for offload, which takes no shards"),
        ("defaults.optimiser=adamw8bit", "another optimiser than adamw8bit"),
    ],
)
def test_offloading_is_for_whole_state_of_32_bits(change: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("nano-full", DistillRecipe, ["defaults.offload=true", change])


def test_a_missing_recipe_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'nano-lora'.*sdxl-lora-24gb"):
        load_recipe("nano-lroa", DistillRecipe)


def test_broken_toml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("loop = [")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(path, DistillRecipe)
