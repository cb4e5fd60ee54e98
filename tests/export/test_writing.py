"""What is exported loads where it is meant to, draws the same there, and says of itself how."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twostep.contract import Contract
from twostep.export.card import Card
from twostep.export.writing import export
from twostep.formats.header import read_header
from twostep.formats.ldm_names import unet_names
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import read_lora, write_lora
from twostep.formats.single_header import CLIP_L, UNET
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle

from .conftest import random_lora, student_contract

PROMPT = "a 3d red apple on a blue background"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def drawn(model: Bundle) -> np.ndarray:
    return pixels(generate(model, Request(PROMPT, seed=5)).images[0])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("steps", [4, 1])
def test_three_lines_of_diffusers_draw_what_the_package_draws(steps: int, tmp_path: Path) -> None:
    out = export("nano", "diffusers", tmp_path / "out", steps=steps)
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    ours = drawn(load_bundle("nano", steps=steps))
    # Neither a scheduler nor guidance is asked for: diffusers' own default would be 5.
    for more in ({}, {"guidance_scale": 9.0}):
        generator = torch.Generator().manual_seed(5)
        theirs = pipeline(PROMPT, num_inference_steps=steps, generator=generator, **more).images[0]
        # diffusers starts from 0.99767 of the noise.
        assert np.abs(pixels(theirs) - ours).mean() < 0.5
    scheduler = pipeline.scheduler.config
    assert (scheduler.timestep_spacing, scheduler.prediction_type) == (
        "trailing",
        "epsilon" if steps > 1 else "sample",
    )


def test_an_exported_folder_is_a_model_like_any_other(tmp_path: Path) -> None:
    out = export("nano", "diffusers", tmp_path / "out", steps=4)
    again = load_bundle(out)
    assert again.contract == load_bundle("nano", steps=4).contract
    assert np.array_equal(drawn(again), drawn(load_bundle("nano", steps=4)))
    unet = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert metadata(unet)["modelspec.title"] == "nano-4step"
    assert Contract.from_metadata(metadata(unet)) == again.contract
    # What tells diffusers that guidance is distilled in stays there.
    assert "time_embedding.cond_proj.weight" in read_header(unet).shapes
    export(out, "unet", tmp_path / "unet.safetensors")
    (out / "students").mkdir()
    (out / "students" / "nano_1step_unet.safetensors").symlink_to(find_model("nano_1step_unet"))
    assert load_bundle(out, steps=1).contract.steps == 1
    assert (
        "time_embedding.cond_proj.weight" not in read_header(tmp_path / "unet.safetensors").shapes
    )
    names = read_header(out / "text_encoder" / "model.safetensors").shapes
    assert all(name.startswith("text_model.") for name in names)


def test_a_teacher_keeps_its_guidance(folder: Path, tmp_path: Path) -> None:
    out = export(folder, "diffusers", tmp_path / "out")
    assert json.loads((out / "unet" / "config.json").read_text())["time_cond_proj_dim"] is None
    assert "guidance_scale=4.0" in (out / "README.md").read_text()


def test_a_unet_that_must_be_told_its_guidance_is_refused(tmp_path: Path) -> None:
    out = export("nano", "diffusers", tmp_path / "out", steps=4)
    unet = out / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    weights["time_embedding.cond_proj.weight"] += 1
    save_file(weights, unet, {"format": "pt"})
    with pytest.raises(ModelError, match="wants to be told its guidance, as latent consistency"):
        load_bundle(out)


@pytest.mark.parametrize("steps", [None, 4, 1])
def test_one_file_for_comfyui_loads_and_says_how_it_is_sampled(
    steps: int | None, folder: Path, tmp_path: Path
) -> None:
    out = export(folder, "comfyui", tmp_path / "random.safetensors", steps=steps)
    (tmp_path / "random").symlink_to(folder)  # the configs, which such a file has not
    again, model = load_bundle(out), load_bundle(folder, steps=steps)
    assert again.contract == model.contract
    one = Request(PROMPT, steps=2) if steps is None else Request(PROMPT)
    ours, theirs = (pixels(generate(each, one).images[0]) for each in (model, again))
    assert np.abs(ours - theirs).mean() < 1.5  # weights in 16 bits
    written = metadata(out)
    assert written["modelspec.sai_model_spec"] == "1.0.1"
    assert written["modelspec.prediction_type"] == ("sample" if steps == 1 else "epsilon")
    assert written["modelspec.resolution"] == "64x64"
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert written["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[start:]).hexdigest()}"
    names = read_header(out).shapes
    assert {
        f"{UNET}out.2.weight",
        f"{CLIP_L}text_model.embeddings.token_embedding.weight",
    } < names.keys()
    assert names["first_stage_model.decoder.mid.attn_1.q.weight"] == (32, 32, 1, 1)


def test_a_whole_file_that_predicts_v_says_so_as_others_do(
    folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    v = tmp_path / "v"
    v.mkdir()
    for path in folder.iterdir():
        (v / path.name).symlink_to(path)
    (v / "twostep.json").unlink()
    (v / "twostep.json").write_text(replace(bundle.contract, prediction_type="v").to_json())
    out = export(v, "comfyui", tmp_path / "out.safetensors")
    assert read_header(out).shapes["v_pred"] == (0,)
    assert metadata(out)["modelspec.prediction_type"] == "v"
    assert '"sampling": "v_prediction"' in (tmp_path / "out.api.json").read_text()


def test_a_unet_alone_has_the_names_of_diffusers(folder: Path, tmp_path: Path) -> None:
    out = export(folder, "unet", tmp_path / "u.safetensors", steps=1)
    vanilla = UNet2DConditionModel.from_config(
        json.loads((folder / "unet" / "config.json").read_text())
    )
    vanilla.load_state_dict(load_file(out))
    for key, value in random_bundle(1).denoiser.network.state_dict().items():
        assert torch.equal(vanilla.state_dict()[key], value.half().float())


@pytest.mark.parametrize("to", ["lora-kohya", "lora-peft"])
def test_a_lora_keeps_its_bits_alpha_and_contract(
    to: str, folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    contract = student_contract(bundle.contract, 4, rank=3)
    lora = {key: low for key, low in random_lora(bundle).items() if key.startswith("unet.")}
    save_file(
        write_lora(lora, bundle.parts, "kohya")[0],
        tmp_path / "in.safetensors",
        contract.to_metadata(),
    )
    out = export(tmp_path / "in.safetensors", to, tmp_path / "out.safetensors", base=str(folder))
    written, again = metadata(out), read_lora(out, bundle.parts)
    assert again.keys() == lora.keys()
    for layer, low in lora.items():
        assert torch.equal(again[layer].down, low.down) and torch.equal(again[layer].up, low.up)
        assert again[layer].alpha == low.alpha == 1.5
    assert Contract.from_metadata(written) == contract
    if to == "lora-kohya":
        assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("3", "1.5")
        assert written["modelspec.architecture"].endswith("/lora")
        assert all(key.startswith("lora_unet_") for key in load_file(out))
    else:
        assert json.loads(written["lora_adapter_metadata"])["unet.lora_alpha"] == 1.5
        assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("to", ["lora-kohya", "lora-peft"])
def test_diffusers_draws_with_an_exported_lora(to: str, tmp_path: Path) -> None:
    """Built in: a folder and a number of steps find it."""
    out = export("nano", to, tmp_path / "out.safetensors", steps=4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(find_model("nano"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(out)
    generator = torch.Generator().manual_seed(5)
    theirs = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=1.0, generator=generator
    ).images[0]
    assert np.abs(pixels(theirs) - drawn(load_bundle(find_model("nano_4step_lora")))).mean() < 0.5


def test_loras_are_merged_into_what_is_exported(
    folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    save_file(
        write_lora(random_lora(bundle), bundle.parts, "kohya")[0], tmp_path / "style.safetensors"
    )
    out = export(
        folder,
        "unet",
        tmp_path / "u.safetensors",
        steps=4,
        loras=(f"{tmp_path / 'style.safetensors'}:0.5",),
    )
    assert json.loads(metadata(out)["twostep.contract"])["name"] == "random-4step+style:0.5"
    plain, merged = random_bundle(4).denoiser.network.state_dict(), load_file(out)
    key = "mid_block.resnets.0.conv1.weight"
    change = 0.5 * random_lora(bundle)["unet.mid_block.resnets.0.conv1"].change
    torch.testing.assert_close(
        merged[key].float(), plain[key] + change.reshape(plain[key].shape), atol=1e-3, rtol=1e-3
    )


def test_what_cannot_be_exported_is_told(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    file, student = (
        tmp_path / "x.safetensors",
        folder / "students" / "random_4step_unet.safetensors",
    )
    save_file(
        write_lora(random_lora(bundle), bundle.parts, "kohya")[0], tmp_path / "style.safetensors"
    )
    for model, to, out, more, message in (
        ("nano", "onnx", file, {}, "There is no export to 'onnx'; there are diffusers, comfyui"),
        ("nano", "comfyui", file, {}, "an AutoencoderTiny"),
        ("nano", "comfyui", tmp_path / "x", {}, "expected a .safetensors for comfyui"),
        ("nano", "diffusers", file, {}, "expected a folder for diffusers"),
        ("nano", "unet", file, {"steps": 3}, "has nothing for 3 steps"),
        (
            "nano",
            "lora-kohya",
            file,
            {"steps": 3},
            "3 steps were asked for: there are LoRAs for 2, 4, 8",
        ),
        (folder, "lora-kohya", file, {}, "it has none; `twostep extract` can"),
        (student, "lora-peft", file, {}, "is a student's whole network, no LoRA"),
        (
            tmp_path / "style.safetensors",
            "lora-peft",
            file,
            {},
            "name a model of that kind as the base",
        ),
        ("nano", "unet", file, {"card": Card(picture=student)}, "is no picture"),
        ("nano", "unet", file, {"card": Card(evaluation=student)}, "is no table"),
    ):
        with pytest.raises(ModelError, match=message):
            export(model, to, out, **more)
    weights = load_file(student)
    weights["conv_in.weight"] = weights["conv_in.weight"] * 1e6
    with safe_open(student, "pt") as read:
        save_file(weights, tmp_path / "random_4step_unet.safetensors", read.metadata())
    (tmp_path / "vast" / "students").mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != "students":
            (tmp_path / "vast" / path.name).symlink_to(path)
    huge = tmp_path / "vast" / "students" / "random_4step_unet.safetensors"
    (tmp_path / "random_4step_unet.safetensors").rename(huge)
    with pytest.raises(
        ModelError, match="conv_in\\.weight of random-4step is not finite in 16 bits"
    ):
        export(huge, "unet", file)
    assert unet_names(weights)
