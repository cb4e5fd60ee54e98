"""Where a LoRA lies: files, folders, and the hub, whose cache is used without a connection."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_locate import _on_hub, find_lora_file


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return Path(shutil.copy(find_model("nano_4step_lora"), tmp_path / "ink.safetensors"))


def test_a_file_a_folder_a_name(lora: Path) -> None:
    assert find_lora_file(str(lora)) == lora
    assert find_lora_file(str(lora.with_suffix(""))) == lora
    assert find_lora_file(str(lora.parent)) == lora
    assert find_lora_file("nano_4step_lora") == find_model("nano_4step_lora")


def test_of_several_the_usual_name_counts_or_they_are_listed(lora: Path) -> None:
    shutil.copy(lora, lora.with_name("wool.safetensors"))
    with pytest.raises(ModelError, match=r"several files: ink.safetensors, wool.safetensors"):
        find_lora_file(str(lora.parent))
    usual = shutil.copy(lora, lora.with_name("pytorch_lora_weights.safetensors"))
    assert find_lora_file(str(lora.parent)) == Path(usual)


def test_a_folder_without_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match="Pickles are not read"):
        find_lora_file(str(tmp_path))


@pytest.fixture
def hub(lora: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stand in for the hub's client; returns what is fetched."""
    import huggingface_hub

    fetched = []
    files = ["README.md", "adapter_config.json", "ink.safetensors"]

    def download(repository: str, file: str) -> str:
        fetched.append((repository, file))
        return str(lora.with_name(file))

    siblings = [SimpleNamespace(rfilename=name) for name in files]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(lora.parent)
    _on_hub.cache_clear()
    yield fetched
    _on_hub.cache_clear()


@pytest.mark.parametrize("name", ["me/style", "me/style/ink.safetensors", "hf:me/style"])
def test_a_repository_or_a_file_in_one(name: str, lora: Path, hub: list[tuple[str, str]]) -> None:
    assert find_lora_file(name) == lora
    assert hub == [("me/style", "ink.safetensors"), ("me/style", "adapter_config.json")]


def test_a_missing_local_path_is_not_asked_of_the_hub(
    lora: Path, hub: list[tuple[str, str]]
) -> None:
    (lora.parent / "loras").mkdir()
    for name in ("loras/ink", "./ink2", "loras/ink.safetensors", "/nowhere/ink.safetensors"):
        with pytest.raises(ModelError):
            find_lora_file(name)
    assert hub == []
