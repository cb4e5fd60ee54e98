"""The teacher's landings: a bank gives what no bank gives, asks the teacher once, and is refused
where it is another's. Parts of a batch add up to the whole.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twostep.distill.bank import CHUNK, Bank
from twostep.distill.landings import Landings, _bank_randomness
from twostep.distill.methods.regression import Regression
from twostep.distill.pairs import Batches, Transition
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.training.loop import Randomness
from twostep.training.recipe import RecipeError

from .test_trainer import make_student, numbers

CPU = torch.device("cpu")


def make_stage(method: dict[str, object], **changes: object) -> Stage:
    values = {
        "student_steps": 2,
        "teacher_steps": 4,
        "iterations": 6,
        "batch_size": CHUNK,
        "learning_rate": 1e-3,
        "warmup_iterations": 1,
        "precision": "fp32",
        "method": {"name": "regression", **method},
    }
    return Stage.model_validate(values | changes)


def landings_of(stage: Stage) -> Landings:
    method = stage.make_method()
    assert isinstance(method, Regression)
    return method.landings


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of items whenever a teacher walks."""
    from twostep.distill import landings

    calls: list[int] = []
    real: Callable[..., Transition] = landings.teacher_step

    def counted(start: object, *args: object, **settings: object) -> Transition:
        taken = real(start, *args, **settings)
        calls.append(len(taken.x_t))
        return taken

    monkeypatch.setattr(landings, "teacher_step", counted)
    return calls


def test_a_bank_gives_what_the_teacher_gives_and_asks_it_once(
    teacher: Bundle, source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    stage = make_stage({"bank": tmp_path / "bank", "bank_size": 3 * CHUNK})
    batches = Batches(source, CHUNK, CPU)
    random = Randomness.at(0, 0)
    drawn = [landings_of(stage).draw(i, batches, teacher.denoiser, random) for i in range(3)]
    assert calls == [CHUNK] * 3
    # Computed without a bank from the same numbers.
    plain = landings_of(make_stage({}))
    expected = [
        plain.draw(0, batches, teacher.denoiser, _bank_randomness(number)) for number in range(3)
    ]
    found = {float(taken.x_s.sum()): taken for taken in drawn}
    for taken in expected:
        kept = found[float(taken.x_s.sum())]
        assert torch.equal(kept.x_s, taken.x_s)
        assert torch.equal(kept.x_t, taken.x_t)
        assert torch.equal(kept.conditioning.text, taken.conditioning.text)
    # Another run, of another seed: the same landings, in another order, from the disk.
    calls.clear()
    other = landings_of(stage.model_copy(update={"seed": 5}))
    again = [other.draw(i, batches, teacher.denoiser, random) for i in range(6)]
    assert calls == []
    assert {float(taken.x_s.sum()) for taken in again} == set(found)


def test_a_bank_goes_on_where_it_was_left(tmp_path: Path) -> None:
    made_of = {"teacher": "a"}
    landings = torch.randn(CHUNK, 2, 3, generator=torch.Generator().manual_seed(1))
    first = Bank(tmp_path, made_of, (2, 3))
    first.write(4, slice(0, 8), landings[:8])
    again = Bank(tmp_path, made_of, (2, 3))
    assert again.num_done == 8
    assert torch.equal(again.read(4, slice(0, 8)), landings[:8])
    assert torch.equal(again.read(4, slice(4, 6)), landings[4:6])
    assert again.read(4, slice(0, CHUNK)) is None
    assert again.read(9, slice(0, CHUNK)) is None
    again.write(4, slice(8, CHUNK), landings[8:])
    assert torch.equal(first.read(4, slice(0, CHUNK)), landings)


def test_a_bank_whose_beginner_was_killed_at_once_is_empty(tmp_path: Path) -> None:
    """It had said what the landings are made of, and made none of the other files."""
    Bank(tmp_path, {}, (2,))
    (tmp_path / "landings.f32").unlink()
    (tmp_path / "done.u8").unlink()
    bank = Bank(tmp_path, {}, (2,))
    assert bank.read(0, slice(0, CHUNK)) is None
    bank.write(0, slice(0, CHUNK), torch.ones(CHUNK, 2))
    assert bank.num_done == CHUNK


@pytest.mark.parametrize("record", [b"", b'{"teacher": "1f', b"[1]", b"\xff\xfe"])
def test_a_bank_whose_record_is_damaged_is_refused(record: bytes, tmp_path: Path) -> None:
    Bank(tmp_path, {"teacher": "1f"}, (4, 2, 2))
    (tmp_path / "bank.json").write_bytes(record)
    with pytest.raises(RecipeError, match=r"bank\.json is damaged .*Delete that folder"):
        Bank(tmp_path, {"teacher": "1f"}, (4, 2, 2))


def test_a_process_that_dies_between_both_writes_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twostep.distill import bank as banks

    bank = Bank(tmp_path, {}, (2,))
    write_at = banks._write_at
    written: list[Path] = []

    def dying(path: Path, position: int, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_at(path, position, data)

    monkeypatch.setattr(banks, "_write_at", dying)
    with pytest.raises(KeyboardInterrupt):
        bank.write(0, slice(0, CHUNK), torch.ones(CHUNK, 2))
    assert written == [tmp_path / "landings.f32"]
    assert bank.read(0, slice(0, CHUNK)) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guidance": 2.0}, "another guidance"),
        ({"teacher_steps": 8}, "another teacher_steps"),
        ({"student_steps": 1}, "another student_steps, another trained times"),
        ({"precision": "bf16"}, "another precision"),
    ],
)
def test_a_bank_of_another_grid_is_refused_by_what_differs(
    changes: dict[str, object], named: str, teacher: Bundle, source: object, tmp_path: Path
) -> None:
    method = {"bank": tmp_path / "bank", "bank_size": CHUNK}
    batches = Batches(source, CHUNK, CPU)
    random = Randomness.at(0, 0)
    landings_of(make_stage(method)).draw(0, batches, teacher.denoiser, random)
    before = (tmp_path / "bank" / "landings.f32").read_bytes()
    with pytest.raises(RecipeError, match=f"{named}.*a bank of its own"):
        landings_of(make_stage(method, **changes)).draw(0, batches, teacher.denoiser, random)
    assert (tmp_path / "bank" / "landings.f32").read_bytes() == before


def test_a_bank_of_another_teacher_or_other_data_is_refused(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    stage = make_stage({"bank": tmp_path / "bank", "bank_size": CHUNK})
    batches = Batches(source, CHUNK, CPU)
    random = Randomness.at(0, 0)
    landings_of(stage).draw(0, batches, teacher.denoiser, random)
    other_data = Batches(_Shifted(source), CHUNK, CPU)
    with pytest.raises(RecipeError, match="another examples"):
        landings_of(stage).draw(0, other_data, teacher.denoiser, random)
    with torch.no_grad():
        teacher.denoiser.network.conv_out.bias += 1e-3
    with pytest.raises(RecipeError, match="another teacher"):
        landings_of(stage).draw(0, batches, teacher.denoiser, random)
    record = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert record["latents"] == [4, 16, 16]


class _Shifted:
    """Other data: the same, but brighter."""

    def __init__(self, source: object) -> None:
        self.source = source

    def draw(self, *args: object) -> tuple[Tensor, object]:
        x0, conditioning = self.source.draw(*args)
        return x0 + 1.0, conditioning

    def empty(self, like: object) -> object:
        return self.source.empty(like)


def two_iterations(stage: Stage, teacher: Bundle, source: object) -> list[dict[str, float]]:
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher))
    return [numbers(trainer.iterate(i, Randomness.at(0, i))) for i in range(2)]


@pytest.mark.parametrize(
    "method",
    [{"name": "regression"}, {"name": "adversarial", "r1_weight": 1.0, "loss": "non-saturating"}],
    ids=lambda method: method["name"],
)
def test_parts_of_a_batch_add_up_to_the_whole(
    method: dict[str, object], teacher: Bundle, source: object
) -> None:
    changes = {"batch_size": 4, "learning_rate": 1e-4}
    whole = two_iterations(make_stage(method, **changes), teacher, source)
    parts = two_iterations(make_stage(method, accumulate=2, **changes), teacher, source)
    other = two_iterations(make_stage(method, accumulate=2, **changes), teacher, _Shifted(source))
    for figures, figures_in_parts in zip(whole, parts, strict=True):
        # Gradient norms tell whether the parts' gradients were added up and divided rightly.
        assert figures_in_parts == pytest.approx(figures, rel=2e-3)
    assert other[0]["student_loss"] != pytest.approx(whole[0]["student_loss"], rel=2e-3)


def test_stages_of_one_seed_see_different_examples(teacher: Bundle, source: object) -> None:
    first, second = (Randomness.at(3, 0, name) for name in ("8-regression", "4-regression"))
    batches = Batches(source, 4, CPU)
    assert not torch.equal(
        batches.noise(torch.zeros(4, 4, 2, 2), first),
        batches.noise(torch.zeros(4, 4, 2, 2), second),
    )
    again = Randomness.at(3, 0, "8-regression")
    assert again.words.random() == Randomness.at(3, 0, "8-regression").words.random()
