"""However a model is named, the header of each of its files is read once, and its weights once."""

import builtins
import io
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.formats import header, resolve
from twostep.formats.locate import find_model
from twostep.formats.tiny_decoder import DECODER_FILE
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.lora_stack import LoraCache


class Opens:
    """Counts by path how often files are opened.

    `headers` counts Python's own `open`, by which headers are read; `weights` counts `safe_open`,
    by which all of safetensors' functions read tensors.
    """

    def __init__(self) -> None:
        self.headers: Counter[str] = Counter()
        self.weights: Counter[str] = Counter()


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opens]:
    counted = Opens()
    open_file, safe_open = io.open, safetensors.safe_open

    def counting_open(file: Any, *arguments: Any, **named: Any) -> Any:
        if str(file).endswith(".safetensors"):
            counted.headers[str(Path(file).resolve())] += 1
        return open_file(file, *arguments, **named)

    def counting_safe_open(file: Any, *arguments: Any, **named: Any) -> Any:
        counted.weights[str(Path(file).resolve())] += 1
        return safe_open(file, *arguments, **named)

    header._read_header.cache_clear()
    monkeypatch.setattr(io, "open", counting_open)
    monkeypatch.setattr(builtins, "open", counting_open)
    for module in list(sys.modules.values()):
        # Whoever imported the function holds it under its own name.
        if vars(module).get("safe_open") is safe_open:
            monkeypatch.setattr(module, "safe_open", counting_safe_open)
    yield counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the built-in model, so that nothing is found by its name."""
    folder = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(find_model("nano"), folder)
    return folder


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs without a contract."""
    folder = tmp_path_factory.mktemp("styles")
    weights = load_file(find_model("nano_4step_lora"))
    paths = [folder / "ink.safetensors", folder / "wool.safetensors"]
    for scale, path in zip((0.1, 0.2), paths, strict=True):
        save_file({key: scale * value for key, value in weights.items()}, path)
    return paths


def networks(folder: Path) -> set[str]:
    """The weights that are in the folder itself: UNet, autoencoder, text encoders, tiny decoder."""
    files = [*folder.glob("*/*.safetensors"), folder / DECODER_FILE]
    paths = {str(path.resolve()) for path in files}
    return {path for path in paths if Path(path).parent.name not in ("students", "controlnet")}


def unet_students(folder: Path) -> set[str]:
    return {str(path.resolve()) for path in folder.glob("students/*_unet.safetensors")}


def once(paths: set[str]) -> Counter[str]:
    return Counter(paths)


def test_generate_with_two_loras_reads_every_file_once(
    folder: Path, styles: list[Path], opens: Opens, tmp_path: Path
) -> None:
    loras = [f"{styles[0]}:0.5", str(styles[1])]
    arguments = ["generate", "a red fox", "--model", str(folder), "--steps", "2"]
    arguments += ["--out", str(tmp_path / "out"), "--lora", loras[0], "--lora", loras[1]]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    loras_read = {str(path.resolve()) for path in styles}
    parts = {path for path in networks(folder) if Path(path).parent.name != "unet"}
    student = {str((folder / "students" / "nano_2step_unet.safetensors").resolve())}
    # The picture says the hash of each LoRA, for which its bytes are read once more.
    hashed = once(loras_read)
    assert opens.headers == once(loras_read | parts | unet_students(folder)) + hashed
    assert opens.weights == once(loras_read | parts | student)


def test_generate_by_its_defaults_reads_every_file_once(
    folder: Path, opens: Opens, tmp_path: Path
) -> None:
    arguments = ["generate", "a red fox", "--model", str(folder), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    parts = {path for path in networks(folder) if Path(path).parent.name != "unet"}
    assert opens.headers == once(parts | unet_students(folder))


@pytest.mark.parametrize("kind", ["unet", "lora"])
def test_a_students_file_is_not_read_again_as_one_of_its_folder(
    kind: str, folder: Path, opens: Opens
) -> None:
    path = folder / "students" / f"nano_4step_{kind}.safetensors"
    assert load_bundle(path).students == (8, 4, 2, 1)
    assert set(opens.headers.values()) == {1}
    assert opens.weights[str(path.resolve())] == 1
    assert set(opens.weights.values()) == {1}


def test_a_checkpoint_is_passed_on(folder: Path, styles: list[Path], opens: Opens) -> None:
    checkpoint = resolve(folder)
    assert [contract.steps for contract in checkpoint.contracts] == [32, 8, 4, 2, 1]
    assert opens.headers == once(unet_students(folder))
    assert checkpoint.contracts is checkpoint.contracts
    load_with_loras(checkpoint, [str(styles[0])], steps=4)
    assert set(opens.headers.values()) == {1}
    assert not set(opens.headers) & {str(path) for path in folder.glob("students/*_lora*")}


def test_stacks_that_share_loras_read_each_of_them_once(
    folder: Path, styles: list[Path], opens: Opens
) -> None:
    cache = LoraCache(load_bundle(folder))
    opens.headers.clear()
    opens.weights.clear()
    ink, wool = map(str, styles)
    for stack in ([ink], [f"{ink}:0.5", wool], [wool, ink], [f"{ink}:0.5", wool]):
        cache.apply(stack)
    assert opens.headers == opens.weights == once({str(path.resolve()) for path in styles})


def test_a_lora_that_was_written_anew_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    weights = load_file(find_model("nano_4step_lora"))
    save_file(weights, path)
    cache = LoraCache(load_bundle(folder))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = cache.bundle.conditioning(["a red fox"], 64, 64)

    def answer(lora: str) -> torch.Tensor:
        return cache.apply([lora]).denoiser(x, torch.tensor([500]), conditioning).eps

    first = answer(str(path))
    save_file({key: value * 2 for key, value in weights.items()}, path)
    assert not torch.equal(answer(f"{path}:1.0"), first)
