"""Students without training, for tests that compare numbers."""

from dataclasses import replace

from twostep.models.bundle import Bundle


def as_student(teacher: Bundle, steps: int) -> Bundle:
    """The teacher's weights under a student's contract; one step predicts x0."""
    prediction_type = "x0" if steps == 1 else "eps"
    contract = replace(
        teacher.contract,
        name=f"random-{steps}step",
        role="student",
        steps=steps,
        trained_times=(250, 500, 750, 1000),
        guidance=1.0,
        prediction_type=prediction_type,
    )
    denoiser = replace(teacher.denoiser, prediction_type=prediction_type)
    return replace(teacher, contract=contract, denoiser=denoiser)
