"""The probe: a network that knows the noise is found out, whichever way it says it."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from twostep.formats.locate import ModelError
from twostep.models.loading import load_bundle
from twostep.models.sampling import encode_prompts, sample_latents
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.probe import check_prediction_type, probe_prediction_type
from twostep.pretrain.model import random_bundle

TEACHER = load_bundle("nano")


class Restated(UNet2DConditionModel):
    """The nano teacher's network, answering in another prediction type."""

    def forward(self, x_t: Tensor, index: Tensor, text: Tensor, **options: object) -> tuple[Tensor]:
        (eps,) = super().forward(x_t, index, text, **options)
        alpha, sigma = TEACHER.denoiser.schedule.coefficients(index + 1, x_t)
        x0 = (x_t - sigma * eps) / alpha
        return ({"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.said_in],)


def restated(said_in: str) -> Denoiser:
    network = copy.deepcopy(TEACHER.denoiser.network)
    network.__class__, network.said_in = Restated, said_in
    return replace(TEACHER.denoiser.with_network(network), prediction_type="eps")


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Conditioning]:
    """Two pictures that the teacher draws in few steps, so that they are of the kind it knows."""
    prompts = ["a 3d red apple on a blue background", "a flat fox"]
    guided = encode_prompts(TEACHER, prompts, (64, 64), scale=3.0)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = sample_latents(TEACHER.denoiser, guided, noise, 8, [0, 1])
    return latents, guided.positive


@pytest.mark.parametrize("said_in", ["eps", "x0", "v"])
def test_it_is_found_out_whatever_the_config_says(
    said_in: str, known: tuple[Tensor, Conditioning]
) -> None:
    denoiser = restated(said_in)
    probe = probe_prediction_type(denoiser, *known)
    assert probe.prediction_type == said_in
    assert probe.is_sure
    if said_in == "eps":
        assert check_prediction_type(denoiser, *known).prediction_type == "eps"
    else:
        with pytest.raises(ModelError, match=f'prediction_type = "{said_in}"'):
            check_prediction_type(denoiser, *known)


def test_a_network_that_knows_nothing_is_not_judged(known: tuple[Tensor, Conditioning]) -> None:
    x0, _ = known
    stranger = random_bundle()
    conditioning = stranger.conditioning(["a red fox", ""], 64, 64)
    for kind in ("eps", "v"):
        assert not check_prediction_type(
            replace(stranger.denoiser, prediction_type=kind), x0, conditioning
        ).is_sure
        nothing = check_prediction_type(
            replace(stranger.denoiser, prediction_type=kind), 0.01 * x0, conditioning
        )
        assert not nothing.is_sure
