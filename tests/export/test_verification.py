"""Other programs draw the same, and what does not is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from twostep.export.verification import verify
from twostep.export.writing import export
from twostep.formats import read_contracts
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle

from ..vanilla import assemble

PROMPT = "a 3d red apple"


@pytest.mark.parametrize("steps", [8, 4, 2, 1])
def test_students_are_what_diffusers_makes_of_the_same_files(steps: int) -> None:
    differences = verify("nano", prompt=PROMPT, seed=3, steps=steps)
    assert len(differences) == steps
    assert all(0 < relative < 1e-5 and largest < 1e-4 for largest, relative in differences)


def test_teachers_loras_and_exports_too(folder: Path, tmp_path: Path) -> None:
    assert len(verify(str(folder), prompt=PROMPT)) == 32
    for model in (
        "nano_2step_lora",
        "nano_1step_unet",
        export("nano", "diffusers", tmp_path / "out", steps=2),
    ):
        assert max(relative for _, relative in verify(str(model), prompt=PROMPT)) < 1e-5


def test_a_base_that_predicts_v_and_what_is_exported_of_it(bundle: Bundle, tmp_path: Path) -> None:
    assemble(bundle, prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    assert read_contracts(tmp_path / "v")[0].prediction_type == "v"
    for model in (tmp_path / "v", export(tmp_path / "v", "diffusers", tmp_path / "out")):
        assert max(relative for _, relative in verify(str(model), prompt=PROMPT)) < 1e-5


def test_a_difference_is_found(tmp_path: Path) -> None:
    """With Karras' noise levels in its scheduler's config, diffusers calls other times."""
    out = export("nano", "diffusers", tmp_path / "out", steps=4)
    scheduler = out / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        json.dumps(json.loads(scheduler.read_text()) | {"use_karras_sigmas": True})
    )
    differences = [relative for _, relative in verify(str(out), prompt=PROMPT)]
    assert differences[0] < 1e-5 and min(differences[1:]) > 1e-3


def test_the_verb_fails_over_the_bound(run: Callable) -> None:
    good = run("verify", "nano", "--steps", 2)
    assert good.exit_code == 0
    assert [line.split(":")[0] for line in good.stdout.splitlines() if line.startswith("step")] == [
        "step 1",
        "step 2",
    ]
    bad = run("verify", "nano", "--steps", 2, "--bound", 1e-12)
    assert bad.exit_code == 1 and "nano differs from diffusers by more than 1e-12" in bad.output


def test_what_cannot_be_verified_is_told(folder: Path, tmp_path: Path, run: Callable) -> None:
    whole = export(folder, "comfyui", tmp_path / "whole.safetensors")
    (tmp_path / "whole").symlink_to(folder)
    with pytest.raises(ModelError, match=r"twostep convert .* --to diffusers"):
        verify(str(whole), prompt=PROMPT)
    with pytest.raises(ModelError, match=r"is no ComfyUI: it has no comfy/sd\.py"):
        verify(str(whole), prompt=PROMPT, comfyui=tmp_path)
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").touch()
    with pytest.raises(ModelError, match="is no whole file, which ComfyUI loads: twostep export"):
        verify(str(folder), prompt=PROMPT, comfyui=tmp_path)
    for more in (["--against", "a1111"], ["--against", "comfyui"], ["--comfyui-path", tmp_path]):
        answer = run("verify", "nano", *more)
        assert answer.exit_code == 1 and "comfyui together with --comfyui-path" in answer.output
