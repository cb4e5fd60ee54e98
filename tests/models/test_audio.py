"""The family of sounds on disk."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.sounds import tiny_sound_model
from twostep.contract import Contract, student_name
from twostep.formats import locate
from twostep.formats.locate import ModelError
from twostep.models.audio import CODEC_FILE, CONFIG_FILE, NETWORK_FILE, AudioFamily
from twostep.models.bundle import Bundle
from twostep.models.families import Family, find_family
from twostep.models.loading import load_bundle
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.models.saving import save_bundle, save_student
from twostep.networks.conditioning import Conditioning


@pytest.fixture(scope="module")
def teacher() -> Bundle:
    return tiny_sound_model()[0]


@pytest.fixture
def folder(teacher: Bundle, tmp_path: Path) -> Path:
    save_bundle(teacher, tmp_path / "model")
    return tmp_path / "model"


class Deaf:
    """The prompts of another family, which all mean the same."""

    networks: ClassVar[dict[str, torch.nn.Module]] = {}

    def with_networks(self, networks: Mapping[str, Any]) -> "Deaf":
        return self

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(prompts), 1, 0), torch.zeros(len(prompts), 30)

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        return Conditioning(*self.encode(prompts), torch.zeros(len(prompts), 6))

    def unknown_words(self, prompt: str) -> list[str]:
        return []


def latents(bundle: Bundle, **sampling: int) -> torch.Tensor:
    size = bundle.contract.sizes[0]
    guided = encode_prompts(bundle, ["a low piano note, C3"], size)
    return sample_prompts(bundle, guided, [3], size, **sampling)


def test_a_model_comes_back(teacher: Bundle, folder: Path) -> None:
    assert isinstance(find_family("nano-audio"), Family)
    loaded = load_bundle(folder)
    assert loaded.contract == teacher.contract and loaded.text == teacher.text
    sounds = teacher.codec.decode(latents(teacher, steps=2))
    again = loaded.codec.decode(latents(loaded, steps=2))
    # Weights are kept in half precision.
    assert float((sounds - again).abs().mean()) < 0.1 * float(sounds.abs().mean())
    assert torch.equal(loaded.codec.network.basis, teacher.codec.network.basis)
    outline = load_bundle(folder, outline=True)
    assert outline.contract == teacher.contract


def contract_of_student(teacher: Bundle, name: str) -> Contract:
    return replace(
        teacher.contract,
        name=student_name(name, 2),
        role="student",
        steps=2,
        guidance=1.0,
        trained_times=(1.0, 0.75, 0.5, 0.25),
    )


def test_a_student_is_found_in_the_folder_and_by_its_file(
    teacher: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even where a larger teacher of that name is installed.
    monkeypatch.setattr(locate, "entry_points", lambda **_: EntryPoints(()))
    contract = contract_of_student(teacher, "nano-audio")
    weights = {name: 2 * value for name, value in teacher.denoiser.network.state_dict().items()}
    path = save_student(weights, contract, folder)
    for student in (load_bundle(folder, steps=2), load_bundle(path)):
        assert student.contract == contract
        assert torch.allclose(
            student.denoiser.network.enter.weight, weights["enter.weight"], rtol=1e-3
        )
    assert load_bundle(folder).students == (2,)
    alone = folder.parent / "elsewhere.safetensors"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="holds only the network of a student of nano-audio"):
        load_bundle(alone)


def test_damage_is_told(teacher: Bundle, folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    for damage in ({"network": {"channels": 8}}, {"codec": {"bands": "x"}}, {"vocabulary": 3}):
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **damage}))
        with pytest.raises(ModelError, match=f"{CONFIG_FILE} is damaged"):
            load_bundle(folder)
    other = {**config, "network": {**config["network"], "width": 64}}
    (folder / CONFIG_FILE).write_text(json.dumps(other))
    with pytest.raises(ModelError, match=f"{NETWORK_FILE} cannot be loaded"):
        load_bundle(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / CODEC_FILE).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=f"{CODEC_FILE} cannot be loaded"):
        load_bundle(folder)
    (folder / CODEC_FILE).unlink()
    with pytest.raises(ModelError, match=f"{CODEC_FILE} cannot be loaded"):
        load_bundle(folder)
    with pytest.raises(ModelError, match="has Deaf where models of sounds have AttributePrompts"):
        AudioFamily().save(replace(teacher, text=Deaf()), folder)


def test_an_installed_package_declares_models(
    teacher: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As twostep-media does: an entry point names an attribute that is the model's folder."""
    site = tmp_path / "site"
    described = site / "sounds_for_tests-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Name: sounds-for-tests\nVersion: 1\n")
    (described / "entry_points.txt").write_text(
        "[twostep.models]\nchime = sounds_for_tests:CHIME\n"
    )
    (site / "sounds_for_tests.py").write_text(f"CHIME = {str(folder)!r}\n")
    with pytest.raises(ModelError, match="chime does not exist"):
        load_bundle("chime")
    monkeypatch.syspath_prepend(site)
    assert load_bundle("chime").contract.family == "nano-audio"
    contract = contract_of_student(teacher, "chime")
    save_student(teacher.denoiser.network.state_dict(), contract, folder)
    assert load_bundle("chime_2step_unet").contract == contract
    with pytest.raises(ModelError, match=r"built-in name \(nano, .*chime, .*chime_2step_unet"):
        load_bundle("chimes")
    sys.modules.pop("sounds_for_tests", None)
