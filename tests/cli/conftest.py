"""The command line as a user runs it, on a real model folder with random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.diffusion import trailing_times
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run a verb in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the documented layout, written without the package's own writer."""
    folder = tmp_path_factory.mktemp("models") / "random"
    teacher = random_bundle()
    assemble(teacher, timestep_spacing="trailing").save_pretrained(folder)
    (folder / "twostep.json").write_text(teacher.contract.to_json())
    (folder / "students").mkdir()
    for steps in (8, 4, 2, 1):
        contract = replace(
            teacher.contract,
            name=f"random-{steps}step",
            role="student",
            steps=steps,
            guidance=1.0,
            trained_times=trailing_times(max(4, steps)),
            prediction_type="x0" if steps == 1 else "eps",
        )
        path = folder / "students" / f"random_{steps}step_unet.safetensors"
        save_file(teacher.denoiser.network.state_dict(), path, contract.to_metadata())
    return folder


@pytest.fixture(scope="session")
def student_file(model: Path) -> Path:
    return model / "students" / "random_4step_unet.safetensors"
