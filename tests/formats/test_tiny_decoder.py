"""Tiny decoders by their names: TAESD's, diffusers' and ComfyUI's files are told and read alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.formats import ModelError
from twostep.formats.header import read_header
from twostep.formats.identify import kind_of, summary
from twostep.formats.tiny_decoder import (
    DECODER_FILE,
    NOTE_KEY,
    DecoderNote,
    TinyLayout,
    file_name,
    find_decoder,
    look_at_decoder,
)

LAYOUT = TinyLayout(latent_channels=4, width=8, blocks=(2, 1, 0, 1))
TAESD = TinyLayout(latent_channels=4, width=64, blocks=(3, 3, 3, 1))
PREFIXES = {
    "TAESD": "{taesd}",
    "diffusers": "decoder.{diffusers}",
    "ComfyUI": "taesd_decoder.{taesd}",
    "converters": "decoder.{taesd}",
}


def written(
    path: Path, layout: TinyLayout = LAYOUT, form: str = "{taesd}", **metadata: str
) -> Path:
    tensors = {
        form.format(taesd=file_name(name), diffusers=name): torch.zeros(shape)
        for name, shape in layout.shapes.items()
    }
    save_file(tensors, path, metadata)
    return path


def test_the_layout_has_the_names_and_the_weights_of_taesd() -> None:
    """As `Decoder` of taesd.py makes them: counted by hand from its list of layers."""
    shapes = {file_name(name): shape for name, shape in TAESD.shapes.items()}
    # 0 clamp, 1 conv, 2 relu, 3-5 blocks, 6 upsample, 7 conv, 8-10, 11, 12, 13-15, 16, 17, 18, 19.
    assert shapes["1.weight"] == (64, 4, 3, 3)
    assert {name for name in shapes if name.count(".") == 1} == {
        "1.weight", "1.bias", "7.weight", "12.weight", "17.weight", "19.weight", "19.bias",
    }  # fmt: skip
    assert shapes["19.weight"] == (3, 64, 3, 3)
    blocks = {int(name.split(".")[0]) for name in shapes if ".conv." in name}
    assert blocks == {3, 4, 5, 8, 9, 10, 13, 14, 15, 18}
    assert TAESD.pixels_per_latent == 8


@pytest.mark.parametrize("form", PREFIXES.values(), ids=PREFIXES.keys())
def test_every_dialect_is_read_as_the_same_decoder(form: str, tmp_path: Path) -> None:
    found = look_at_decoder(written(tmp_path / "x.safetensors", form=form))
    assert found.layout == LAYOUT
    assert set(found.names) == set(LAYOUT.shapes)
    what = "a tiny decoder" if form == "{taesd}" else "a tiny autoencoder"
    assert kind_of(found.header).what == what
    assert summary(found.header)["decodes"].startswith("4 channels of latents, 8 pixels")


def test_an_encoder_beside_it_is_left_out_and_alone_is_told(tmp_path: Path) -> None:
    both = {f"decoder.{name}": torch.zeros(shape) for name, shape in LAYOUT.shapes.items()}
    both["encoder.layers.0.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(both, tmp_path / "both.safetensors")
    found = look_at_decoder(tmp_path / "both.safetensors")
    assert not any("encoder" in key for key in found.names.values())
    encoder = {"0.weight": torch.zeros(8, 3, 3, 3), "1.conv.0.weight": torch.zeros(8, 8, 3, 3)}
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(ModelError, match=r"is a tiny encoder.*no tiny decoder. Give a file such"):
        look_at_decoder(tmp_path / "encoder.safetensors")


def test_a_note_says_what_it_was_made_for(tmp_path: Path) -> None:
    note = DecoderNote(family="sdxl", base="nano", recipe="mine", version="0", psnr=31.5)
    path = written(tmp_path / "x.safetensors", **note.to_metadata())
    assert DecoderNote.of_header(read_header(path)) == note
    assert summary(read_header(path))["decodes"].endswith("those of nano")
    broken = written(tmp_path / "broken.safetensors", **{NOTE_KEY: json.dumps({"format": 1})})
    with pytest.raises(ModelError, match=r"what it says of itself .* is damaged"):
        DecoderNote.of_header(read_header(broken))


def test_a_folder_holds_one_and_its_config_the_scale(tmp_path: Path) -> None:
    written(tmp_path / "diffusion_pytorch_model.safetensors", form="decoder.{diffusers}")
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 0.5, "act_fn": "relu"}))
    assert find_decoder(str(tmp_path)).scaling_factor == 0.5
    (tmp_path / "config.json").write_text(json.dumps({"act_fn": "silu"}))
    with pytest.raises(ModelError, match=r"act_fn = 'silu'; only 'relu' is known"):
        find_decoder(str(tmp_path))
    # What was distilled here counts, and has no config.
    written(tmp_path / DECODER_FILE)
    assert find_decoder(str(tmp_path)).header.path.name == DECODER_FILE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.safetensors", "there is no decoder .*nowhere.safetensors. Give `tiny`, `full`"),
        ("empty", "has no tiny decoder; looked for tiny_decoder.safetensors"),
        ("lora.safetensors", "is a LoRA.*no tiny decoder. Give a file such as taesdxl_decoder"),
        ("f32.safetensors", "no decoder of TAESD's architecture: 3.weight is 2x8x3x3"),
        ("flat.safetensors", "no decoder of TAESD's architecture: it begins with 1.weight of 8x4"),
        ("decoder.pth", "pickle"),
    ],
)
def test_what_is_none_is_told(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    down, up = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
    save_file({down: torch.zeros(2, 8), up: torch.zeros(8, 2)}, tmp_path / "lora.safetensors")
    # Channels that fall from one resolution to the next, as those of TAESANA do.
    falling = {
        "1.weight": torch.zeros(8, 4, 3, 3), "1.bias": torch.zeros(8),
        "3.weight": torch.zeros(2, 8, 3, 3), "4.conv.0.weight": torch.zeros(2, 2, 3, 3),
        "5.weight": torch.zeros(3, 2, 3, 3), "5.bias": torch.zeros(3),
    }  # fmt: skip
    save_file(falling, tmp_path / "f32.safetensors")
    flat = {"1.weight": torch.zeros(8, 4), "3.conv.0.weight": torch.zeros(8, 8, 3, 3)}
    save_file(flat, tmp_path / "flat.safetensors")
    torch.save({"1.weight": torch.zeros(1)}, tmp_path / "decoder.pth")
    with pytest.raises(ModelError, match=message):
        find_decoder(str(tmp_path / name))
