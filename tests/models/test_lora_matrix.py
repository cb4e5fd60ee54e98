"""A LoRA from every dialect to every other, at several strengths: the weights that diffusers' own
loading and PEFT's own merging make of the first file are those of the last.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from twostep.export.conversion import convert
from twostep.formats.lora_files import (
    DIALECTS,
    find_layer,
    merge_lora,
    read_lora,
    write_lora,
)
from twostep.formats.lora_kinds import LowRank
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache

from ..vanilla import assert_merged_alike, fuse_into_nano

RANK = 3
READ_ONLY = ("diffusers of 2023", "ComfyUI's own", "OneTrainer, with dots", "LyCORIS")
ALL = (*DIALECTS, *READ_ONLY)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


@pytest.fixture(scope="module")
def lora(bundle: Bundle) -> dict[str, LowRank]:
    """A random LoRA on the UNet's attention, its alphas the ranks, so that all dialects hold it."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for name, module in bundle.parts["unet"].named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down = torch.randn((RANK, module.in_features), generator=generator) / 8
            up = torch.randn((module.out_features, RANK), generator=generator) / 8
            changes[f"unet.{name}"] = LowRank(down, up, float(RANK))
    return changes


def write(lora: dict[str, LowRank], bundle: Bundle, dialect: str, path: Path) -> Path:
    """Write a LoRA in a dialect, in those that are only read by rules of their own."""
    if dialect in DIALECTS:
        tensors, metadata = write_lora(lora, bundle.parts, dialect)
        save_file(tensors, path, metadata)
        return path
    tensors: dict[str, Tensor] = {}
    old = write_lora(lora, bundle.parts, "kohya")[0]
    for (layer, low), key in zip(
        lora.items(), [key for key in old if key.endswith("lora_down.weight")], strict=True
    ):
        name = layer.removeprefix("unet.")
        down, up = "lora_down.weight", "lora_up.weight"
        match dialect:
            case "diffusers of 2023":
                stem, word = name.removesuffix(".0").rsplit(".", 1)
                stem, down, up = (
                    f"unet.{stem}.processor.{word}_lora",
                    "down.weight",
                    "up.weight",
                )
            case "ComfyUI's own":
                stem = f"diffusion_model.{dotted(key, bundle)[layer]}"
            case "OneTrainer, with dots":
                stem = f"lora_unet.{name}"
            case _:
                stem = f"lycoris_{name.replace('.', '_')}"
        tensors |= {f"{stem}.{down}": low.down, f"{stem}.{up}": low.up}
        if dialect != "diffusers of 2023":
            tensors[f"{stem}.alpha"] = torch.tensor(low.alpha)
    save_file(tensors, path)
    return path


def dotted(_: str, bundle: Bundle) -> dict[str, str]:
    """Return the layers' names in the first latent diffusion code, with dots."""
    from twostep.formats.ldm_names import unet_names

    keys = bundle.parts["unet"].state_dict()
    names = unet_names(keys)
    return {
        f"unet.{key.removesuffix('.weight')}": names[key].removesuffix(".weight")
        for key in keys
        if key.endswith(".weight")
    }


@pytest.mark.parametrize("first", ALL)
def test_through_every_dialect_it_stays_bit_for_bit(
    first: str, bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    read = read_lora(write(lora, bundle, first, tmp_path / "first.safetensors"), bundle.parts)
    for second in DIALECTS:
        again = read_lora(
            write(read, bundle, second, tmp_path / "second.safetensors"), bundle.parts
        )
        assert again.keys() == lora.keys()
        for name, low in lora.items():
            other = again[name]
            assert isinstance(other, LowRank)
            assert torch.equal(other.down, low.down) and torch.equal(other.up, low.up)
            assert other.alpha == low.alpha


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "strength"),
    itertools.product((*DIALECTS, "diffusers of 2023"), (1.0, 0.5, -0.7)),
)
def test_diffusers_makes_the_same_of_every_dialect_it_reads(
    dialect: str, strength: float, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    ours = load_bundle("nano")
    path = write(lora, ours, dialect, tmp_path / "lora.safetensors")
    merge_lora(read_lora(path, ours.parts), ours.parts, weight=strength)
    assert_merged_alike(ours, fuse_into_nano(path, weight=strength))


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_peft_makes_the_same_of_its_names_with_other_ranks_and_alphas(
    strength: float, bundle: Bundle, tmp_path: Path
) -> None:
    """Alphas and ranks that differ by layer, written by us, merged by PEFT's own code."""
    generator = torch.Generator().manual_seed(1)
    varied = {}
    targets = ("to_q", "to_k", "conv1")
    for index, (name, module) in enumerate(bundle.parts["unet"].named_modules()):
        if name.endswith(targets):
            rank = 2 + index % 3
            weight = module.weight
            down = torch.randn((rank, *weight.shape[1:]), generator=generator) / 8
            up = torch.randn((len(weight), rank, *[1] * (weight.dim() - 2)), generator=generator)
            varied[f"unet.{name}"] = LowRank(down, up / 8, 0.5 + index % 5)
    tensors, metadata = write_lora(varied, bundle.parts, "peft")
    described = json.loads(metadata["lora_adapter_metadata"])
    config = LoraConfig(
        **{key.removeprefix("unet."): value for key, value in described.items()},
    )
    theirs = UNet2DConditionModel.from_config(bundle.parts["unet"].config)
    theirs.load_state_dict(bundle.parts["unet"].state_dict())
    inject_adapter_in_model(config, theirs)
    theirs.peft_config = {"default": config}
    state = {key.removeprefix("unet."): value for key, value in tensors.items()}
    loaded = set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    beside = LoraCache(bundle, fused=True).apply([f"{tmp_path / 'lora.safetensors'}:{strength}"])
    for name in varied:
        module = theirs.get_submodule(name.removeprefix("unet."))
        module.set_scale("default", strength)
        module.merge()
        torch.testing.assert_close(
            find_layer(beside.parts, name).weight,
            module.get_base_layer().weight,
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.fixture(scope="module")
def uneven(bundle: Bundle) -> dict[str, LowRank]:
    """Ranks and alphas that differ from layer to layer, in the UNet and both text encoders."""
    generator = torch.Generator().manual_seed(2)
    ends = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "q_proj", "out_proj", "mlp.fc1")
    changes = {}
    for part, network in bundle.parts.items():
        for index, (name, module) in enumerate(network.named_modules()):
            if name.endswith(ends):
                rank = 2 + index % 3
                down = torch.randn((rank, module.in_features), generator=generator) / 8
                up = torch.randn((module.out_features, rank), generator=generator) / 8
                changes[f"{part}.{name}"] = LowRank(down, up, 0.5 + index % 5)
    return changes


WITH_ALPHAS = tuple(name for name in DIALECTS if name != "early")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "strength"),
    [
        (*pair, strength)
        for pair, strength in zip(
            itertools.product(WITH_ALPHAS, WITH_ALPHAS), itertools.cycle((1.0, 0.5, -0.7, 1.3))
        )
    ],
)
def test_diffusers_makes_the_same_of_what_was_converted(
    first: str, second: str, strength: float, uneven: dict[str, LowRank], tmp_path: Path
) -> None:
    """From dialect to dialect by `convert`, against the sums of the factors themselves.

    By kohya's names diffusers 0.42.1 gives all layers of the UNet one alpha, whatever the file says
    of each, so in these there is only one.
    """
    ours = load_bundle("nano")
    if second != "peft":
        uneven = {name: replace(low, alpha=1.5) for name, low in uneven.items()}
    write(uneven, ours, first, tmp_path / "first.safetensors")
    second_file = tmp_path / "second.safetensors"
    convert(tmp_path / "first.safetensors", second, second_file, base="nano")
    with torch.no_grad():
        for name, low in uneven.items():
            change = low.alpha / len(low.down) * (low.up @ low.down)
            find_layer(ours.parts, name).weight += strength * change
    assert_merged_alike(ours, fuse_into_nano(second_file, weight=strength))
