"""Where a LoRA lies: files, folders, and the hub, whose cache is used without a connection."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from twostep.cli import app
from twostep.formats.checkpoint import resolve
from twostep.formats.locate import ModelError, find_model, read_json
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


def test_what_was_removed_from_the_cache_is_fetched_again(
    lora: Path, hub: list[tuple[str, str]]
) -> None:
    assert find_lora_file("me/style") == lora
    fetched = list(hub)
    assert find_lora_file("me/style") == lora and hub == fetched
    lora.unlink()
    find_lora_file("me/style")
    assert hub == 2 * fetched


def test_a_missing_local_path_is_not_asked_of_the_hub(
    lora: Path, hub: list[tuple[str, str]]
) -> None:
    (lora.parent / "loras").mkdir()
    for name in ("loras/ink", "./ink2", "loras/ink.safetensors", "/nowhere/ink.safetensors"):
        with pytest.raises(ModelError):
            find_lora_file(name)
    assert hub == []


def test_every_name_of_a_model_may_be_that_of_a_lora(
    lora: Path, hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path without its ending, a folder, a repository, a file in one: as `--lora` takes them."""
    import huggingface_hub

    (tmp_path / "none").mkdir()

    def snapshot(repository: str, local_files_only: bool = False, **_: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing yet")
        return str(tmp_path / "none")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    names = (str(lora.with_suffix("")), str(lora.parent), "me/style", "me/style/ink.safetensors")
    for name in names:
        checkpoint = resolve(name)
        assert (checkpoint.path, checkpoint.name, checkpoint.is_lora) == (lora, name, True)
    shutil.copy(lora, lora.with_name("wool.safetensors"))
    with pytest.raises(ModelError, match="several files"):
        resolve(str(lora.parent))


def test_what_holds_no_weights_is_refused_as_a_model(
    lora: Path, hub: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match="it is no model folder"):
        resolve(tmp_path / "none")
    with pytest.raises(ModelError, match="it is no model folder"):
        resolve("")
    for path in ("./me/style", Path("me/style"), "/me/style.safetensors"):
        with pytest.raises(ModelError, match="does not exist"):
            resolve(path)
    assert hub == []


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "{}"),
        ("info", "{}"),
        ("convert", "{}", "--to", "kohya", "--out", "a.safetensors"),
        ("export", "{}", "--to", "lora-peft", "--out", "b.safetensors"),
        ("export", "nano", "--lora", "{}", "--to", "unet", "--out", "c.safetensors"),
    ],
)
def test_commands_take_a_lora_of_the_hub(
    command: tuple[str, ...],
    lora: Path,
    hub: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    shutil.move(lora, tmp_path / "cache.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, file: str(tmp_path / "cache.safetensors"),
    )
    filled = [part.format("me/style/ink.safetensors") for part in command]
    result = CliRunner().invoke(app, filled)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_configs_are_read_as_editors_save_them(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"name": "caf\u00e9"}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"name": "caf\u00e9"}
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ModelError, match="is damaged"):
        read_json(tmp_path / "config.json")
