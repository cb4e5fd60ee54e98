"""Our graphs in a real ComfyUI: the same latents and the same pictures as here.

    TWOSTEP_COMFYUI=path/to/ComfyUI pytest tests/comfyui/test_real.py

What ComfyUI requires must be importable, but for torchvision and torchaudio. Without the variable
the tests are skipped: `tests/pipeline/test_workflow.py` then still compares the graphs with the
definitions of the nodes.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui.graph import definitions, problems
from twostep.contract import Contract, VariancePreservingSpec
from twostep.export import verification
from twostep.export.writing import export
from twostep.formats.lora_files import write_lora
from twostep.pipeline.request import Control, Picture, Request
from twostep.pipeline.studio import Studio
from twostep.pipeline.workflow import workflow_of

from . import real
from .conftest import STUDENT, lora_of

FOLDER = os.environ.get("TWOSTEP_COMFYUI")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="TWOSTEP_COMFYUI names no ComfyUI"),
]

SIZE = (320, 192)

SCALE = 0.13025
"""By which SDXL's latents are scaled, which ComfyUI's nodes undo between each other."""


@dataclass
class World:
    comfy: Any
    root: Path
    studio: Studio
    models: dict[str, str]
    control: str


def picture(size: tuple[int, int], seed: int, *, has_holes: bool = False) -> Image.Image:
    """A smooth picture of four colours, with transparent parts or without."""
    levels = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
    if has_holes:
        alpha = np.linspace(0, 255, size[0]).astype(np.uint8)[None].repeat(size[1], 0)
        image.putalpha(Image.fromarray(alpha))
    return image


def stroke(size: tuple[int, int]) -> Image.Image:
    """A white block and a line of one pixel on black."""
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[10:60, 33:99] = 255
    mask[size[1] - 21, :] = 255
    return Image.fromarray(mask)


def student(steps: int, **changes: Any) -> Contract:
    times = changes.get("sampling_times", STUDENT.trained_times)
    fields = {"name": "s", "steps": steps, "sizes": (SIZE,), "trained_times": times}
    return replace(STUDENT, **fields | changes)


CONTRACTS = {
    "teacher": None,
    "student-4": student(4),
    "x0-1": student(1, prediction_type="x0"),
    "v": student(4, prediction_type="v"),
    "zero-snr": student(3, prediction_type="v", schedule=VariancePreservingSpec(zero_snr=True)),
    "lcm-4": student(
        4,
        sampler="renoise",
        sampling_times=(1000, 760, 500, 260),
        trained_times=(1000, 760, 500, 260),
    ),
    "renoise-3": student(3, sampler="renoise", trained_times=(1000, 667, 333)),
    "one-at-400": student(1, sampler="renoise", sampling_times=(400,)),
    "two-at-600": student(2, sampler="renoise", sampling_times=(600, 300)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("comfyui")
    bundle = real.small_bundle()
    comfy = real.ComfyUI(Path(FOLDER or ""), root)
    models = {}
    for name, contract in CONTRACTS.items():
        path = root / "checkpoints" / f"{name}.safetensors"
        models[name] = str(real.write_checkpoint(bundle, path, contract))
    control = real.write_control(bundle, root / "controlnet" / "lines.safetensors")
    for name, factor in (("ink", 1.0), ("wool", -2.0)):
        changes = {
            key: replace(low, up=low.up * factor, alpha=2.0) for key, low in lora_of(bundle).items()
        }
        weights, metadata = write_lora(changes, bundle.parts, "kohya")
        save_file(weights, root / "loras" / f"{name}.safetensors", metadata)
    picture(SIZE, 1).save(root / "input" / "same.png")
    picture((500, 401), 2).save(root / "input" / "other.png")
    picture(SIZE, 3, has_holes=True).save(root / "input" / "holes.png")
    stroke(SIZE).save(root / "input" / "mask.png")
    stroke((500, 401)).save(root / "input" / "mask-other.png")
    inverse = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    inverse.putalpha(stroke(SIZE))
    inverse.save(root / "input" / "mask-strokes.png")
    yield World(comfy, root, Studio(), models, str(control))


def request_of(world: World, model: str, **wish: Any) -> Request:
    values = {"seed": 11, "width": SIZE[0], "height": SIZE[1]} | wish
    for name in ("image", "mask"):
        if name in values:
            values[name] = Picture.of(world.root / "input" / values[name])
    if "controls" in values:
        values["controls"] = tuple(
            Control(Picture.of(world.root / "input" / name), world.control, *numbers)
            for name, *numbers in values["controls"]
        )
    if "loras" in values:
        values["loras"] = tuple(str(world.root / "loras" / name) for name in values["loras"])
    prompt = values.pop("prompt", "a red fox")
    return Request(prompt, model=world.models[model], **values)


def drawn_by_both(world: World, request: Request) -> tuple[float, float, float]:
    """Draw a request here and there.

    Returns how far the last prediction of x0 differs in proportion, and the largest and the mean
    difference of the pictures in levels of 255.
    """
    steps = []
    result = world.studio.draw(request, on_step=lambda step: steps.append(step.prediction.x0))
    graph = workflow_of(result.contract, result.request, result.traits)
    assert graph is not None
    assert problems(graph, definitions()) == []
    done = world.comfy.run(graph)
    (decoded,) = [node for node in graph.values() if node["class_type"] == "VAEDecode"]
    theirs = done[decoded["inputs"]["samples"][0]][0]["samples"] * SCALE
    ours = steps[-1]
    if request.mask is not None:
        # Here the image is put back after the last prediction, and there before.
        is_drawn = (theirs - ours).abs().amax(dim=1, keepdim=True) < 1e-2 * ours.std()
        assert is_drawn.any() and not is_drawn.all()
        theirs = torch.where(is_drawn, theirs, ours)
    relative = ((theirs - ours).norm() / ours.norm()).item()
    image = np.asarray(result.images[0]).astype(float)
    other = (done["image"][0].numpy() * 255).round()
    return relative, np.abs(image - other).max(), np.abs(image - other).mean()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{n} steps": ("teacher", {"steps": n, "guidance": 5.0}) for n in (1, 3, 4, 6, 7, 32)},
    **{f"dpmpp-2m {n}": ("teacher", {"steps": n, "sampler": "dpmpp-2m"}) for n in (2, 4, 6, 11)},
    "no guidance": ("teacher", {"steps": 6, "guidance": 1.0}),
    "negative": ("teacher", {"steps": 4, "negative_prompt": "a dog (in rain)"}),
    "weights": ("teacher", {"steps": 4, "prompt": r"a (red:1.3) \(small\) ((fox)) in the snow"}),
    "two loras": ("teacher", {"steps": 4, "loras": ("ink.safetensors:0.8", "wool:-0.5")}),
    "image": ("teacher", {"steps": 6, "image": "same.png", "strength": 0.5}),
    "image, simple": ("teacher", {"steps": 8, "image": "same.png", "strength": 0.5}),
    "image, dpmpp-2m": (
        "teacher",
        {"steps": 12, "image": "same.png", "strength": 0.6, "sampler": "dpmpp-2m"},
    ),
    "image at full strength": ("teacher", {"steps": 4, "image": "same.png", "strength": 1.0}),
    "image of another shape": ("teacher", {"steps": 6, "image": "other.png", "strength": 0.5}),
    "image with holes": ("teacher", {"steps": 4, "image": "holes.png", "strength": 0.5}),
    "mask": ("teacher", {"steps": 6, "image": "same.png", "mask": "mask.png"}),
    "mask and image of another shape": (
        "teacher",
        {"steps": 5, "image": "other.png", "mask": "mask-other.png"},
    ),
    "mask of strokes": ("teacher", {"steps": 3, "image": "same.png", "mask": "mask-strokes.png"}),
    "mask, half strength": (
        "teacher",
        {"steps": 20, "image": "same.png", "mask": "mask.png", "strength": 0.5},
    ),
    "mask, half strength, dpmpp-2m": (
        "teacher",
        {
            "steps": 12,
            "image": "same.png",
            "mask": "mask.png",
            "strength": 0.5,
            "sampler": "dpmpp-2m",
        },
    ),
    "control": ("teacher", {"steps": 4, "controls": (("same.png",),)}),
    "control of some steps": ("teacher", {"steps": 7, "controls": (("other.png", 0.6, 0.2, 0.8),)}),
    "two controls": (
        "teacher",
        {"steps": 3, "controls": (("same.png", 0.5), ("holes.png", 1.5, 0.3, 1.0))},
    ),
    "control that never acts": (
        "teacher",
        {"steps": 3, "controls": (("same.png", 1.0, 0.4, 0.6),)},
    ),
    "all at once": (
        "teacher",
        {
            "steps": 6,
            "image": "other.png",
            "mask": "mask-other.png",
            "controls": (("same.png", 0.5, 0.0, 0.5),),
            "loras": ("ink.safetensors:0.8",),
            "negative_prompt": "a dog",
        },
    ),
    "student": ("student-4", {}),
    "student, image": ("student-4", {"image": "same.png", "strength": 0.75}),
    "student, mask": ("student-4", {"image": "same.png", "mask": "mask.png"}),
    "x0": ("x0-1", {}),
    "v": ("v", {}),
    "zero snr": ("zero-snr", {}),
    "lcm": ("lcm-4", {}),
    "lcm, image": ("lcm-4", {"image": "same.png", "strength": 0.5}),
    "lcm, mask": ("lcm-4", {"image": "same.png", "mask": "mask.png"}),
    "renoise": ("renoise-3", {}),
    "renoise, control": ("renoise-3", {"controls": (("same.png", 0.6, 0.3, 1.0),)}),
    "renoise, mask, half strength": (
        "renoise-3",
        {"image": "same.png", "mask": "mask.png", "strength": 0.67},
    ),
    "one step below the top": ("one-at-400", {}),
    "two steps below the top": ("two-at-600", {}),
}


BOUNDS = {
    # What is half transparent is rounded to 255 levels here, and not there.
    "image with holes": 2e-3,
    # There x is counted in units of 1 / alpha, 4096 at the top, of which float32 keeps 2e-4.
    "zero snr": 1e-4,
}


@pytest.mark.parametrize("name", CASES)
def test_comfyui_draws_the_same(world: World, name: str) -> None:
    model, wish = CASES[name]
    relative, largest, mean = drawn_by_both(world, request_of(world, model, **wish))
    print(f"{name:32} {relative:.1e} {largest:.0f} {mean:.4f}")
    assert relative < BOUNDS.get(name, 2e-5)
    # A level that lies between two is rounded either way.
    assert largest <= 1 and mean < 0.05


VERIFIED: dict[str, tuple[str, int | None, tuple[str, ...]]] = {
    **{f"teacher, {steps} steps": ("teacher", steps, ()) for steps in (3, 7, 32)},
    "teacher with a LoRA": ("teacher", 6, ("ink.safetensors:0.8", "wool.safetensors:-0.5")),
    "student": ("student-4", None, ()),
    "student that predicts x0": ("x0-1", None, ()),
    "student that predicts v": ("v", None, ()),
    "student with zero SNR": ("zero-snr", None, ()),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_compares_every_step(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models as they are exported: a LoRA is merged into a base there."""
    monkeypatch.setattr(verification, "SDXL_CHANNELS", real.SMALL.unet_channels)
    model, steps, loras = VERIFIED[name]
    path = tmp_path / "exported.safetensors"
    paths = tuple(str(world.root / "loras" / lora) for lora in loras)
    export(world.models[model], "comfyui", path, loras=paths)
    shutil.copytree(Path(world.models[model]).with_suffix(""), path.with_suffix(""))
    differences = verification.verify(
        path, prompt="a red fox", steps=steps, comfyui=Path(FOLDER or "")
    )
    print(f"{name:32} {max(relative for _, relative in differences):.1e}")
    assert len(differences) == (steps or CONTRACTS[model].steps)
    assert all(relative < 1e-4 for _, relative in differences)
    if name == "teacher, 7 steps":
        levels = verification.noise_levels
        monkeypatch.setattr(
            verification, "noise_levels", lambda contract: [1.001 * x for x in levels(contract)]
        )
        wrong = verification.verify(
            path, prompt="a red fox", steps=steps, comfyui=Path(FOLDER or "")
        )
        assert any(relative > 1e-4 for _, relative in wrong)


def test_what_would_be_wrong_is_seen(world: World) -> None:
    """The same graphs with `simple`, another seed or no mask are far off."""
    request = request_of(world, "teacher", steps=6, guidance=5.0)
    result = world.studio.draw(request)
    graph = workflow_of(result.contract, result.request, result.traits)
    right = world.comfy.run(graph)["image"]
    for changes in (
        {"ManualSigmas": {"sigmas": "14.6146, 8.5, 3.1, 1.4, 0.7, 0.25, 0"}},
        {"CLIPTextEncode": {"text": "a dog"}},
        {"SamplerCustom": {"cfg": 4.8}},
    ):
        wrong = {
            name: {
                "class_type": node["class_type"],
                "inputs": node["inputs"] | changes.get(node["class_type"], {}),
            }
            for name, node in graph.items()
        }
        assert (world.comfy.run(wrong)["image"] - right).abs().mean() > 1e-3
