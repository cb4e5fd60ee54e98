"""Backbones: SDXL's UNet behind the protocol, one from outside, and each call as one graph."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from twostep.diffusion import VariancePreserving, sample
from twostep.models.bundle import Bundle
from twostep.networks.adapters import LoraError, add_lora
from twostep.networks.backbone import Backbone, BackboneError, BackboneSpec, HasFeatures
from twostep.networks.conditioning import Conditioning
from twostep.networks.control import Hint, load_control
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.model import random_bundle


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="module")
def conditioning(bundle: Bundle) -> Conditioning:
    return bundle.conditioning(["a red fox", ""], 64, 64)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


class Outside(nn.Module):
    """A backbone that this package has never seen: an MLP over channels."""

    spec = BackboneSpec("outside", in_channels=4, out_channels=4)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.scale = nn.Linear(1, 4)

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.inner(x) + self.scale(time[:, None].float() / 1000)[:, :, None, None]


def test_the_unet_is_a_backbone_with_features(bundle: Bundle) -> None:
    backbone = bundle.denoiser.backbone
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, HasFeatures)
    assert backbone.spec.family == "sdxl"
    assert (backbone.spec.in_channels, backbone.spec.out_channels) == (4, 4)
    assert not backbone.spec.is_inpainting


def test_a_call_is_the_raw_output_of_the_unet(
    bundle: Bundle, conditioning: Conditioning, x: Tensor
) -> None:
    time = torch.tensor([999, 399])
    network = bundle.denoiser.network
    embedded = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
    expected = network(x, time, conditioning.text, added_cond_kwargs=embedded).sample
    assert torch.equal(bundle.denoiser.backbone(x, time, conditioning), expected)


def test_features_are_what_the_unets_own_blocks_compute(
    bundle: Bundle, conditioning: Conditioning, x: Tensor
) -> None:
    """The levels' shapes, and the mid-block's output as the whole network computes it."""
    network = bundle.denoiser.network
    seen: list[Tensor] = []
    handle = network.mid_block.register_forward_hook(lambda *given: seen.append(given[-1]))
    bundle.denoiser(x, torch.tensor([1000, 400]), conditioning)
    handle.remove()
    levels = bundle.denoiser.features(x, torch.tensor([1000, 400]), conditioning)
    assert torch.equal(levels[-1], seen[0])
    assert tuple(level.shape[1] for level in levels) == bundle.denoiser.backbone.spec.feature_widths
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 4]


def test_a_copy_of_the_encoder_gives_the_same_features_without_a_decoder(
    bundle: Bundle, conditioning: Conditioning, x: Tensor
) -> None:
    encoder = bundle.denoiser.encoder_copy()
    assert not any(key.startswith("up_blocks") for key in encoder.network.state_dict())
    t = torch.tensor([400, 0])
    pairs = zip(
        encoder.features(x, t, conditioning),
        bundle.denoiser.features(x, t, conditioning),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_hints_act_at_their_own_times(
    bundle: Bundle, conditioning: Conditioning, x: Tensor
) -> None:
    control = load_control("silhouette", bundle.denoiser.network, 4)
    hint = Hint(control, torch.ones(2, 3, 64, 64), 1.0, frozenset({1000}))
    hinted = replace(conditioning, hints=(hint,))
    late = torch.tensor([400, 400])
    early = torch.tensor([1000, 1000])
    plain = bundle.denoiser(x, late, conditioning)
    assert torch.equal(bundle.denoiser(x, late, hinted).eps, plain.eps)
    plain = bundle.denoiser(x, early, conditioning)
    assert not torch.equal(bundle.denoiser(x, early, hinted).eps, plain.eps)
    assert hinted.acting_at(400.0).hints == ()
    assert hinted.acting_at(1000.0) is hinted
    real = replace(hint, times=frozenset({0.3}))
    assert real.acts_at(torch.tensor(0.3).item())


def test_a_backbone_from_outside_is_called_copied_and_sampled(
    conditioning: Conditioning, x: Tensor
) -> None:
    torch.manual_seed(0)
    backbone = Outside()
    denoiser = Denoiser(backbone, VariancePreserving.scaled_linear(), "x0")
    t = torch.tensor([1000, 400])
    expected = denoiser(x, t, conditioning).x0
    assert torch.equal(expected, backbone(x, t - 1, conditioning))
    twin = denoiser.standalone()
    assert torch.equal(twin(x, t, conditioning).x0, expected)
    with torch.no_grad():
        twin.network.inner.bias += 1
    assert torch.equal(denoiser(x, t, conditioning).x0, expected)
    other = denoiser.with_network(copy.deepcopy(backbone))
    assert other.network is other.backbone is not backbone
    denoise = denoiser.with_guidance(conditioning, conditioning, 2.0)
    assert sample(denoise, x, 4, denoiser.schedule).isfinite().all()
    assert denoiser.device.type == "cpu"


def test_what_a_backbone_cannot_do_is_said(conditioning: Conditioning, x: Tensor) -> None:
    denoiser = Denoiser(Outside(), VariancePreserving.scaled_linear())
    denoiser.checkpoint_gradients(False)
    with pytest.raises(BackboneError, match="Outside has no gradient checkpointing"):
        denoiser.checkpoint_gradients(True)
    with pytest.raises(BackboneError, match="Outside has no method `features`"):
        denoiser.features(x, torch.tensor([1, 2]), conditioning)
    with pytest.raises(BackboneError, match="takes no LoRA, so 'style' cannot be merged"):
        replace(denoiser, lora="style").standalone()
    with pytest.raises(LoraError, match="Outside takes no LoRA"):
        add_lora(denoiser.network, "style", rank=4, targets=denoiser.backbone.spec.lora_targets)
    with pytest.raises(BackboneError, match="Loose is no nn"):
        _ = replace(denoiser, backbone=Loose()).network


class Loose:
    """A backbone that keeps its module where nobody looks."""

    spec = Outside.spec

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return x


GRAPHS = """
from dataclasses import replace
import torch
from twostep.pretrain.model import random_bundle
from twostep.networks.control import Hint, load_control

bundle = random_bundle()
backbone = bundle.denoiser.backbone
x = torch.randn(2, 4, 16, 16)
time = torch.tensor([999, 399])
plain = bundle.conditioning(["a red fox", ""], 64, 64)
control = load_control("silhouette", bundle.denoiser.network, 4)
hint = Hint(control, torch.rand(2, 3, 64, 64), 1.0, frozenset({1000}))
hinted = replace(plain, hints=(hint, replace(hint, scale=0.5)))


def call(x, time, conditioning):
    return backbone(x, time, conditioning)


def features(x, time, conditioning):
    return backbone.features(x, time, conditioning)


with torch.no_grad():
    for function in (call, features):
        for conditioning in (plain, hinted):
            torch._dynamo.reset()
            explained = torch._dynamo.explain(function)(x, time, conditioning)
            print(explained.graph_count, explained.graph_break_count)
            whole = torch.compile(function, fullgraph=True, backend="eager")
            answers = whole(x, time, conditioning), function(x, time, conditioning)
            if function is call:
                assert torch.equal(*answers)
            else:
                assert all(map(torch.equal, *answers))
"""


@pytest.mark.slow
def test_a_call_is_one_graph_with_and_without_control_nets() -> None:
    """In a process of its own, without the shape checks of tests, which no graph can hold."""
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", GRAPHS], capture_output=True, text=True, check=False, cwd=root
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["1 0"] * 4
