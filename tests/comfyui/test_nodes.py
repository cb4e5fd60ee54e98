"""The nodes in a stand-in for ComfyUI: their schemas hold, and what they hand out draws our own
picture.
"""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import comfyui
from comfyui.graph import definitions
from comfyui.sampling import sigmas
from twostep.contract import Contract, ContractError
from twostep.diffusion import initial_noise
from twostep.formats.lora_files import merge_lora, read_lora
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

from . import standin
from .conftest import Shelf, student_of

PROMPT, SEED = "a red fox", 5


@pytest.fixture
def nodes(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    standin.install(monkeypatch)
    for folder in shelf.root.iterdir():
        standin.FOLDERS[folder.name] = folder
    import comfyui.nodes

    return comfyui.nodes


def feed(text: object) -> object:
    """Call the network with the text as ComfyUI does: by index, with SDXL's added conditioning."""
    conditioning = text.conditioning([PROMPT], 64, 64)

    def call(network: torch.nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        return network(x[None], index[None], conditioning.text, added_cond_kwargs=added).sample[0]

    return call


def drawn(loaded: standin.NodeOutput) -> torch.Tensor:
    """Sample what a loader handed out, as SamplerCustom would."""
    model, text, _, steps, _, _ = loaded.args
    with torch.inference_mode():
        return standin.sampler_custom(model, initial_noise(SEED, (4, 16, 16)), steps, feed(text))


def ours(bundle: object) -> torch.Tensor:
    foreseen = []
    generate(
        bundle,
        Request(PROMPT, seed=SEED),
        on_step=lambda step: foreseen.append(step.prediction.x0[0]),
    )
    return foreseen[-1]


def test_the_package_is_imported_without_comfyui() -> None:
    code = (
        "import comfyui, sys; heavy = ('torch', 'comfy_api', 'folder_paths'); "
        "print([name for name in sys.modules if name in heavy])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def test_comfyui_finds_three_nodes(nodes: ModuleType) -> None:
    extension = asyncio.run(comfyui.comfy_entrypoint())
    assert isinstance(extension, standin.ComfyExtension)
    listed = asyncio.run(extension.get_node_list())
    assert [node.define_schema().node_id for node in listed] == [
        *("TwostepLoader", "TwostepStudentSwitch", "TwostepContract")
    ]
    assert not hasattr(comfyui, "NODE_CLASS_MAPPINGS"), "V1 would win"


def test_schemas_are_those_that_workflows_are_checked_against(
    nodes: ModuleType, shelf: Shelf
) -> None:
    shelf.checkpoint("a")
    known = definitions()
    for node in (nodes.TwostepLoader, nodes.TwostepStudentSwitch, nodes.TwostepContract):
        schema, info = node.define_schema(), node.object_info()
        for spec in info["input"]["required"].values():
            spec[1].pop("options", None)
            spec[1].pop("step", None)
        assert info == known[schema.node_id]
        assert schema.display_name.startswith("Twostep ") and schema.description.endswith(".")


def test_files_are_offered_by_folder(nodes: ModuleType, shelf: Shelf) -> None:
    shelf.checkpoint("c"), shelf.unet("u"), shelf.lora("l")
    (shelf.root / "checkpoints" / "old.ckpt").write_bytes(b"")
    file, base, _ = nodes.TwostepLoader.define_schema().inputs
    assert file.options["options"] == [
        *("checkpoints/c.safetensors", "diffusion_models/u.safetensors", "loras/l.safetensors")
    ]
    assert base.options["options"] == ["none", "c.safetensors"]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_checkpoint_draws_our_picture(nodes: ModuleType, shelf: Shelf, steps: int) -> None:
    path = shelf.checkpoint("fast", student_of(steps))
    shelf.configs(path)
    loaded = nodes.TwostepLoader.run(file="checkpoints/fast.safetensors", base="none", strength=1.0)
    assert loaded.args[4:] == (steps, 1.0)
    torch.testing.assert_close(loaded.args[3], sigmas(student_of(steps)))
    torch.testing.assert_close(drawn(loaded), ours(load_bundle(path)), atol=1e-4, rtol=1e-4)


def test_a_base_that_predicts_v_draws_our_picture(nodes: ModuleType, shelf: Shelf) -> None:
    path = shelf.checkpoint("v", student_of(4, prediction_type="v"))
    shelf.configs(path)
    loaded = nodes.TwostepLoader.run(file="checkpoints/v.safetensors", base="none", strength=1.0)
    torch.testing.assert_close(drawn(loaded), ours(load_bundle(path)), atol=1e-4, rtol=1e-4)


def test_the_wrong_prediction_would_show(nodes: ModuleType, shelf: Shelf) -> None:
    path = shelf.checkpoint("one", student_of(1))
    shelf.configs(path)
    loaded = nodes.TwostepLoader.run(file="checkpoints/one.safetensors", base="none", strength=1.0)
    loaded.args[0].patches["model_sampling"] = type("Wrong", (standin.Steps, standin.Eps), {})(
        SimpleNamespace()
    )
    assert (drawn(loaded) - ours(load_bundle(path))).abs().max() > 0.1


def test_a_unet_takes_text_encoders_and_vae_of_the_base(nodes: ModuleType, shelf: Shelf) -> None:
    base = shelf.checkpoint("base")
    shelf.configs(base)
    path = nano_student(shelf)
    inputs = {"file": f"diffusion_models/{path.name}", "strength": 1.0}
    loaded = nodes.TwostepLoader.run(**inputs, base="base.safetensors")
    calls = [("checkpoint", "base.safetensors", False), ("unet", path.name)]
    assert calls == standin.CALLS
    bundle = load_bundle("nano", steps=2)
    conditioning = loaded.args[1].conditioning([PROMPT], 64, 64)
    expected = ours(bundle)
    both = standin.NodeOutput(loaded.args[0], bundle.text, *loaded.args[2:])
    torch.testing.assert_close(drawn(both), expected, atol=1e-4, rtol=1e-4)
    assert conditioning.text.shape[-1] == 160 and loaded.args[2] is not None
    alone = nodes.TwostepLoader.run(**inputs, base="none")
    assert alone.args[1:3] == (None, None) and alone.args[4:] == (2, 1.0)


def nano_student(shelf: Shelf) -> Path:
    """The built-in 2-step student among ComfyUI's UNets."""
    from twostep.formats.locate import find_model

    path = shelf.root / "diffusion_models" / "nano_2step_unet.safetensors"
    path.write_bytes(find_model("nano_2step_unet").read_bytes())
    return path


def test_a_lora_makes_its_base_a_student(nodes: ModuleType, shelf: Shelf) -> None:
    base = shelf.checkpoint("anime")
    shelf.configs(base)
    contract: Contract = student_of(4, lora_rank=2, lora_alpha=1.0)
    lora = shelf.lora("fast", contract)
    for strength in (1.0, 0.5):
        standin.CALLS.clear()
        loaded = nodes.TwostepLoader.run(
            file="loras/fast.safetensors", base="anime.safetensors", strength=strength
        )
        assert standin.CALLS[-1] == ("strength", strength, strength) and loaded.args[4:] == (4, 1.0)
        bundle = load_bundle(base)
        merge_lora(read_lora(lora, bundle.parts), bundle.parts, weight=strength)
        student = ours(replace(bundle, contract=contract))
        torch.testing.assert_close(drawn(loaded), student, atol=1e-4, rtol=1e-4)


def test_the_switch_loads_the_student_of_so_many_steps(nodes: ModuleType, shelf: Shelf) -> None:
    for steps in (1, 2, 4):
        shelf.configs(shelf.checkpoint(f"s{steps}", student_of(steps)))
    inputs = {"file": "checkpoints/s4.safetensors", "base": "none", "strength": 1.0}
    for steps in (1, 2, 4):
        loaded = nodes.TwostepStudentSwitch.run(**inputs, steps=steps)
        assert loaded.args[4] == steps and len(loaded.args[3]) == steps + 1
        assert standin.CALLS[-1][1] == f"s{steps}.safetensors"
    with pytest.raises(ContractError, match="there are students for 4, 2, 1"):
        nodes.TwostepStudentSwitch.run(**inputs, steps=8)


def test_the_inspector_says_it_and_shows_it(nodes: ModuleType, shelf: Shelf) -> None:
    shelf.unet("u", student_of(1))
    answer = nodes.TwostepContract.run(file="diffusion_models/u.safetensors")
    assert answer.args[0].startswith("name: small-1step (a UNet alone, student)")
    assert answer.ui == {"text": (answer.args[0],)}
    assert standin.CALLS == [], "no weights were loaded"


def test_a_file_written_anew_is_read_anew(nodes: ModuleType, shelf: Shelf) -> None:
    path = shelf.unet("u", student_of(2))
    file, rest = "diffusion_models/u.safetensors", {"base": "none", "strength": 1.0}
    asked = [
        lambda: nodes.TwostepLoader.fingerprint_inputs(file, **rest),
        lambda: nodes.TwostepStudentSwitch.fingerprint_inputs(file, 2, **rest),
        lambda: nodes.TwostepContract.fingerprint_inputs(file),
    ]
    before = [ask() for ask in asked]
    assert [ask() for ask in asked] == before
    os.utime(path, ns=(1, 1))
    assert all(ask() != was for ask, was in zip(asked, before, strict=True))
