"""ByteDance's files by name, from a hub cache with their names and small random weights; other
files are told.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twostep.contract import ContractError
from twostep.diffusion import trained_times
from twostep.export.conversion import convert
from twostep.export.verification import verify
from twostep.export.writing import export
from twostep.formats import read_contracts, resolve
from twostep.formats.ldm_names import unet_names
from twostep.formats.lightning import LIGHTNING, TRAINED_TIMES
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import LowRank, merge_lora, write_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.lora_stack import LoraCache
from twostep.networks.adapters import TARGETS
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble, with_sdxl_vae, write_single_file

HUB_ID, ALIAS = LIGHTNING

NAMES = [f"sdxl_lightning_{n}step{kind}" for n in (2, 4, 8) for kind in ("", "_unet", "_lora")]
NAMES += ["sdxl_lightning_1step_x0", "sdxl_lightning_1step_unet_x0"]


def test_times_without_torch_are_those_of_the_grid() -> None:
    assert {steps: trained_times(steps) for steps in (8, 4, 2, 1)} == TRAINED_TIMES


def small(seed: int) -> Bundle:
    """A nano bundle with the kind of autoencoder that SDXL has; the encoders are the same for every
    seed.
    """
    base = with_sdxl_vae(random_bundle())
    return replace(base, denoiser=random_bundle(seed).denoiser)


def repository(hub: Path, name: str) -> Path:
    """Begin the cache of a hub repository, as the hub's own library lays it out."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    return folder / "snapshots" / "0123"


def style_of(bundle: Bundle) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, module in bundle.denoiser.network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(TARGETS):
            shape = module.weight.shape
            down = torch.randn((2, *shape[1:]), generator=generator) / 8
            up = torch.randn((shape[0], 2, *[1] * (len(shape) - 2)), generator=generator) / 8
            changes[f"unet.{name}"] = LowRank(down, up, 1.0)
    return changes


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the base, in 16 bits as its variant, and all eleven files: seed = steps."""
    hub = tmp_path_factory.mktemp("hub")
    base = small(100)
    assemble(base).save_pretrained(
        repository(hub, "stabilityai/stable-diffusion-xl-base-1.0"), variant="fp16"
    )
    folder = repository(hub, HUB_ID)
    for name in NAMES:
        path, student = folder / f"{name}.safetensors", small(int(name[15]))
        if "_lora" in name:
            save_file(write_lora(style_of(base), base.parts, "kohya")[0], path)
        elif "_unet" in name:
            save_file({k: v.half() for k, v in student.denoiser.network.state_dict().items()}, path)
        else:
            write_single_file(student, path)
    return hub


@pytest.fixture
def hub(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(filled))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # SDXL's configs are in the package; these files are of nano's size.
    base = filled / "models--stabilityai--stable-diffusion-xl-base-1.0" / "snapshots" / "0123"
    for module in ("locate", "single_file", "single_header"):
        monkeypatch.setattr(f"twostep.formats.{module}.SDXL_CONFIGS", base)
    return filled


def answer(bundle: Bundle) -> torch.Tensor:
    """What the bare network makes of fixed inputs, with its own text encoders."""
    x, t = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1000]),
    )
    raw = replace(bundle.denoiser, prediction_type="eps")
    return raw(x, t, bundle.conditioning(["a red fox"], 64, 64)).eps


@pytest.mark.parametrize("name", NAMES)
def test_every_file_loads_by_its_name_with_its_contract(name: str, hub: Path) -> None:
    bundle, steps = load_bundle(name), int(name[15])
    contract = bundle.contract
    assert (contract.name, contract.role, contract.steps, contract.guidance) == (
        name,
        "student",
        steps,
        1,
    )
    assert (
        contract.prediction_type
        == bundle.denoiser.prediction_type
        == ("x0" if steps == 1 else "eps")
    )
    assert contract.trained_times == (
        (1000, 875, 750, 625, 500, 375, 250, 125) if steps == 8 else (1000, 750, 500, 250)
    )
    assert (contract.lora_rank, contract.lora_alpha) == (
        (2, 1.0) if "_lora" in name else (None, None)
    )
    assert contract.sizes[0] == (1024, 1024)
    expected = small(100 if "_lora" in name else steps)
    if "_lora" in name:
        merge_lora(style_of(expected), expected.parts)
    torch.testing.assert_close(answer(bundle), answer(expected), atol=5e-3, rtol=5e-3)
    with pytest.raises(ModelError, match=r"has nothing for 3 steps.* A student draws in the steps"):
        load_bundle(name, steps=3)


def test_the_repository_picks_the_unet_of_so_many_steps(hub: Path) -> None:
    for model in (HUB_ID, ALIAS):
        assert [contract.steps for contract in read_contracts(model)] == [8, 4, 2, 1]
        assert load_bundle(model).contract.name == "sdxl_lightning_2step_unet"
        assert load_bundle(model, steps=1).contract.name == "sdxl_lightning_1step_unet_x0"
        with pytest.raises(ContractError, match="8, 4, 2, 1 steps; asked for 3"):
            load_bundle(model, steps=3)
    assert load_bundle(f"{HUB_ID}/sdxl_lightning_8step.safetensors").contract.steps == 8


def test_a_unet_alone_may_have_the_old_names(hub: Path, tmp_path: Path) -> None:
    student = small(4)
    state = {k: v.clone() for k, v in student.denoiser.network.state_dict().items()}
    old = {name: state[key] for key, name in unet_names(state).items()}
    path = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    save_file(old, path)
    torch.testing.assert_close(answer(load_bundle(path)), answer(student), atol=5e-3, rtol=5e-3)
    save_file({k: v for k, v in old.items() if k != "out.2.bias"}, path)
    with pytest.raises(ModelError, match=r"model.diffusion_model.*: 1 weights .* as out.2.bias"):
        load_bundle(path)


def test_the_lora_goes_on_any_base_and_on_no_student(hub: Path, tmp_path: Path) -> None:
    assemble(small(7)).save_pretrained(tmp_path / "anime")
    lora = f"{HUB_ID}/sdxl_lightning_4step_lora.safetensors"
    patched = load_with_loras(tmp_path / "anime", [lora])
    assert (patched.contract.name, patched.contract.base, patched.contract.steps) == (
        "anime-4step",
        "anime",
        4,
    )
    expected = small(7)
    merge_lora(style_of(expected), expected.parts)
    torch.testing.assert_close(answer(patched), answer(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="draws in 4 steps, not in 8"):
        load_with_loras(tmp_path / "anime", [lora], steps=8)
    with pytest.raises(ContractError, match="draws in exactly 4 steps; asked for 8"):
        patched.contract.check(8, None, None, None)
    beside = LoraCache(load_bundle(tmp_path / "anime")).apply([lora])
    assert beside.contract == patched.contract
    torch.testing.assert_close(answer(beside), answer(expected), atol=1e-5, rtol=1e-5)
    for student in (
        "sdxl_lightning_4step",
        "sdxl_lightning_2step_unet",
        "sdxl_lightning_8step_lora",
    ):
        with pytest.raises(ContractError, match="it would be distilled twice"):
            load_with_loras(student, [lora])
    assemble(small(7), prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    with pytest.raises(ContractError, match="was distilled where eps is predicted; v predicts v"):
        load_with_loras(tmp_path / "v", [lora])


def test_a_name_that_does_not_fit_is_told(hub: Path, tmp_path: Path) -> None:
    lora = write_lora(style_of(small(0)), small(0).parts, "kohya")[0]
    for name, message in (
        ("sdxl_lightning_4step_unet", "is a LoRA; by its name it would be a UNet alone"),
        ("sdxl_lightning_4step", "is a LoRA; by its name it would be a whole checkpoint"),
        ("sdxl_lightning_1step_unet", "1 step x0"),
        ("sdxl_lightning_4step_unet_x0", "4 and 2 steps predict eps"),
        ("sdxl_lightning_3step_lora", "There is no official sdxl_lightning_3step_lora"),
    ):
        save_file(lora, tmp_path / f"{name}.safetensors")
        with pytest.raises(ContractError, match=message):
            load_bundle(tmp_path / f"{name}.safetensors")


def test_what_is_not_in_the_cache_is_told(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"ByteDance/SDXL-Lightning is neither a folder here nor to be had"
    ):
        load_bundle(ALIAS)
    half = repository(tmp_path, "stabilityai/stable-diffusion-xl-base-1.0")
    assemble(small(100)).save_pretrained(half, variant="fp16")
    (half / "text_encoder_2" / "model.fp16.safetensors").unlink()
    folder = repository(tmp_path, HUB_ID)
    save_file(
        small(2).denoiser.network.state_dict(), folder / "sdxl_lightning_2step_unet.safetensors"
    )
    with pytest.raises(
        ModelError, match=r"text_encoder_2 has no .safetensors weights \(found: config.json\)"
    ):
        load_bundle(ALIAS)


def test_official_files_are_inspected_converted_exported_and_verified_by_name(
    hub: Path, tmp_path: Path
) -> None:
    lora, first, back = (
        "sdxl_lightning_4step_lora",
        tmp_path / "peft.safetensors",
        tmp_path / "back.safetensors",
    )
    convert(lora, "peft", first)
    convert(str(first), "kohya", back, base="stabilityai/stable-diffusion-xl-base-1.0")
    official, again = load_file(find_model(lora)), load_file(back)
    assert official.keys() == again.keys() and all(
        torch.equal(official[key], again[key]) for key in official
    )
    exported = export(lora, "lora-kohya", tmp_path / "told.safetensors")
    assert resolve(exported).contract == resolve(lora).contract
    assert "license: openrail++" in exported.with_suffix(".md").read_text()
    whole = export("sdxl_lightning_1step_x0", "comfyui", tmp_path / "whole.safetensors")
    assert (resolve(whole).contract.prediction_type, resolve(whole).contract.steps) == ("x0", 1)
    assert '"sampling": "x0"' in whole.with_suffix(".api.json").read_text()
    small_size = ((64, 64),)
    for name in ("sdxl_lightning_2step_unet", "sdxl_lightning_2step"):
        folder = export(name, "diffusers", tmp_path / name)
        contract = replace(load_bundle(folder).contract, sizes=small_size)
        # the cache's weights are of a small model
        (folder / "twostep.json").write_text(contract.to_json())
        assert max(relative for _, relative in verify(str(folder), prompt="a red fox")) < 1e-4
