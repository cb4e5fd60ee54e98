"""Other programs draw the same, and what does not is found."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from twostep.contract import EdmSpec, RectifiedFlowSpec
from twostep.diffusion import trailing_times
from twostep.export.card import workflow_steps
from twostep.export.verification import noise_levels, verify
from twostep.export.writing import export
from twostep.formats import read_contracts
from twostep.formats.contracts import SDXL
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle

from ..vanilla import assemble, write_single_file

PROMPT = "a 3d red apple"


@pytest.mark.parametrize("steps", [8, 4, 2, 1])
def test_students_are_what_diffusers_makes_of_the_same_files(steps: int) -> None:
    differences = verify("nano", prompt=PROMPT, seed=3, steps=steps)
    assert len(differences) == steps
    assert all(0 < relative < 1e-5 and largest < 1e-4 for largest, relative in differences)


@pytest.mark.slow
def test_teachers_loras_and_exports_too(folder: Path, tmp_path: Path) -> None:
    assert len(verify(str(folder), prompt=PROMPT)) == 32
    for model in (
        "nano_2step_lora",
        "nano_1step_unet",
        export("nano", "diffusers", tmp_path / "out", steps=2),
    ):
        assert max(relative for _, relative in verify(str(model), prompt=PROMPT)) < 1e-5


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EDMEulerScheduler"},
        {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "prediction_type": "v_prediction",
            "sigma_data": 1.0,
            "sigma_max": 120.0,
            "sigma_schedule": "exponential",
        },
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_other_laws_of_noise_are_what_diffusers_makes_of_the_same_folder(
    bundle: Bundle, tmp_path: Path, config: dict[str, object]
) -> None:
    """A teacher at any number of steps; EDM's programs count in other units."""
    assemble(bundle).save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    bound = 1e-3 if "beta_schedule" in config else 1e-4  # a cosine's table is in single precision
    differences = verify(str(tmp_path / "mine"), prompt=PROMPT, steps=3)
    assert len(differences) == 3
    assert all(0 < relative < bound for _, relative in differences)


def test_single_files_are_what_diffusers_makes_of_them(
    folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """Loaded by diffusers itself, text encoders too; a mark says that one predicts v."""
    whole = export(folder, "comfyui", tmp_path / "whole.safetensors")
    (tmp_path / "whole").symlink_to(folder)
    assert max(relative for _, relative in verify(str(whole), prompt=PROMPT, steps=3)) < 1e-4
    write_single_file(bundle, whole, v_pred=torch.zeros(0))
    assert max(relative for _, relative in verify(str(whole), prompt=PROMPT, steps=3)) < 1e-4


def test_the_levels_for_comfyui_are_those_of_the_trailing_grid() -> None:
    """(sigma / alpha)(t) of SDXL at 1000, 750, 500 and 250, worked out in double precision."""
    levels = noise_levels(replace(SDXL, steps=4))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[[999, 749, 499, 249]]
    assert levels == pytest.approx([*np.sqrt((1 - abar) / abar), 0], rel=1e-9)
    assert levels[0] == pytest.approx(14.6146, abs=1e-4)
    edm = replace(SDXL, steps=2, schedule=EdmSpec(), prediction_type="edm")
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert noise_levels(edm) == pytest.approx([80, middle, 0], rel=1e-9)
    flow = replace(SDXL, schedule=RectifiedFlowSpec(), prediction_type="flow")
    with pytest.raises(ModelError, match="nothing to compare with"):
        noise_levels(flow)


def test_a_teacher_s_workflow_visits_the_trailing_times_exactly(
    folder: Path, tmp_path: Path
) -> None:
    """ComfyUI's scheduler takes every 1000 / N-th level from the top, rounded down."""
    export(folder, "comfyui", tmp_path / "whole.safetensors")
    workflow = json.loads((tmp_path / "whole.api.json").read_text())
    (steps,) = (
        node["inputs"]["steps"] for node in workflow.values() if node["class_type"] == "KSampler"
    )
    assert steps == 40
    simple = [1000 - int(k * 1000 / steps) for k in range(steps)]
    assert simple == list(trailing_times(steps))
    for contract in (replace(SDXL, steps=8), replace(SDXL, steps=25), replace(SDXL, steps=50)):
        assert workflow_steps(contract) == contract.steps
    rounded = [1000 - int(k * 1000 / 32) for k in range(32)]
    assert sum(a != b for a, b in zip(rounded, trailing_times(32), strict=True)) == 12


def test_what_cannot_be_verified_is_told(
    folder: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(folder, "comfyui", tmp_path / "whole.safetensors")
    (tmp_path / "whole").symlink_to(folder)
    with pytest.raises(ModelError, match=r"is no ComfyUI: it has no comfy/sd\.py"):
        verify(str(whole), prompt=PROMPT, comfyui=tmp_path)
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "comfy" / "cli_args.py").write_text(
        "from types import SimpleNamespace\nargs = SimpleNamespace()\n"
    )
    with pytest.raises(ModelError, match="is no whole file, which ComfyUI loads: twostep export"):
        verify(str(folder), prompt=PROMPT, comfyui=tmp_path)
    with pytest.raises(ModelError, match=r"has the widths \[48, 96, 160\], and ComfyUI knows SDXL"):
        verify(str(whole), prompt=PROMPT, comfyui=tmp_path)
    monkeypatch.setattr("twostep.export.verification.SDXL_CHANNELS", (48, 96, 160))
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfy"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"a_library_that_is_not_there.*pip install -r .*require"):
        verify(str(whole), prompt=PROMPT, comfyui=tmp_path)
    for more in (["--against", "a1111"], ["--against", "comfyui"], ["--comfyui-path", tmp_path]):
        answer = run("verify", "nano", *more)
        assert answer.exit_code == 1 and "comfyui together with --comfyui-path" in answer.output
