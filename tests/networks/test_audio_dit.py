"""The transformer over time."""

import pytest
import torch

from twostep.networks.audio_dit import AudioDit, AudioDitConfig, waves
from twostep.networks.backbone import Backbone, HasFeatures, checkpoint_gradients
from twostep.networks.conditioning import Conditioning

CONFIG = AudioDitConfig(channels=6, prompt_width=5, width=32, depth=3, heads=2)


def stirred() -> AudioDit:
    """A network none of whose weights is zero."""
    torch.manual_seed(0)
    network = AudioDit(CONFIG)
    for weight in network.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return network


def inputs(count: int = 2, length: int = 8) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, length, generator=generator)
    pooled = torch.randn(count, 5, generator=generator)
    time = 1000 * torch.rand(count, generator=generator)
    return x, time, Conditioning(torch.zeros(count, 1, 0), pooled, torch.zeros(count, 6))


def test_it_is_a_backbone_and_begins_at_zero() -> None:
    network = AudioDit(CONFIG)
    assert isinstance(network, Backbone) and isinstance(network, HasFeatures)
    assert network.spec.latent_ndim == 2 and network.spec.pooled_width == 5
    assert float(network(*inputs()).abs().max()) == 0


def test_items_do_not_depend_on_each_other_and_all_inputs_count() -> None:
    network = stirred()
    x, time, conditioning = inputs()
    both = network(x, time, conditioning)
    alone = network(x[1:], time[1:], conditioning[slice(1, 2)])
    assert torch.allclose(both[1:], alone, atol=1e-5)
    reversed_prompts = conditioning[torch.tensor([1, 0])]
    for changed in (
        network(x, time / 2, conditioning),
        network(x, time, reversed_prompts),
        network(x.flip(2), time, conditioning).flip(2),  # positions are told apart
    ):
        assert float((changed - both).abs().mean()) > 1e-3


@pytest.mark.parametrize("length", [1, 7, 8])
def test_features_lay_neighbours_above_each_other(length: int) -> None:
    network = stirred()
    x, time, conditioning = inputs(length=length)
    levels = network.features(x, time, conditioning)
    assert [level.shape[1] for level in levels] == list(network.spec.feature_widths)
    assert {tuple(level.shape[2:]) for level in levels} == {(2, (length + 1) // 2)}
    tokens, condition = network._begin(x, time, conditioning)
    hidden = network.blocks[0](tokens, network._modulation(condition))
    for place in range(length):
        assert torch.equal(levels[0][:, :, place % 2, place // 2], hidden[:, place])


def test_gradients_are_the_same_when_blocks_are_computed_again() -> None:
    network = stirred()
    x, time, conditioning = inputs()

    def gradient() -> torch.Tensor:
        network.zero_grad()
        network(x, time, conditioning).square().sum().backward()
        return network.enter.weight.grad.clone()

    kept = gradient()
    checkpoint_gradients(network, True)
    assert torch.allclose(gradient(), kept, rtol=1e-5)
    checkpoint_gradients(network, False)
    assert torch.equal(gradient(), kept)


def test_waves_are_cosines_and_sines() -> None:
    told = waves(torch.tensor([0.0, 2.0]), 4)
    assert told[0].tolist() == [1, 1, 0, 0]
    expected = torch.tensor([2.0, 2.0 / 100]).cos()
    assert torch.allclose(told[1, :2], expected)
