"""What of a recipe may change under a run, key by key, and what its defaults come to."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from twostep.distill.methods.registry import find_method, method_names
from twostep.distill.recipe import DistillRecipe
from twostep.training.loop import LoopSettings
from twostep.training.recipe import WHILE_RUNNING
from twostep.training.run_folder import RunError, RunFolder

STAGES: list[dict[str, Any]] = [
    {"student_steps": 4, "method": {"name": "regression"}},
    {"student_steps": 4, "method": {"name": "adversarial", "objective": "conditional"}},
    {"student_steps": 2, "method": {"name": "adversarial", "objective": "unconditional"}},
]


def recipe(stages: dict[int, dict[str, Any]] | None = None, **values: Any) -> DistillRecipe:
    """A chain of three stages with some values changed."""
    shared = {"teacher_steps": 8, "iterations": 6, "batch_size": 2, "learning_rate": 1e-5}
    changed = [{**stage, **(stages or {}).get(i, {})} for i, stage in enumerate(STAGES)]
    base = {"sample_prompts": ["a fox"], "model": "nano", "defaults": shared, "stages": changed}
    return DistillRecipe.model_validate(base | values)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose first stage is finished and whose second is at iteration 3."""
    folder = RunFolder(tmp_path / "run", recipe())
    folder.save("4-regression-finished", {"weights": {}})
    folder.save("4-adversarial-conditional", {"iteration": 3})
    return folder.path


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"stages": {1: {"iterations": 9}}}, "stages.1.iterations: 6 -> 9"),
        ({"stages": {1: {"learning_rate": 1e-6}}}, "stages.1.learning_rate: 1e-05 -> 1e-06"),
        ({"stages": {1: {"precision": "fp32"}}}, "stages.1.precision: bf16 -> fp32"),
        (
            {
                "stages": {
                    1: {"method": {**STAGES[1]["method"], "discriminator_learning_rate": 1e-6}}
                }
            },
            "stages.1.method.discriminator_learning_rate: nothing -> 1e-06",
        ),
        ({"stages": {2: {"batch_size": 4}}}, "stages.2.batch_size: 2 -> 4"),
        ({"stages": {2: {"seed": 7}}}, "stages.2.seed: 0 -> 7"),
        ({"stages": {2: {"optimiser": "prodigy"}}}, "stages.2.optimiser: adamw -> prodigy"),
        ({"stages": {1: {"betas": (0.5, 0.9)}}}, "stages.1.betas: nothing -> (0.5, 0.9)"),
        ({"stages": {1: {"eps": 1e-6}}}, "stages.1.eps: nothing -> 1e-06"),
        ({"stages": {1: {"schedule": "linear"}}}, "stages.1.schedule: nothing -> linear"),
        ({"stages": {0: {"log_every": 2}}}, "stages.0.log_every: 50 -> 2"),
        ({"stages": {0: {"checkpoint_every": 2}}}, "stages.0.checkpoint_every: 500 -> 2"),
        ({"sample_prompts": ["a cat"]}, "sample_prompts: ('a fox',) -> ('a cat',)"),
        ({"trackers": ["tensorboard"]}, "trackers: () -> ('tensorboard',)"),
        ({"device": "cpu"}, "device: auto -> cpu"),
        ({"health": {"action": "rollback"}}, "health: "),
        ({"model": "./nano"}, "model: nano -> ./nano"),
        ({"data": "elsewhere"}, "data: nothing -> elsewhere"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_cannot_change_the_weights_so_far_may_change(
    values: dict[str, Any], line: str, run: Path
) -> None:
    now = recipe(**values)
    folder = RunFolder(run, now)
    assert next(map(str, folder.changes)).startswith(line)
    assert len(folder.changes) == 1
    assert folder.settled(now) == now
    (logged,) = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert logged["changed"][0].startswith(line)
    assert tomllib.loads((run / "run.toml").read_text()) == now.model_dump(
        mode="json", exclude_none=True
    )
    del folder
    assert RunFolder(run, now).changes == ()


@pytest.mark.parametrize(
    ("values", "refusals"),
    [
        ({"stages": {0: {"learning_rate": 1e-6}}}, ["stages.0.learning_rate: 1e-05 -> 1e-06"]),
        ({"stages": {0: {"iterations": 9}}}, ["stages.0.iterations: 6 -> 9", "is finished"]),
        ({"stages": {1: {"iterations": 2}}}, ["stages.1.iterations: 6 -> 2", "3 are done"]),
        ({"stages": {1: {"seed": 1}}}, ["stages.1.seed: 0 -> 1", "shaped the weights"]),
        ({"stages": {1: {"guidance": 2.0}}}, ["stages.1.guidance: 1 -> 2"]),
        (
            {"stages": {1: {"optimiser": "lion"}}},
            ["stages.1.optimiser: adamw -> lion", "shaped the weights"],
        ),
        ({"stages": {1: {"student_steps": 2}}}, ["stages.1: 4-adversarial-conditional -> 2-adv"]),
        ({"base_precision": "bf16"}, ["base_precision: fp32 -> bf16"]),
        (
            {"base_precision": "bf16", "stages": {0: {"seed": 1}, 1: {"log_every": 1}}},
            ["base_precision", "stages.0.seed"],
        ),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_what_may_not_is_named_key_by_key(
    values: dict[str, Any], refusals: list[str], run: Path
) -> None:
    before = (run / "run.toml").read_text()
    with pytest.raises(RunError) as error:
        RunFolder(run, recipe(**values))
    assert all(words in str(error.value) for words in refusals)
    assert "log_every" not in str(error.value)
    assert (run / "run.toml").read_text() == before


@pytest.mark.parametrize("name", method_names())
def test_every_rate_of_a_method_may_change_while_it_runs(name: str) -> None:
    fields = find_method(name).Settings.model_fields
    rates = {key: field.json_schema_extra for key, field in fields.items() if "_rate" in key}
    assert list(rates.values()) == [WHILE_RUNNING] * len(rates)


@pytest.mark.parametrize(
    ("method", "rate"),
    [("dmd2", "fake_learning_rate"), ("ladd", "heads_learning_rate")],
)
def test_rates_of_other_methods_may_change_too(method: str, rate: str, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"teacher_steps": None, "method": {"name": method}}
    folder = RunFolder(tmp_path / "run", recipe({0: stage}))
    folder.save(f"4-{method}", {"iteration": 3})
    del folder
    stage["method"] = {"name": method, rate: 1e-7}
    changes = RunFolder(tmp_path / "run", recipe({0: stage})).changes
    assert [str(change) for change in changes] == [f"stages.0.method.{rate}: nothing -> 1e-07"]


def test_stages_may_come_and_go_after_those_that_have_begun(run: Path) -> None:
    values = recipe().model_dump(mode="json", exclude_none=True)
    shorter = DistillRecipe.model_validate({**values, "stages": values["stages"][:2]})
    assert [str(change) for change in RunFolder(run, shorter).changes] == [
        "stages.2: 2-adversarial-unconditional -> nothing"
    ]
    assert [str(change) for change in RunFolder(run, recipe()).changes] == [
        "stages.2: nothing -> 2-adversarial-unconditional"
    ]


def test_before_the_first_checkpoint_anything_may_change(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", recipe())
    now = recipe({0: {"seed": 3, "iterations": 1}}, base_precision="bf16")
    assert len(RunFolder(tmp_path / "run", now).changes) == 3


def test_defaults_of_another_version_do_not_reach_a_run_that_has_begun(run: Path) -> None:
    """As if weight_decay had been 0.3 by default in the version that began the run."""
    values = tomllib.loads((run / "run.toml").read_text())
    for stage in values["stages"]:
        stage["weight_decay"] = 0.3
        # And this key had not been there at all.
        del stage["keep_checkpoints"]
    (run / "run.toml").write_text(tomli_w.dumps(values))
    folder = RunFolder(run, recipe())
    assert folder.changes == ()
    assert [stage.weight_decay for stage in folder.settled(recipe()).stages] == [0.3, 0.3, 0.3]
    del folder
    # What the recipe states counts, though.
    with pytest.raises(RunError, match=r"stages\.0\.weight_decay: 0\.3 -> 0 \(4-regr"):
        RunFolder(run, recipe({0: {"weight_decay": 0.0}}))


def test_a_key_that_was_stated_and_is_no_more_goes_back_to_its_default(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", recipe({2: {"weight_decay": 0.3}}))
    folder = RunFolder(tmp_path / "run", recipe())
    assert [str(change) for change in folder.changes] == ["stages.2.weight_decay: 0.3 -> 0"]


def test_line_ends_and_runs_of_older_versions_are_the_same_recipe(run: Path) -> None:
    record = run / "run.toml"
    record.write_bytes(record.read_bytes().replace(b"\n", b"\r\n"))
    (run / "run.json").unlink()
    assert RunFolder(run, recipe()).changes == ()


def test_a_recipe_that_this_version_does_not_know_is_named(run: Path) -> None:
    record = run / "run.toml"
    record.write_text("teapot = 3\n" + record.read_text())
    with pytest.raises(RunError, match=r"cannot go on with \(teapot: Extra inputs"):
        RunFolder(run, recipe())


def test_what_was_replaced_under_a_run_is_refused_unless_it_is_accepted(run: Path) -> None:
    folder = RunFolder(run, recipe())
    assert folder.compare_contents({"model": "a", "data": "b"}) == []
    assert folder.compare_contents({"model": "a", "data": "b"}) == []
    with pytest.raises(RunError, match=r"What data names has been replaced .* --accept-replaced"):
        folder.compare_contents({"model": "a", "data": "c"})
    assert folder.compare_contents({"model": "a", "data": "c"}, accept=True) == ["data"]
    assert folder.compare_contents({"model": "a", "data": "c"}) == []


def test_before_anything_was_trained_data_may_be_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", recipe())
    folder.compare_contents({"data": "b"})
    assert folder.compare_contents({"data": "c"}) == ["data"]


def test_the_log_survives_half_a_line(tmp_path: Path) -> None:
    settings = LoopSettings(iterations=1, batch_size=1, learning_rate=1.0)
    folder = RunFolder(tmp_path / "run", settings)
    folder.log(part="a", loss=0.5)
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    folder.log(part="a", loss=0.25)
    first, second = log.read_text().splitlines()
    assert not first.endswith("}")
    assert json.loads(second)["loss"] == 0.25
