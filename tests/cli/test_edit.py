"""edit, replay and --control as a user types them, with good input and bad."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.models.loading import load_bundle, load_with_loras
from twostep.pipeline.generation import generate
from twostep.pipeline.provenance import read_provenance, save_images
from twostep.pipeline.request import LoraChoice, Request

from .test_draw import PROMPT, assert_one_clean_line


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.linear_gradient("L").convert("RGB").resize((80, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    mask = Image.new("L", (80, 64))
    mask.paste(255, (40, 0, 80, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture
def control(model: Path, tmp_path: Path) -> Path:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    torch.nn.init.normal_(network.controlnet_mid_block.weight, std=0.1)
    network.save_pretrained(tmp_path / "control")
    return tmp_path / "control"


def png(answer, folder: Path) -> Path:
    assert answer.exit_code == 0, answer.output
    (path,) = folder.glob("*.png")
    return path


def test_edit_changes_a_picture_and_says_what_it_did(
    run, model: Path, photo: Path, mask: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = run(
        "edit",
        PROMPT,
        photo,
        "--model",
        model,
        "--steps",
        2,
        "--strength",
        0.6,
        "--mask",
        mask,
        "-o",
        out,
    )
    request = read_provenance(png(answer, out)).request
    assert "warning: strength 0.6 became 0.5" in answer.stderr
    assert (request.strength, request.image.name, request.mask.name) == (
        0.5,
        "photo.png",
        "mask.png",
    )
    assert "encode" in answer.stderr


def test_what_is_no_picture_is_one_clean_line(
    run, model: Path, photo: Path, mask: Path, tmp_path: Path
) -> None:
    assert_one_clean_line(
        run("edit", PROMPT, tmp_path / "none.png", "--model", model), "none.png cannot be taken"
    )
    Image.new("L", (10, 10)).save(mask)
    answer = run("edit", PROMPT, photo, "--mask", mask, "--model", model)
    assert_one_clean_line(answer, "the mask is 10x10 and the image 80x64")
    assert_one_clean_line(run("edit", PROMPT, photo, "--strength", 2, "--model", model), "up to 1")


CASES = ["text", "teacher", "edit", "controls"]


@pytest.mark.parametrize("case", CASES)
def test_replay_draws_the_same_pixels(
    run, model: Path, photo: Path, mask: Path, control: Path, tmp_path: Path, case: str
) -> None:
    out = tmp_path / "out"
    words = {
        "text": ("generate", PROMPT, "--steps", 2, "--seed", 5, "-n", 3),
        "teacher": ("generate", PROMPT, "--steps", 32, "--guidance", 2, "--negative", "flat"),
        "edit": ("edit", PROMPT, photo, "--steps", 4, "--mask", mask),
        "controls": (
            "generate",
            PROMPT,
            "--control",
            f"{photo}@{control}:0.8:0-0.5",
            "--control",
            f"{mask}@{control}",
        ),
    }[case]
    assert run(*words, "--model", model, "-o", out).exit_code == 0
    path = sorted(out.glob("*.png"))[-1]
    answer = run("replay", path, "--inputs", tmp_path, "-o", tmp_path / "again")
    assert answer.exit_code == 0, answer.output
    assert f"every pixel of {tmp_path / 'again' / path.name} is the same" in answer.stderr
    with Image.open(path) as first, Image.open(tmp_path / "again" / path.name) as again:
        assert first.tobytes() == again.tobytes()


def test_replay_wears_the_same_loras(run, tmp_path: Path) -> None:
    for words in (("--lora", "nano_2step_lora"), ("--lora", "nano_4step_lora:0.9")):
        out = tmp_path / words[1].replace(":", "-")
        path = png(run("generate", PROMPT, *words, "-o", out), out)
        assert read_provenance(path).origin == ("nano", words[1])
        answer = run("replay", path, "-o", tmp_path / "again")
        assert answer.exit_code == 0 and "every pixel" in answer.stderr, answer.output


def make_old(path: Path) -> None:
    """Take out of a PNG what was not written before a request named its model and its LoRAs."""
    with Image.open(path) as image:
        described = json.loads(image.info["twostep"])
        for name in ("model", "loras", "engine"):
            del described["request"][name]
        chunks = PngInfo()
        chunks.add_text("parameters", image.info["parameters"])
        chunks.add_text("twostep", json.dumps(described))
        image.save(path, pnginfo=chunks)


def test_replay_reads_pictures_from_before_requests_named_models(
    run, model: Path, tmp_path: Path
) -> None:
    """Their LoRAs were merged into the weights."""
    loras = ["nano_2step_lora:0.9"]
    wish = Request(PROMPT, seed=5, num_images=2)
    (path, _) = save_images(generate(load_with_loras("nano", loras), wish), tmp_path / "out")
    assert not read_provenance(path).has_merged_loras
    make_old(path)
    provenance = read_provenance(path)
    assert provenance.has_merged_loras
    assert (provenance.request.model, provenance.request.loras) == (
        "nano",
        (LoraChoice("nano_2step_lora", 0.9),),
    )
    bundle = load_bundle(model, steps=32)
    (plain,) = save_images(generate(bundle, Request(PROMPT, steps=10)), tmp_path / "plain")
    make_old(plain)
    for picture in (path, plain):
        answer = run("replay", picture, "-o", tmp_path / "again")
        assert answer.exit_code == 0 and "every pixel" in answer.stderr, answer.output


def test_replay_refuses_what_is_not_the_same(run, model: Path, photo: Path, tmp_path: Path) -> None:
    path = png(
        run("edit", PROMPT, photo, "--model", model, "-o", tmp_path / "out"), tmp_path / "out"
    )
    assert_one_clean_line(run("replay", path), "photo.png is not there")
    Image.new("RGB", (80, 64)).save(photo)
    assert_one_clean_line(
        run("replay", path, "--inputs", tmp_path), "photo.png is not the file that went in"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    assert_one_clean_line(run("replay", tmp_path / "bare.png"), "has no 'twostep' text chunk")


def test_replay_tells_when_the_pixels_differ(run, model: Path, tmp_path: Path) -> None:
    path = png(run("generate", PROMPT, "--model", model, "-o", tmp_path / "out"), tmp_path / "out")
    answer = run("replay", path, "--model", "nano", "-o", tmp_path / "again")
    assert answer.exit_code == 1
    # After the line that says how long the picture took.
    error = answer.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "differs by up to" in error
    assert "other weights" in error


def test_a_control_is_read_with_its_scale_and_share(
    run, model: Path, photo: Path, control: Path, tmp_path: Path
) -> None:
    words = ("generate", PROMPT, "--model", model, "--control", f"{photo}@{control}:0.8:0-0.5")
    (found,) = read_provenance(
        png(run(*words, "-o", tmp_path / "out"), tmp_path / "out")
    ).request.controls
    assert (found.picture.name, found.model) == ("photo.png", str(control))
    assert (found.scale, found.start, found.end) == (0.8, 0.0, 0.5)
    for wrong in (f"{photo}", f"@{control}"):
        assert_one_clean_line(
            run("generate", PROMPT, "--control", wrong, "-o", tmp_path), "shape.png@silhouette:0.8"
        )
    answer = run(
        "generate", PROMPT, "--control", f"{photo}@{control}:1:0.9-0.1", "-o", tmp_path / "out"
    )
    assert_one_clean_line(answer, "rising shares")
