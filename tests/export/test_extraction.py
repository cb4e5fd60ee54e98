"""A LoRA that was merged in comes out again, and a model with it draws the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from twostep.contract import Contract
from twostep.export.extraction import extract, low_rank
from twostep.export.writing import export
from twostep.formats.header import read_header
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import merge_lora, read_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.saving import save_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

from ..vanilla import assemble
from .conftest import random_lora, small_bundle


@pytest.mark.parametrize(
    "shape", [torch.Size((40, 30)), torch.Size((20, 8, 3, 3)), torch.Size((8, 8))]
)
def test_a_change_of_low_rank_is_given_back(shape: torch.Size) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(shape[0], 5, generator=generator),
        torch.randn(5, shape[1:].numel(), generator=generator),
    )
    change = up @ down
    low = low_rank(change.reshape(shape), 5)
    assert (low.change - change).norm() / change.norm() < 1e-5
    assert (low.rank, low.alpha, low.down.shape) == (5, 5.0, (5, *shape[1:]))
    best = torch.linalg.svdvals(change)[3:].norm()
    assert (low_rank(change.reshape(shape), 3).change - change).norm() == pytest.approx(
        best.item(), rel=1e-3
    )
    assert low_rank(change.reshape(shape), 64).rank == min(shape[0], change.shape[1])
    state = torch.get_rng_state()
    low_rank(change, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_merged_lora_comes_out_again(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Text encoders too; of float32 models, so that the sum of weight and change is exact enough."""
    tuned, out = small_bundle(), tmp_path / "lora.safetensors"
    merge_lora(random_lora(tuned), tuned.parts)
    assemble(tuned, timestep_spacing="trailing").save_pretrained(tmp_path / "tuned")
    lacks, left = extract(str(folder), str(tmp_path / "tuned"), out, rank=3)
    assert lacks < 1e-5 and left == []
    expected, extracted = random_lora(bundle), read_lora(out, bundle.parts)
    assert extracted.keys() == expected.keys()
    for layer, low in extracted.items():
        change = expected[layer].change
        assert (low.change - change).norm() / change.norm() < 1e-5, layer
    assert "twostep.contract" not in read_header(out).metadata


def test_a_model_with_it_draws_the_same(tmp_path: Path) -> None:
    student = load_with_loras("nano", ["nano_4step_lora"])
    whole = replace(student.contract, lora_rank=None, lora_alpha=None)
    assemble(student, timestep_spacing="trailing").save_pretrained(tmp_path / "nano4")
    (tmp_path / "nano4" / "twostep.json").write_text(whole.to_json())
    lacks, _ = extract("nano", str(tmp_path / "nano4"), tmp_path / "lora.safetensors", rank=12)
    again = load_with_loras("nano", [str(tmp_path / "lora.safetensors")])
    assert lacks < 1e-4 and again.contract == student.contract
    request = Request("a 3d red apple on a blue background", seed=3)
    ours, theirs = (
        np.asarray(generate(each, request).images[0], dtype=float) for each in (student, again)
    )
    assert np.abs(ours - theirs).max() <= 1


def test_of_a_student_it_has_the_contract(tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    lacks, left = extract("nano", "nano", out, rank=24, steps=4)
    assert (
        0.05 < lacks < 0.95 and left and all(key.endswith("bias") or "norm" in key for key in left)
    )
    contract = Contract.from_metadata(read_header(out).metadata)
    assert (contract.name, contract.base, contract.steps) == ("nano-4step", "nano", 4)
    assert (contract.lora_rank, contract.lora_alpha) == (24, 24.0)
    assert load_with_loras("nano", [str(out)]).contract.steps == 4
    nearer, _ = extract("nano", "nano", tmp_path / "more.safetensors", rank=96, steps=4)
    assert nearer < lacks
    assert (tmp_path / "lora.api.json").is_file()


def test_what_has_nothing_in_common_or_no_difference_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match="No layer of nano differs from nano"):
        extract("nano", "nano", out, rank=4)
    other = load_bundle("nano")
    with pytest.raises(ModelError, match="are of two kinds: text_encoder"):
        extract("nano", str(folder), out, rank=4)
    assert other.contract.name == "nano" and not out.exists()


def test_where_only_others_weights_changed_there_is_no_lora(tmp_path: Path) -> None:
    out = export("nano", "diffusers", tmp_path / "base")
    save_bundle(load_bundle(out), tmp_path / "tuned")
    unet = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    weights["conv_norm_out.weight"] += 1
    save_file(weights, unet, {"format": "pt"})
    with pytest.raises(ModelError, match="there is nothing to extract"):
        extract(str(out), str(tmp_path / "tuned"), tmp_path / "x.safetensors", rank=4)
