"""A domain adapter: fresh, trained, merged, written and read again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.formats.lora_files import merge_lora, read_lora, write_lora
from twostep.formats.lora_kinds import Difference
from twostep.formats.peft_config import LoraError
from twostep.models.motion import load_pictures, picture_unet
from twostep.networks.domain_adapter import DomainAdapter


@pytest.fixture
def picture():
    """Return nano to draw with, which a test may change."""
    return load_pictures(["nano"])[0]


def moved(adapter: DomainAdapter) -> DomainAdapter:
    """Return an adapter as if it had been trained."""
    torch.manual_seed(0)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.2)
    return adapter


@torch.no_grad()
def output(picture) -> torch.Tensor:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    conditioning = picture.conditioning(["a red fox, moving left", "a blue car"], 64, 64)
    return picture.denoiser(x, torch.tensor([900, 300]), conditioning).eps


def test_layers_are_those_that_read_captions_and_fresh_ones_change_nothing(picture) -> None:
    unet = picture_unet(picture)
    adapter = DomainAdapter.on(unet, 4)
    beside = {name for name in adapter.layers if "attn2" not in name}
    assert beside == {"add_embedding.linear_1", "add_embedding.linear_2"}
    num_attentions = sum(name.endswith("attn2.to_q") for name in adapter.layers)
    assert len(adapter.layers) == 4 * num_attentions + 2 > 20
    before = output(picture)
    with adapter.applied(unet):
        assert torch.equal(output(picture), before)


def test_on_all_layers_there_are_convolutions_too(picture) -> None:
    unet = picture_unet(picture)
    adapter = DomainAdapter.on(unet, 4, layers="all")
    assert set(adapter.layers) > set(DomainAdapter.on(unet, 4).layers)
    changes = adapter.changes()
    weight = unet.get_parameter("down_blocks.0.resnets.0.conv1.weight")
    change = changes["unet.down_blocks.0.resnets.0.conv1"]
    assert change.down.shape == (4, *weight.shape[1:])
    assert change.up.shape == (len(weight), 4, 1, 1)
    assert all(
        changes[f"unet.{name}"].fits(unet.get_submodule(name).weight) for name in adapter.layers
    )


@pytest.mark.parametrize("layers", ["captions", "all"])
def test_applied_merged_and_read_again_it_draws_the_same(picture, tmp_path: Path, layers) -> None:
    unet = picture_unet(picture)
    before = output(picture)
    adapter = moved(DomainAdapter.on(unet, 4, layers=layers))
    with adapter.applied(unet):
        applied = output(picture)
    assert torch.equal(output(picture), before)
    assert (applied - before).abs().mean() > 0.01
    tensors, metadata = write_lora(adapter.changes(), {"unet": unet}, "peft")
    save_file(tensors, tmp_path / "adapter.safetensors", metadata)
    assert all(name.startswith("unet.") for name in tensors)
    changes = read_lora(tmp_path / "adapter.safetensors", {"unet": unet})
    again = DomainAdapter.of(changes)
    with again.applied(unet):
        assert torch.allclose(output(picture), applied, atol=1e-5)
    merge_lora(changes, {"unet": unet})
    assert torch.allclose(output(picture), applied, atol=1e-4)


def test_other_loras_are_refused(picture) -> None:
    changes = DomainAdapter.on(picture_unet(picture), 4).changes()
    name = next(iter(changes))
    other = DomainAdapter.on(picture_unet(picture), 2).changes()[name]
    for wrong in ({**changes, name: other}, {name: Difference(torch.zeros(3))}, {"x.y": other}, {}):
        with pytest.raises(LoraError, match="of one rank on the UNet alone"):
            DomainAdapter.of(wrong)
