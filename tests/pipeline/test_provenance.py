"""Every PNG says how it was made, in A1111's words and in our own, and is written whole or not at
all.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.output import OutputError
from twostep.pipeline.provenance import ProvenanceError, a1111_text, read_provenance, save_images
from twostep.pipeline.request import LoraChoice, Request, Result

PROMPT = 'a "red" apple, 3d: größer'


@pytest.fixture(scope="module")
def result(student: Bundle) -> Result:
    return generate(student, Request(PROMPT, num_images=3, seed=7))


def a1111_settings(text: str) -> dict[str, str]:
    """Read the last line the way its readers do."""
    pairs = re.findall(
        r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1]
    )
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def test_a_picture_can_be_drawn_again_from_its_file(
    result: Result, student: Bundle, tmp_path: Path
) -> None:
    paths = save_images(result, tmp_path / "new" / "folder")
    assert len(set(paths)) == 3
    provenance = read_provenance(paths[2])
    assert provenance.contract == student.contract
    settled = {"steps": 4, "guidance": 1.0, "width": 64, "height": 64, "sampler": "euler"}
    assert provenance.request == Request(PROMPT, seed=9, **settled)
    again = save_images(generate(student, provenance.request), tmp_path / "again")
    with Image.open(paths[2]) as first, Image.open(again[0]) as second:
        difference = max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True))
    assert difference <= 1


def test_a1111_line(result: Result, tmp_path: Path) -> None:
    text = read_provenance(save_images(result, tmp_path)[1]).parameters
    assert text.splitlines()[0] == PROMPT
    assert "Negative prompt" not in text
    settings = a1111_settings(text)
    assert list(settings) == [
        "Steps",
        "Sampler",
        "Schedule type",
        "CFG scale",
        "Seed",
        "Size",
        "Model",
        "RNG",
        "Version",
    ]
    assert (settings["Steps"], settings["Sampler"], settings["Schedule type"]) == (
        "4",
        "Euler",
        "Simple",
    )
    assert (settings["CFG scale"], settings["Seed"], settings["Size"]) == ("1", "8", "64x64")
    assert (settings["RNG"], settings["Model"]) == ("CPU", result.contract.name)


def test_a1111_values_with_commas_are_quoted_and_negative_prompts_shown(
    result: Result, tmp_path: Path
) -> None:
    odd = replace(
        result,
        contract=replace(result.contract, name="a, b: c"),
        request=replace(result.request, negative_prompt="blur", guidance=4.5),
    )
    text = read_provenance(save_images(odd, tmp_path)[0]).parameters
    assert text.splitlines()[1] == "Negative prompt: blur"
    assert a1111_settings(text)["Model"] == "a, b: c"
    assert a1111_settings(text)["CFG scale"] == "4.5"


def test_a1111_is_told_the_loras_in_its_own_words(result: Result) -> None:
    request = replace(
        result.request,
        loras=(LoraChoice("styles/ink.safetensors", 0.8), LoraChoice("owner/wool", -1.0)),
    )
    first, *_ = a1111_text(result.contract, request).splitlines()
    assert first == f"{PROMPT} <lora:ink:0.8> <lora:wool:-1>"
    again = Request(first)
    assert (again.prompt, [str(lora) for lora in again.loras]) == (
        PROMPT,
        ["ink:0.8", "wool:-1.0"],
    )


def test_nothing_is_overwritten(result: Result, tmp_path: Path) -> None:
    first = save_images(result, tmp_path)
    assert save_images(result, tmp_path) == first
    other = save_images(replace(result, images=result.images[::-1]), tmp_path)
    assert other[0] != first[0]
    assert len(list(tmp_path.iterdir())) == 5  # the middle picture is the same both times


def test_names_stay_in_the_folder(result: Result, tmp_path: Path) -> None:
    odd = replace(
        result,
        contract=replace(result.contract, name="../../up"),
        request=replace(result.request, prompt="../" * 200),
    )
    paths = save_images(odd, tmp_path / "out")
    assert {path.parent for path in paths} == {tmp_path / "out"}
    assert all(len(path.name) < 100 for path in paths)


def test_folder_that_cannot_be_written_is_one_clear_error(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "below"):
        with pytest.raises(OutputError, match=r"cannot write to .*Choose a folder"):
            save_images(result, folder)
    assert list(tmp_path.iterdir()) == [file]


def test_picture_without_provenance(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    with pytest.raises(ProvenanceError, match="has no 'twostep' text chunk"):
        read_provenance(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        with pytest.raises(ProvenanceError, match="cannot be read as a picture"):
            read_provenance(tmp_path / name)
