"""The recipes of AnimateDiff's real sizes are planned, from configs alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twostep import __version__
from twostep.cli import app
from twostep.distill.plan import metering
from twostep.formats import read_contracts
from twostep.formats.locate import CONFIGS, ModelError, find_model, read_json
from twostep.formats.motion_files import MotionConfig
from twostep.models.loading import load_bundle
from twostep.models.motion import (
    ANIMATEDIFF_NOISE,
    load_pictures,
    motion_contract,
    read_settings,
)
from twostep.networks.motion import MotionModule

SHAPES = {
    "animatediff-sd15": MotionConfig(),
    "animatediff-sdxl": MotionConfig(channels=(320, 640, 1280), has_middle=False),
}
FOLDERS = {name: f"models/{name}" for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_what_recipes_are_planned_by_is_what_their_folders_will_be(name: str) -> None:
    """The configs here are those that `adopt_motion_module` writes."""
    folder = find_model(FOLDERS[name], only=CONFIGS)
    shape = MotionConfig.from_diffusers(read_json(folder / "motion_adapter/config.json"))
    assert shape == SHAPES[name]
    settings = read_settings(folder)
    (contract,) = read_contracts(folder)
    with metering(on_cpu=True):
        (picture, *_) = load_pictures(settings.bases, folder, outline=True)
    adopted = motion_contract(picture.contract, name, recipe="", version=__version__)
    assert contract == replace(adopted, schedule=ANIMATEDIFF_NOISE[shape.channels])


def test_a_folder_of_other_models_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = find_model(FOLDERS["animatediff-sdxl"], only=CONFIGS)
    Path("models").mkdir()
    assert find_model(FOLDERS["animatediff-sdxl"], only=CONFIGS) == expected


def test_a_folder_that_is_there_is_planned_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path(FOLDERS["animatediff-sd15"])
    shutil.copytree(find_model(str(mine), only=CONFIGS), mine)
    assert find_model(str(mine), only=CONFIGS) == mine


def test_weights_are_not_looked_for_among_the_configs_of_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def fetched(repository: str, **others: object) -> Path:
        asked.append(repository)
        raise ModelError("not here")

    monkeypatch.setattr("twostep.formats.locate.fetch", fetched)
    with pytest.raises(ModelError, match="not here"):
        find_model(FOLDERS["animatediff-sdxl"])
    assert asked == [FOLDERS["animatediff-sdxl"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_recipes_of_real_sizes_are_planned(name: str) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in MotionModule(SHAPES[name]).parameters())
    answer = CliRunner().invoke(app, ["plan", name, "--device", "cuda"])
    assert answer.exit_code == 0, answer.output
    assert f"student {count:,}" in answer.output
    # One clip of 16 frames in 16 bits, and what is written beside it.
    side = {"animatediff-sd15": 64, "animatediff-sdxl": 128}[name]
    assert f"data: {2 * 4 * 16 * side * side + 3:,} bytes" in answer.output


@pytest.mark.slow
def test_sd15_outline_has_its_shapes() -> None:
    with metering(on_cpu=True):
        bundle = load_bundle(FOLDERS["animatediff-sd15"], outline=True)
        assert bundle.latent_shape(512, 512) == (4, 16, 64, 64)
        unet = bundle.denoiser.backbone.bases[0]
        # 859.5 million parameters, as is said of Stable Diffusion 1.5's UNet.
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert count == 859_520_964
        assert bundle.text.conditioning(["a fox"], 512, 512).text.shape == (1, 77, 768)
