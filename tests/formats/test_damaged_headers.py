"""2,000 headers with something wrong: every one is refused in a line, or is whole after all."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save, save_file

from twostep.errors import TwostepError
from twostep.formats.checkpoint import resolve
from twostep.formats.embeddings import bundled_embeddings, find_embeddings
from twostep.formats.header import read_header
from twostep.formats.identify import summary
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import read_lora
from twostep.models.loading import load_bundle

ODD: list[Any] = [
    None, [], {}, "", "F16", -1, 0, 1, 2**40, 2**70, 1.5, True, [1], [-1], [0, 4], [[1]], {"a": 1},
]  # fmt: skip


def damaged(header: dict[str, Any], rng: random.Random) -> bytes:
    """Return a header with one thing changed, as bytes."""
    changed = copy.deepcopy(header)
    name = rng.choice(list(changed))
    match rng.randrange(8):
        case 0:
            changed[name] = rng.choice(ODD)
        case 1:
            changed["__metadata__"] = rng.choice(ODD)
        case 2:
            changed["__metadata__"] = {"x": rng.choice(ODD)}
        case 3 | 4:
            tensor = changed[name]
            key = rng.choice(["dtype", "shape", "data_offsets"])
            if isinstance(tensor, dict):
                tensor[key] = rng.choice(ODD)
        case 5:
            changed.pop(name)
        case 6:
            changed[f"{name}.alpha"] = changed[name]
        case 7:
            data = bytearray(json.dumps(changed).encode())
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
    return json.dumps(changed).encode()


def metadata_damaged(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a header in which a value of the metadata is other text, or other JSON."""
    changed = copy.deepcopy(header)
    metadata = changed["__metadata__"]
    key = rng.choice(sorted(metadata))
    if rng.random() < 0.3:
        metadata[key] = rng.choice(["", "null", "[]", "{}", "1", "NaN", '"x"', "[[[[", "\u2028"])
        return changed
    try:
        inside = json.loads(metadata[key])
    except ValueError:
        metadata[key] = str(rng.choice(ODD))
        return changed
    if isinstance(inside, dict) and inside:
        inside[rng.choice(sorted(inside))] = rng.choice(ODD)
    metadata[key] = json.dumps(inside)
    return changed


def read_by_every_reader(path: Path, parts: dict[str, Any]) -> int:
    """Read a file as a model, a LoRA, an adapter of a request and a textual inversion.

    Returns how many of them refuse it; any error but one line of ours goes through.
    """
    readers: list[Callable[[], object]] = [
        lambda: summary(read_header(path)),
        lambda: resolve(path).contracts,
        lambda: read_lora(path, parts),
        lambda: find_embeddings([path]),
        lambda: bundled_embeddings(read_header(path)),
    ]
    refused = 0
    for read in readers:
        try:
            read()
        except TwostepError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, error
    return refused


@pytest.mark.slow
def test_2000_damaged_headers_in_every_reader(tmp_path: Path) -> None:
    """LoRAs by PEFT's and kohya's names and textual inversions, with a contract and settings."""
    parts = load_bundle("nano").parts
    lora = dict(list(load_file(find_model("nano_4step_lora")).items())[:6])
    with safetensors.safe_open(find_model("nano_4step_lora"), "pt") as file:
        said = dict(file.metadata())
    said |= {
        "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": {}}),
        "ss_network_alpha": "4",
        "modelspec.prediction_type": "v",
        "modelspec.title": "x lightning 4 steps",
    }
    words = {"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(2, 96)}
    bundled = {f"bundle_emb.fox.{key}": value for key, value in words.items()}
    headers = []
    for tensors in (lora, words, {**lora, **bundled}):
        data = save(tensors, said)
        end = 8 + int.from_bytes(data[:8], "little")
        headers.append((json.loads(data[8:end]), data[end:]))
    rng = random.Random(1)
    path = tmp_path / "odd.safetensors"
    refused = 0
    for case in range(2000):
        header, body = headers[case % len(headers)]
        if case % 2:
            text = json.dumps(metadata_damaged(header, rng)).encode()
        else:
            text = damaged(header, rng)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        refused += read_by_every_reader(path, parts)
    assert refused > 4000


@pytest.mark.slow
def test_2000_damaged_headers(tmp_path: Path) -> None:
    small = dict(list(load_file(find_model("nano_4step_lora")).items())[:4])
    good = tmp_path / "good.safetensors"
    save_file(small, good, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})})
    data = good.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), data[end:]
    rng = random.Random(0)
    path = tmp_path / "odd.safetensors"
    refused = 0
    for _ in range(2000):
        text = damaged(header, rng)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        try:
            summary(read_header(path))
        except ModelError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            continue
        # What is taken is what the format's own library takes, too.
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys())
    assert refused > 1000


@pytest.mark.parametrize(
    ("metadata", "is_read"),
    [("null", True), ("{}", True), ("[]", False), ('{"a": 1}', False), ('{"a": null}', False)],
)
def test_metadata_are_text_by_name_or_refused(metadata: str, is_read: bool, tmp_path: Path) -> None:
    tensor = '"x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}'
    text = f'{{"__metadata__": {metadata}, {tensor}}}'.encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    if is_read:
        assert read_header(path).metadata == {}
    else:
        with pytest.raises(ModelError, match="its metadata are"):
            read_header(path)


def test_tensors_that_overlap_or_leave_a_hole_are_refused(tmp_path: Path) -> None:
    for offsets, size in (([0, 2], 4), ([1, 3], 4), ([4, 6], 6)):
        header = {
            "x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
            "y": {"dtype": "F16", "shape": [1], "data_offsets": offsets},
        }
        text = json.dumps(header).encode()
        path = tmp_path / "odd.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
        with pytest.raises(ModelError, match="lies at"):
            read_header(path)
