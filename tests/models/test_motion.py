"""Models of clips: drawn, saved, loaded, and refused where they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import save_file

from tests.clips import clips_of, save_clip_model, save_lora_student
from twostep import Request, Studio, generate
from twostep.cli import app
from twostep.contract import Contract, ContractError
from twostep.formats.locate import ModelError
from twostep.formats.motion_files import MotionConfig, MotionError
from twostep.media.clip import Clip, read_clip, read_texts
from twostep.media.codec import CodecError
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.motion import load_pictures
from twostep.models.sampling import draw_noise
from twostep.networks.adapters import add_lora
from twostep.networks.motion import MotionModule
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import RequestError

PROMPT = "a 3d fox on a blue background"


@pytest.fixture(scope="module")
def pictures():
    return load_pictures(["nano"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a saved model of clips with a student of two steps."""
    return save_clip_model(tmp_path_factory.mktemp("clips") / "model")


def test_fresh_module_draws_what_the_picture_model_draws(pictures) -> None:
    """Frame k of a clip is the picture that comes of the noise of frame k."""
    bundle = clips_of(pictures)
    request = Request(PROMPT, steps=2, guidance=1.0, seed=7)
    (clip,) = generate(bundle, request).images
    assert isinstance(clip, Clip) and len(clip) == 3 and clip.frames_per_second == 5
    noise = draw_noise([7], bundle.latent_shape(64, 64))
    from twostep.models.sampling import encode_prompts, sample_latents

    with torch.no_grad():
        latents = sample_latents(
            pictures[0].denoiser,
            encode_prompts(pictures[0], [PROMPT], (64, 64), scale=1.0),
            noise[:, :, 2],
            times=2,
            seeds=[7],
        )
        (expected,) = pictures[0].codec.items(pictures[0].codec.decode(latents))
    difference = ImageChops.difference(clip.frames[2], expected)
    assert max(high for _, high in difference.getextrema()) <= 1


def test_saved_model_draws_the_same_and_says_how(folder, tmp_path, pictures) -> None:
    teacher = load_bundle(folder)
    assert teacher.contract.media == "video" and teacher.students == (2,)
    assert teacher.latent_shape(64, 64) == (4, 3, 16, 16)
    config = json.loads((folder / "motion_adapter" / "config.json").read_text())
    assert config["block_out_channels"] == [48, 96, 160]
    result = Studio(device="cpu").draw(Request(PROMPT, model=str(folder), frames=4))
    assert result.contract.steps == 2 and result.request.frames == 4
    (path,) = save_images(result, tmp_path)
    assert path.suffix == ".webp"
    clip = read_clip(path)
    assert len(clip) == 4
    shown = zip(clip.frames, result.images[0].frames, strict=True)
    assert all(ImageChops.difference(a, b).getbbox() is None for a, b in shown)
    described = json.loads(read_texts(path)["twostep"])
    assert Contract.from_json(json.dumps(described["contract"])) == result.contract
    again = Request.from_json(json.dumps(described["request"]))
    (redrawn,) = Studio(device="cpu").draw(again).images
    assert redrawn.strip().tobytes() == result.images[0].strip().tobytes()


def test_student_is_another_module_on_the_same_pictures(folder) -> None:
    student = load_bundle(folder, steps=2)
    path = folder / "students" / "clips_2step_unet.safetensors"
    alone = load_bundle(path)
    assert alone.contract == student.contract
    with safe_open(path, "pt") as file:
        name = "down_blocks.0.motion_modules.0.proj_out.weight"
        doubled = file.get_tensor(name).float()
        positions = file.get_tensor(
            "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"
        )
    assert positions.shape == (1, 8, 48)
    teacher = load_bundle(folder).denoiser.network.state_dict()[name]
    assert torch.allclose(doubled, 2 * teacher, rtol=2e-3, atol=1e-6)
    assert torch.equal(student.denoiser.network.state_dict()[name], doubled)


def test_a_lora_makes_a_student_of_the_module(folder, pictures, tmp_path) -> None:
    """By itself, on the teacher, and merged, it is the same student."""
    teacher = load_bundle(folder)
    module = load_bundle(folder).denoiser.network
    lora = add_lora(module, "fast", rank=2, targets=teacher.denoiser.backbone.spec.lora_targets)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = save_lora_student(folder, lora.scaled_state_dict(), tmp_path)
    alone = load_bundle(path)
    beside = load_with_loras(folder, [str(path)], steps=2)
    assert alone.contract.steps == beside.contract.steps == 2
    assert beside.contract.media == "video"
    expected = alone.denoiser.network.state_dict()
    changed = [
        name
        for name, value in teacher.denoiser.network.state_dict().items()
        if not torch.equal(value, expected[name])
    ]
    assert len(changed) == len(lora.layers)
    for name, value in beside.denoiser.network.state_dict().items():
        assert torch.equal(value, expected[name])
    studio = Studio(device="cpu")
    request = Request(PROMPT, frames=2, seed=3)
    (expected_clip,) = generate(alone, request).images
    for wish in (
        replace(request, model=str(folder), loras=(str(path),)),
        replace(request, model=str(path.parent.parent), steps=2),
    ):
        drawn = studio.draw(wish)
        assert drawn.contract.steps == 2
        (clip,) = drawn.images
        for one, other in zip(clip.frames, expected_clip.frames, strict=True):
            assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1


def test_a_lora_that_makes_students_of_pictures_makes_none_of_clips(folder) -> None:
    with pytest.raises(ContractError, match=r"students that draw pictures, and clips makes clips"):
        load_with_loras(folder, ["nano_2step_lora"])


def test_a_style_of_pictures_goes_on_what_draws_the_frames(folder, tmp_path) -> None:
    """Beside the layers and merged it is the same, and the motion module stays as it is."""
    teacher = load_bundle(folder)
    base = teacher.denoiser.backbone.bases[0]
    layer = "down_blocks.0.resnets.0.conv1"
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, 48, 3, 3, generator=generator)
    up = 0.05 * torch.randn(48, 2, 1, 1, generator=generator)
    name = f"lora_unet_{layer.replace('.', '_')}"
    style = tmp_path / "style.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, style)
    merged = load_with_loras(folder, [f"{style}:0.5"])
    changed = merged.denoiser.backbone.bases[0].get_submodule(layer).weight
    product = (up.flatten(1) @ down.flatten(1)).view_as(changed)
    assert torch.allclose(changed, base.get_submodule(layer).weight + 0.5 * product, atol=1e-5)
    kept = merged.denoiser.network.state_dict()
    module = teacher.denoiser.network.state_dict()
    assert all(torch.equal(module[name], value) for name, value in kept.items())
    request = Request(PROMPT, frames=2, seed=3)
    studio = Studio(device="cpu")
    wish = replace(request, model=str(folder), loras=(f"{style}:0.5",), steps=2)
    (clip,) = studio.draw(wish).images
    (plain,) = studio.draw(replace(wish, loras=())).images
    (expected,) = generate(load_with_loras(folder, [f"{style}:0.5"], steps=2), request).images
    for one, other in zip(clip.frames, expected.frames, strict=True):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    assert ImageChops.difference(clip.frames[0], plain.frames[0]).getbbox() is not None


def test_command_line_draws_clips_and_refuses_what_cannot_be(folder, tmp_path) -> None:
    from typer.testing import CliRunner

    def run(*arguments):
        return CliRunner().invoke(app, ["generate", PROMPT, "-o", str(tmp_path), *arguments])

    drawn = run("--model", str(folder), "--frames", "2")
    assert drawn.exit_code == 0, drawn.output
    (path,) = tmp_path.glob("*.webp")
    assert len(read_clip(path)) == 2
    again = CliRunner().invoke(app, ["replay", str(path), "-o", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert "is the same" in again.output
    refusals = {
        "0": "frames is 0; expected a whole number from 1 up",
        "1000": "clips of 1 to 8 frames, not 1000",
    }
    for frames, words in refusals.items():
        refused = run("--model", str(folder), "--frames", frames)
        assert refused.exit_code == 1
        assert words in " ".join(refused.output.split())
    assert "have no frames" in " ".join(run("--frames", "4").output.split())


def test_bad_requests_are_refused(pictures) -> None:
    bundle = clips_of(pictures)
    with pytest.raises(CodecError, match="1 to 8 frames, not 9"):
        generate(bundle, Request(PROMPT, frames=9))
    with pytest.raises(RequestError, match="no picture goes"):
        picture = Image.new("RGB", (64, 64))
        from twostep.pipeline.request import Picture

        generate(bundle, Request(PROMPT, image=Picture.of(picture)))
    with pytest.raises(Exception, match="64x64"):
        generate(bundle, Request(PROMPT, width=72, height=64))


def test_modules_and_pictures_that_do_not_fit_are_refused(pictures, folder, tmp_path) -> None:
    other = MotionModule(MotionConfig(channels=(32, 64), layers=1, groups=16))
    with pytest.raises(MotionError, match="another family"):
        clips_of(pictures, other)
    with pytest.raises(ModelError, match="family 'motion'"):
        load_pictures([str(folder)])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in ("twostep.json", "motion.json"):
        (damaged / path).write_text((folder / path).read_text())
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_bundle(damaged)
    (damaged / "motion.json").write_text('{"bases": []}')
    with pytest.raises(ModelError, match=r"motion\.json: bases"):
        load_bundle(damaged)
    (damaged / "motion.json").unlink()
    with pytest.raises(ModelError, match=r"motion\.json does not exist"):
        load_bundle(damaged)


def test_clips_are_encoded_frame_by_frame(pictures) -> None:
    bundle = clips_of(pictures, frames=2)
    clips = 2 * torch.rand(2, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    latents = bundle.codec.encode(clips)
    assert tuple(latents.shape[1:]) == bundle.latent_shape(64, 64)
    single = pictures[0].codec.encode(clips[:, :, 1])
    assert torch.allclose(latents[:, :, 1], single, atol=1e-5)
    preview = bundle.codec.preview(latents)
    assert preview.shape == (2, 3, 64, 128)
    decoded = bundle.codec.decode(latents)
    assert torch.allclose(preview[..., 64:], decoded[:, :, 1], atol=1e-5)
