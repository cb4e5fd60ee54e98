"""A model without students draws in any number of steps and by any solver; students stay strict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app
from twostep.contract import ContractError
from twostep.diffusion import find_sampler
from twostep.formats import resolve
from twostep.formats.locate import WEIGHTS, ModelError
from twostep.models.sampling import draw_noise, encode_prompts, sample_latents
from twostep.pipeline.provenance import read_provenance
from twostep.pipeline.request import Request, RequestError
from twostep.pipeline.studio import Studio

PROMPT = "a 3d red apple"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano without students, as any checkpoint from the web."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    shutil.copytree(WEIGHTS / "nano", folder, ignore=shutil.ignore_patterns("students"))
    return folder


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu")


def test_any_number_of_steps_and_guidance(plain: Path, studio: Studio) -> None:
    """One bundle draws all of them, and the warning says where steps are too few."""
    drawn = {}
    for steps in (2, 3, 5):
        result = studio.draw(Request(PROMPT, model=str(plain), steps=steps, guidance=2.0))
        assert (result.request.steps, result.request.guidance) == (steps, 2.0)
        assert any("meant for about 32 steps" in warning for warning in result.warnings)
        drawn[steps] = np.asarray(result.images[0], int)
    assert np.abs(drawn[2] - drawn[5]).max() > 3
    first = studio.load(Request(PROMPT, model=str(plain), steps=20))
    assert studio.load(Request(PROMPT, model=str(plain))).denoiser is first.denoiser
    assert resolve(plain).contract_for(50).steps == 32


def test_students_stay_strict(studio: Studio) -> None:
    with pytest.raises(ModelError, match="nothing for 20 steps; there are 32, 8, 4, 2, 1"):
        studio.load(Request(PROMPT, steps=20))
    with pytest.raises(ContractError, match="student that was trained to draw with euler"):
        studio.draw(Request(PROMPT, steps=2, sampler="unipc"))


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc"])
def test_a_solver_is_the_one_that_was_asked_for(plain: Path, studio: Studio, sampler: str) -> None:
    """The picture is that of the solver itself, called by hand; and its name is in the PNG."""
    request = Request(PROMPT, model=str(plain), steps=4, guidance=1.0, seed=5, sampler=sampler)
    bundle = studio.load(request)
    foreseen: list[torch.Tensor] = []
    result = studio.draw(request, on_step=lambda step: foreseen.append(step.prediction.x0))
    by_hand: list[torch.Tensor] = []
    with torch.inference_mode():
        guided = encode_prompts(bundle, [PROMPT], (64, 64), scale=1.0)
        sample_latents(
            bundle.denoiser,
            guided,
            draw_noise([5], bundle.latent_shape(64, 64)),
            times=4,
            seeds=[5],
            sampler=find_sampler(sampler),
            on_step=lambda _, step: by_hand.append(step.x0),
        )
    torch.testing.assert_close(foreseen[-1], by_hand[-1])
    euler = studio.draw(Request(PROMPT, model=str(plain), steps=4, guidance=1.0, seed=5))
    assert np.asarray(euler.images[0]).tobytes() != np.asarray(result.images[0]).tobytes()
    assert result.request.sampler == sampler


def test_the_command_draws_writes_and_replays_it(plain: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert answer.exit_code == 0, answer.output
        return answer.output

    run("generate", PROMPT, "--model", plain, "--steps", 3, "--guidance", 1.5,
        "--scheduler", "unipc", "-o", tmp_path)  # fmt: skip
    (picture,) = tmp_path.glob("*.png")
    provenance = read_provenance(picture)
    assert (provenance.request.steps, provenance.request.sampler) == (3, "unipc")
    assert "Steps: 3, Sampler: UniPC" in provenance.parameters
    assert "is the same" in run("replay", picture, "-o", tmp_path / "again")


def test_as_says_what_a_model_is_and_travels_with_the_picture(
    plain: Path, tmp_path: Path, studio: Studio
) -> None:
    request = Request(PROMPT, model=str(plain), steps=4, treated_as="dmd2")
    result = studio.draw(request)
    assert (result.contract.role, result.contract.sampler) == ("student", "renoise")
    assert (result.request.guidance, result.request.sampler) == (1.0, "renoise")
    assert Request.from_json(result.request.to_json()) == result.request
    answers = studio.submit([request, Request(PROMPT, model=str(plain), steps=4, guidance=1.0)])
    assert [answer.contract.role for answer in answers] == ["student", "teacher"]
    with pytest.raises(ContractError, match="DMD2 draws in 4 steps; asked for 9"):
        studio.load(Request(PROMPT, model=str(plain), steps=9, treated_as="dmd2"))
    answer = CliRunner().invoke(
        app, ["generate", PROMPT, "--model", str(plain), "--as", "slow", "-o", str(tmp_path)]
    )
    assert answer.exit_code == 1 and "no kind 'slow'" in answer.output


def test_a_folder_whose_name_says_lightning_is_drawn_so_with_a_word(
    plain: Path, tmp_path: Path, studio: Studio
) -> None:
    named = tmp_path / "apples_Lightning_2step"
    shutil.copytree(plain, named)
    (named / "twostep.json").unlink()
    index = named / "scheduler" / "scheduler_config.json"
    assert json.loads(index.read_text())["prediction_type"] == "epsilon"
    result = studio.draw(Request(PROMPT, model=str(named)))
    assert (result.request.steps, result.request.guidance) == (2, 1.0)
    assert any("says that it is SDXL-Lightning" in warning for warning in result.warnings)
    base = studio.draw(Request(PROMPT, model=str(named), treated_as="base", steps=2))
    assert (base.contract.steps, base.request.guidance) == (32, 6.0)
    assert isinstance(base.images[0], Image.Image)


def test_a_sampler_that_is_not_known_is_told() -> None:
    with pytest.raises(RequestError, match="sampler is 'heun'; expected one of euler, dpmpp-2m"):
        Request(PROMPT, sampler="heun")
