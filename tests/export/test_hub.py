"""What would go to the hub, and that exactly this goes there; nothing here reaches it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard

from twostep.export.hub import files_to_push, push
from twostep.export.writing import export
from twostep.formats.locate import ModelError


class Desk(HfApi):
    """The hub's client up to where it would reach for the network; what it checks before is its
    own.
    """

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.made = (repo_id, settings)

    def create_commit(self, repo_id: str, operations: Any, **settings: Any) -> CommitInfo:
        self.sent = {operation.path_in_repo: operation.upload_info.size for operation in operations}
        return CommitInfo("https://hf.co/me/x/commit/0", "Add", "", "0")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("nano", "diffusers", tmp_path_factory.mktemp("hub") / "nano4", steps=4)


def test_a_folder_goes_whole_and_nothing_else(exported: Path) -> None:
    (exported / ".cache").mkdir(exist_ok=True)
    (exported / ".cache" / "x").write_text("mine")
    desk = Desk()
    assert push(exported, "me/nano4", private=True, api=desk) == "https://hf.co/me/x/commit/0"
    there = {
        str(path.relative_to(exported)): path.stat().st_size
        for path in exported.rglob("*")
        if path.is_file()
    }
    del there[".cache/x"]
    assert (
        desk.sent == there
        and "README.md" in there
        and "unet/diffusion_pytorch_model.safetensors" in there
    )
    assert desk.made == ("me/nano4", {"private": True, "exist_ok": True})


def test_of_a_file_its_card_is_the_readme(tmp_path: Path) -> None:
    out = export("nano", "lora-kohya", tmp_path / "lora.safetensors", steps=2)
    (tmp_path / "other.safetensors").write_bytes(out.read_bytes())
    desk = Desk()
    push(out, "me/lora", api=desk)
    assert sorted(desk.sent) == ["README.md", "lora.api.json", "lora.json", "lora.safetensors"]


def test_the_dry_run_lists_files_sizes_and_front_matter(exported: Path, run: Callable) -> None:
    answer = run("push", exported, "me/nano4", "--dry-run")
    assert answer.exit_code == 0
    for name, path in files_to_push(exported, "me/nano4").items():
        assert f"{path.stat().st_size:,}  me/nano4/{name}" in answer.stdout
    front = ModelCard((exported / "README.md").read_text()).data.to_yaml()
    assert (
        answer.stdout.strip().endswith("tags: [text-to-image, few-step, twostep]")
        and "license: other" in front
    )


def test_what_should_not_go_there_is_told(exported: Path, tmp_path: Path) -> None:
    for name in ("too/many/slashes", "spaces are bad/x", "x" * 200):
        with pytest.raises(ModelError, match="is no name on the hub"):
            files_to_push(exported, name)
    with pytest.raises(ModelError, match="has no card or no weights"):
        files_to_push(tmp_path, "me/x")
    (tmp_path / "README.md").touch()
    (tmp_path / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="no whole safetensors"):
        files_to_push(tmp_path, "me/x")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="is a pickle, which nobody should have to load"):
        files_to_push(tmp_path, "me/x")


def test_what_the_connection_says_is_passed_on(exported: Path) -> None:
    class Away(Desk):
        def create_repo(self, repo_id: str, **settings: Any) -> None:
            raise ConnectionError("Name or service not known")

    with pytest.raises(
        ModelError, match=r"me/x could not be written \(Name or service not known\).*hf auth login"
    ):
        push(exported, "me/x", api=Away())
