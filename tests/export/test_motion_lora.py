"""LoRAs on motion modules by AnimateDiff's names, as AnimateDiff-Evolved in ComfyUI takes them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.clips import save_clip_model, save_lora_student
from tests.sounds import save_sound_model
from twostep.export.writing import MOTION_LORA, export
from twostep.formats.header import read_header
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import LoraError
from twostep.formats.motion_files import MotionConfig, to_animatediff
from twostep.models.loading import load_bundle, load_with_loras
from twostep.networks.adapters import add_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_model(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture(scope="module")
def student(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a LoRA of rank 2 whose alpha is not its rank."""
    bundle = load_bundle(folder)
    targets = bundle.denoiser.backbone.spec.lora_targets
    lora = add_lora(bundle.denoiser.network, "fast", rank=2, alpha=3.0, targets=targets)
    torch.manual_seed(1)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_lora_student(folder, lora.scaled_state_dict(), tmp_path_factory.mktemp("lora"))


def as_evolved_patches(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what AnimateDiff-Evolved adds to a motion module, by AnimateDiff's names of weights.

    It leaves out the words that tell a LoRA from the layer it is on, and the factor of alpha.
    """
    patches = {}
    for name, down in lora.items():
        if not name.endswith(".down.weight"):
            continue
        up = lora[name.replace(".down.", ".up.")]
        for word in ("processor.", "_lora", "down."):
            name = name.replace(word, "")
        patches[name.replace("to_out.", "to_out.0.")] = up.float() @ down.float()
    return patches


def test_what_comfyui_adds_to_the_module_is_what_the_lora_adds(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    out = export(student, MOTION_LORA, tmp_path / "motion.safetensors")
    patches = as_evolved_patches(load_file(out))
    before, after = (
        to_animatediff(bundle.denoiser.network.state_dict(), bundle.denoiser.network.shape)
        for bundle in (load_bundle(folder), load_bundle(student))
    )
    assert isinstance(load_bundle(folder).denoiser.network.shape, MotionConfig)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert patches.keys() == changed
    assert any(".ff.net.2." in name for name in changed)
    for name, patch in patches.items():
        difference = after[name] - before[name]
        assert torch.allclose(patch, difference, atol=2e-3 * float(difference.abs().max()) + 1e-6)


def test_it_keeps_its_contract_has_a_card_and_is_read_again(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    out = export(student, MOTION_LORA, tmp_path / "motion.safetensors")
    assert "twostep.contract" in read_header(out).metadata
    card = out.with_suffix(".md").read_text()
    assert "animatediff_motion_lora" in card and "2 steps, Euler" in card
    again = load_with_loras(folder, [str(out)], steps=2).denoiser.network.state_dict()
    expected = load_bundle(student).denoiser.network.state_dict()
    for name, value in expected.items():
        assert torch.allclose(again[name], value, atol=1e-3 * float(value.abs().max()) + 1e-6)


def test_it_is_found_by_its_steps_in_the_folder(student: Path, tmp_path: Path) -> None:
    model = student.parent.parent
    out = export(str(model), MOTION_LORA, tmp_path / "motion.safetensors", steps=2)
    assert len(load_file(out)) == len(load_file(student))


def test_one_without_a_contract_needs_a_model_of_its_kind(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "zoom.safetensors"
    save_file(load_file(student), bare)
    with pytest.raises(ModelError, match="give a model of clips with one of that kind as the base"):
        export(bare, MOTION_LORA, tmp_path / "motion.safetensors")
    out = export(bare, MOTION_LORA, tmp_path / "motion.safetensors", base=str(folder))
    assert not out.with_suffix(".md").exists()
    by_contract = export(student, MOTION_LORA, tmp_path / "told.safetensors")
    told, found = load_file(by_contract), load_file(out)
    assert told.keys() == found.keys()


def test_what_is_no_lora_on_a_motion_module_is_refused(
    folder: Path, student: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    (whole,) = (folder / "students").glob("*.safetensors")
    with pytest.raises(ModelError, match=r"whole motion module, no LoRA\. AnimateDiff-Evolved in"):
        export(whole, MOTION_LORA, out)
    with pytest.raises(ModelError, match="makes pictures, and lora-animatediff files are for"):
        export("nano", MOTION_LORA, out, steps=2)
    with pytest.raises(ModelError, match="makes sounds, and lora-animatediff files are for"):
        export(save_sound_model(tmp_path / "sounds"), MOTION_LORA, out)
    shutil.rmtree(tmp_path / "sounds")
    layer = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    width = load_bundle(folder).denoiser.network.get_submodule(layer).in_features
    other = tmp_path / "lokr.safetensors"
    pieces = {"lokr_w1": torch.ones(1, 1), "lokr_w2": torch.ones(width, width)}
    key = f"lora_unet_{layer.replace('.', '_')}"
    save_file({f"{key}.{name}": value for name, value in pieces.items()}, other)
    with pytest.raises(LoraError, match=r"hold LoRA alone, and .*to_q has a LoKr"):
        export(other, MOTION_LORA, out, base=str(folder))
    assert not out.exists()
