"""Steps of the teacher's whole walks: they are what it walked, and it is not asked again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twostep.data.drawn import WalkedSource, walked_by_teacher
from twostep.diffusion import trained_times
from twostep.distill.methods.adversarial import Adversarial
from twostep.distill.pairs import Batches
from twostep.distill.plan import plan
from twostep.distill.recipe import DistillRecipe
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.training.loop import Randomness
from twostep.training.recipe import RecipeError

from .test_landings import CPU, count_calls, landings_of, make_stage
from .test_trainer import make_student, numbers


def walks_by(teacher: Bundle, folder: Path, *, steps: int = 4, count: int = 3) -> WalkedSource:
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox\na bird\n")
    options = {"prompts": str(prompts), "count": count, "steps": steps, "sampler": "dpmpp-2m"}
    return walked_by_teacher(teacher, folder, lambda *_: None, **options)


def test_a_step_is_one_of_the_teachers_walk_and_the_teacher_is_not_asked(
    teacher: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = replace(teacher, contract=replace(teacher.contract, guidance=3.0))
    source = walks_by(teacher, tmp_path)
    calls = count_calls(monkeypatch)
    taken = landings_of(make_stage({"walks": True})).draw(
        0, Batches(source, 16, CPU), teacher.denoiser, Randomness.at(0, 0)
    )
    assert calls == []
    walked = {}
    for item in source.items:
        states = []
        guided = encode_prompts(teacher, [item.prompt], (64, 64))
        sample_prompts(
            teacher,
            guided,
            [item.seed],
            (64, 64),
            steps=4,
            sampler="dpmpp-2m",
            keep=lambda x, s, states=states: states.append(x[0].half().float()) or x,
        )
        walked[item] = dict(zip((750, 500, 250, 0), states, strict=True))
    times = set()
    for place in range(16):
        t, s = int(taken.t[place]), int(taken.s[place])
        times.add((t, s))
        (item,) = (one for one, walk in walked.items() if torch.equal(walk[s], taken.x_s[place]))
        if t < 1000:
            assert torch.equal(walked[item][t], taken.x_t[place])
        text = teacher.text.conditioning([item.prompt], 64, 64).text
        assert torch.equal(taken.conditioning.text[place : place + 1], text)
    assert times == {(1000, 500), (750, 250), (500, 0), (250, 0)}
    # From pure noise the walk begins.
    from_noise = taken.x_t[taken.t == 1000]
    assert float(from_noise.std()) == pytest.approx(1.0, abs=0.1)


def test_parts_of_a_batch_are_the_whole(teacher: Bundle, tmp_path: Path) -> None:
    source = walks_by(teacher, tmp_path)
    landings = landings_of(make_stage({"walks": True}))
    random = [Randomness.at(0, 0) for _ in range(3)]
    whole = landings.draw(0, Batches(source, 8, CPU), teacher.denoiser, random[0])
    parts = [
        landings.draw(
            0, Batches(source, 8, CPU, part=part, num_parts=2), teacher.denoiser, random[1 + part]
        )
        for part in range(2)
    ]
    assert torch.equal(whole.x_s, torch.cat([part.x_s for part in parts]))
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))


@pytest.mark.parametrize("method", [{}, {"name": "adversarial"}])
def test_students_learn_from_walks(
    teacher: Bundle, tmp_path: Path, method: dict[str, object]
) -> None:
    source = walks_by(teacher, tmp_path)
    stage = make_stage({**method, "walks": True}, batch_size=4, iterations=12, learning_rate=2e-4)
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher))
    figures = [numbers(trainer.iterate(i, Randomness.at(0, 0))) for i in range(12)]
    if method:
        assert isinstance(trainer.method, Adversarial)
        assert figures[-1]["student_loss"] != figures[0]["student_loss"]
    else:
        # The same draw again and again.
        assert figures[-1]["student_loss"] < 0.5 * figures[0]["student_loss"]


def test_what_does_not_fit_walks_is_refused(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="leave bank and reuse out"):
        make_stage({"walks": True, "reuse": 2})
    with pytest.raises(ValueError, match="leave bank and reuse out"):
        make_stage({"walks": True, "bank": "bank"})
    with pytest.raises(ValueError, match="leave guidance out"):
        make_stage({"walks": True}, guidance=2.0)
    with pytest.raises(ValueError, match="walks are the teacher's"):
        make_stage({"name": "adversarial", "real": "data", "walks": True})
    with pytest.raises(ValueError, match="walks in a conversion"):
        make_stage({"name": "conversion", "walks": True}, teacher_steps=None)
    random = Randomness.at(0, 0)
    landings = landings_of(make_stage({"walks": True}))
    with pytest.raises(RecipeError, match="walked_by_teacher"):
        landings.draw(0, Batches(source, 16, CPU), teacher.denoiser, random)
    walks = walks_by(teacher, tmp_path, steps=6, count=1)
    with pytest.raises(RecipeError, match=r"teacher_steps 4, and the data hold walks of 6 steps"):
        landings.draw(0, Batches(walks, 16, CPU), teacher.denoiser, random)
    landings = landings_of(make_stage({"walks": True}, teacher_steps=6))
    assert 750 in trained_times(2)
    with pytest.raises(RecipeError, match=r"6 steps do not come by the time (750|250)"):
        landings.draw(0, Batches(walks, 16, CPU), teacher.denoiser, random)


@pytest.mark.parametrize("method", ["regression", "adversarial"])
def test_a_stage_that_learns_from_walks_is_planned(method: str) -> None:
    stage = make_stage({"name": method, "walks": True}, batch_size=2)
    recipe = DistillRecipe(model="nano", sample_prompts=["a fox"], stages=(stage,))
    (planned,) = plan(recipe).stages
    assert planned.evaluations == 0


def test_walks_cost_no_call_of_the_teacher() -> None:
    assert landings_of(make_stage({"walks": True})).cost().teacher_evaluations == 0
    assert landings_of(make_stage({})).cost().teacher_evaluations == 2
