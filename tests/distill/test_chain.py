"""The chain: every phase hands its student on, and what is released loads and says how to sample it."""

from pathlib import Path

import torch

from twostep.distill import DistillRecipe, distil
from twostep.models.bundle import Bundle, load_bundle
from twostep.runs.folder import RunFolder

SHARED = {
    "iterations": 1,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "checkpoint_every": 1,
    "log_every": 1,
    "precision": "fp32",
}
RECIPE = DistillRecipe.model_validate(
    {
        "release": [4, 2, 1],
        "sample_prompts": ["a red fox", ""],
        "phases": [
            {"student_steps": 32, "teacher_steps": 128, "objective": "mse", "guidance": 3.0, **SHARED},
            {"student_steps": 8, "teacher_steps": 32, "objective": "conditional", **SHARED},
            {"student_steps": 4, "teacher_steps": 8, "objective": "unconditional", **SHARED},
            {"student_steps": 2, "teacher_steps": 8, "objective": "unconditional", **SHARED},
            {"student_steps": 1, "teacher_steps": 2, "objective": "convert", **SHARED},
            {"student_steps": 1, "teacher_steps": 4, "objective": "unconditional", **SHARED},
        ],
    }
)


def test_the_whole_chain_runs_and_its_students_load(teacher: Bundle, source: object, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", RECIPE)
    written = distil(RECIPE, teacher, source, folder, version="0", recipe_name="test")
    assert sorted(written) == [1, 2, 4]
    one = load_bundle(tmp_path / "run" / "model", steps=1)
    assert one.contract.prediction_type == one.denoiser.prediction_type == "x0"
    assert one.contract.trained_times == (1000, 750, 500, 250)
    assert one.students == (4, 2, 1)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == len(RECIPE.phases)
    before = {steps: path.read_bytes() for steps, path in written.items()}
    again = distil(RECIPE, teacher, source, folder, version="0", recipe_name="test")
    assert {steps: path.read_bytes() for steps, path in again.items()} == before


def test_conversion_keeps_the_students_x0(teacher: Bundle) -> None:
    """Same weights, other prediction type: the converted student must be trained towards the eps student's x0."""
    t = torch.tensor([1000, 500])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = teacher.text.conditioning(["a red fox", ""], 64, 64)
    as_eps = teacher.denoiser(x, t, conditioning)
    as_x0 = type(teacher.denoiser)(teacher.denoiser.network, teacher.denoiser.schedule, "x0")(x, t, conditioning)
    assert torch.allclose(as_x0.x0, as_eps.eps)
    assert not torch.allclose(as_x0.x0, as_eps.x0)
