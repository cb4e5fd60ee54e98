"""A family from outside the package: its contract names it, and it is loaded, saved, exported and
drawn with.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.contract import Contract
from twostep.export.writing import export
from twostep.formats import Checkpoint, ModelError
from twostep.formats.checkpoint import look_at_folder, student_path
from twostep.formats.locate import CONTRACT_FILE
from twostep.models import families
from twostep.models.bundle import Bundle
from twostep.models.families import Family, family_of, find_family, register_family
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle, save_student
from twostep.models.sdxl import SdxlFamily
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

INNER = "inner"
STUDENT_WEIGHTS = "network"


class NestedFamily:
    """Keeps SDXL's networks a folder deeper, and students as whole files by names of its own."""

    name = "nested"

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        inner = look_at_folder(checkpoint.path / INNER)
        bundle = SdxlFamily().load(inner, outline=outline)
        contract = checkpoint.contract_for(steps)
        if contract.steps in checkpoint.students:
            weights = load_file(checkpoint.students[contract.steps].path)
            bundle.denoiser.network.load_state_dict(
                {key.removeprefix(STUDENT_WEIGHTS): value for key, value in weights.items()}
            )
        return replace(bundle, contract=contract, origin=(checkpoint.name,))

    def save(self, bundle: Bundle, folder: Path) -> None:
        SdxlFamily().save(bundle, folder / INNER)
        (folder / CONTRACT_FILE).write_text(bundle.contract.to_json())

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        path = student_path(contract, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"{STUDENT_WEIGHTS}{key}": value for key, value in weights.items()}
        save_file(named, path, contract.to_metadata())
        return path


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what is registered as it was."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def nested(bundle: Bundle) -> Bundle:
    return replace(bundle, contract=replace(bundle.contract, family="nested"))


def test_a_model_is_loaded_saved_exported_and_drawn_by_its_family(tmp_path: Path) -> None:
    register_family(NestedFamily())
    bundle = nested(load_bundle("nano"))
    save_bundle(bundle, tmp_path / "first")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [INNER, CONTRACT_FILE]
    loaded = load_bundle(tmp_path / "first")
    assert loaded.contract == bundle.contract
    out = export(tmp_path / "first", "diffusers", tmp_path / "second")
    assert (out / INNER / "unet").is_dir() and "nested" in (out / "README.md").read_text()
    request = Request("a red apple", steps=2, seed=1)
    first = generate(loaded, request).images[0]
    assert generate(load_bundle(out), request).images[0].tobytes() == first.tobytes()
    for to in ("comfyui", "unet"):
        with pytest.raises(ModelError, match=f"no SDXL model, and {to} files"):
            export(tmp_path / "first", to, tmp_path / "x.safetensors")


def test_students_are_saved_and_found_by_the_family(tmp_path: Path) -> None:
    register_family(NestedFamily())
    save_bundle(nested(load_bundle("nano")), tmp_path / "model")
    student = nested(load_bundle("nano", steps=4))
    weights = student.denoiser.network.state_dict()
    save_student(weights, student.contract, tmp_path / "model")
    loaded = load_bundle(tmp_path / "model", steps=4)
    assert loaded.contract == student.contract
    for key, value in loaded.denoiser.network.state_dict().items():
        assert torch.equal(value, weights[key])


def test_a_contract_does_not_import_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("outside")
    module.FAMILY = NestedFamily
    monkeypatch.setitem(sys.modules, "outside", module)
    assert isinstance(find_family("outside:FAMILY"), NestedFamily)
    contract = replace(load_bundle("nano", outline=True).contract, family="outside:FAMILY")
    with pytest.raises(ModelError, match="no model family 'outside:FAMILY'; there are sdxl"):
        family_of(contract)
    with pytest.raises(ModelError, match="no model family 'nested'"):
        family_of(replace(contract, family="nested"))
    for name, problem in (
        ("outside:NOTHING", "NOTHING"),
        ("nowhere_at_all:FAMILY", "nowhere_at_all"),
        ("json:loads", "is function, which is no model family"),
    ):
        with pytest.raises(ModelError, match=problem):
            find_family(name)


def test_sdxl_is_a_family_like_any_other() -> None:
    assert isinstance(find_family("sdxl"), Family)
    assert find_family(load_bundle("nano", outline=True).contract.family) is find_family("sdxl")
