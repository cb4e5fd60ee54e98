"""Golden losses: three iterations of every objective from fixed seeds give the figures that they gave when written.

Whoever changes what is computed sees it here; whoever meant to writes the new figures down, and says why.
"""

import pytest

from twostep.distill.recipe import Phase
from twostep.distill.trainer import AdversarialTrainer, RegressionTrainer
from twostep.models.bundle import Bundle
from twostep.runs.loop import Draw

from .test_trainer import lesson, phase

GOLDEN: dict[str, dict[str, float]] = {}


def third_iteration(settings: Phase, teacher: Bundle, source: object) -> dict[str, float]:
    adversarial = settings.objective in ("conditional", "unconditional")
    trainer = (AdversarialTrainer if adversarial else RegressionTrainer)(
        settings, lesson(teacher, source, settings.prediction_type)
    )
    return [trainer.iterate(i, Draw.at(settings.seed, i)) for i in range(3)][-1]


SETTINGS = {
    settings.name: settings
    for settings in (
        phase(objective="mse", student_steps=32, teacher_steps=128, guidance=3.0),
        phase(objective="conditional", student_steps=8, teacher_steps=32),
        phase(objective="unconditional", student_steps=2, teacher_steps=8),
        phase(objective="convert", student_steps=1, teacher_steps=2),
        phase(objective="unconditional", student_steps=1, teacher_steps=4, early_weight=5),
    )
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_losses_are_what_they_were(name: str, teacher: Bundle, source: object) -> None:
    assert third_iteration(SETTINGS[name], teacher, source) == pytest.approx(GOLDEN[name], rel=2e-3, abs=2e-4)
