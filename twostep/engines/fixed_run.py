"""All steps of a drawing as one graph: the run of a student from noise to clean latents.

A network of a few milliseconds loses as much time again between its calls: an engine's threads fall
asleep, PyTorch's wake up for a few sums, and the interpreter takes its turn. Students draw along
times that never change, so all of their steps can be traced together, which leaves one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from twostep.diffusion import Prediction
from twostep.diffusion.grid import time_tensor
from twostep.diffusion.shapes import Latents, Time
from twostep.engines.graphs import GraphedForward
from twostep.models.lora_stack import fused
from twostep.models.sampling import AllSteps, Guided, sample_latents
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

MOST_STEPS = 4
"""Of more steps no graph is made: it takes as long to trace as all of them, each by itself."""

_SAMPLERS = ("euler",)
"""Samplers that draw no noise on the way, of those that students have."""


class FixedRun(nn.Module):
    """A denoiser along fixed times, as one network.

    Args:
        denoiser: What predicts. LoRAs beside its layers are merged.
        times: Falling times, the landing included.
        sampler: How it gets from one to the next, by its name in contracts; it draws no noise.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[Time], sampler: str) -> None:
        super().__init__()
        self.network = fused(denoiser.network)
        self._denoiser = denoiser.with_network(self.network)
        self._times = tuple(times)
        self._sampler = sampler

    @property
    def config(self) -> Any:
        """How the network is built."""
        return getattr(self.network, "config", None)

    def extra_repr(self) -> str:
        """Return all that a graph of it depends on but the network: what it computes between."""
        schedule = self._denoiser.schedule
        times = time_tensor(self._times)
        alpha, sigma = schedule.coefficients(times, times.float())
        facts = {
            "sampler": self._sampler,
            "times": self._times,
            "network times": schedule.network_time(times[:-1]).tolist(),
            "alpha": alpha.flatten().tolist(),
            "sigma": sigma.flatten().tolist(),
            "prediction": self._denoiser.prediction_type,
        }
        return str(facts)

    def forward(
        self, noise: Latents, text: Tensor, pooled: Tensor, sizes: Tensor
    ) -> dict[str, Any]:
        """Return the latents at the last time, and what each step predicted.

        Args:
            noise: Latents at the first time [batch, ...].
            text: As in `Conditioning`, like the next two.
            pooled: One embedding per prompt as a whole.
            sizes: SDXL's micro-conditioning.
        """
        steps: list[Prediction] = []
        latents = sample_latents(
            self._denoiser,
            Guided(Conditioning(text, pooled, sizes)),
            noise,
            times=self._times,
            seeds=[0] * len(noise),
            sampler=self._sampler,
            on_step=lambda _, prediction: steps.append(prediction),
        )
        return {
            "latents": latents,
            "x0": [each.x0 for each in steps],
            "eps": [each.eps for each in steps],
        }


class FixedRuns:
    """Runs all steps of plain drawings by an engine's graphs.

    Args:
        denoiser: As PyTorch runs it.
        forward: Returns the forward pass of a network as the engine runs it.
    """

    def __init__(self, denoiser: Denoiser, forward: Callable[[nn.Module], GraphedForward]) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._lock = Lock()
        self._runs: dict[object, GraphedForward] = {}

    def __call__(
        self, guided: Guided, noise: Tensor, times: Sequence[Time], sampler: str
    ) -> AllSteps | None:
        """Return what the steps of one picture gave; None where they must be run one by one.

        Args:
            guided: What is to be drawn; guidance, ControlNets and known parts are not run so.
            noise: Latents at the first time.
            times: Falling times, the landing included.
            sampler: By its name in contracts.
        """
        conditioning = guided.positive
        is_plain = (
            len(noise) == 1
            and len(times) - 1 <= MOST_STEPS
            and sampler in _SAMPLERS
            and guided.negative is None
            and conditioning.known is None
            and not conditioning.hints
            and not conditioning.variants
        )
        if not is_plain:
            return None
        run = self._run(tuple(times), sampler)
        answer = run.graphed(noise, conditioning.text, conditioning.pooled, conditioning.sizes)
        if answer is None:
            return None
        pairs = zip(answer["x0"], answer["eps"], strict=True)
        return AllSteps(answer["latents"], [Prediction(x0, eps) for x0, eps in pairs])

    def _run(self, times: tuple[Time, ...], sampler: str) -> GraphedForward:
        """Return the run along some times, made when it is first asked for."""
        with self._lock:
            run = self._runs.get((times, sampler))
            if run is None:
                with torch.inference_mode(False), torch.no_grad():
                    network = FixedRun(self._denoiser, times, sampler).eval()
                run = self._runs.setdefault((times, sampler), self._forward(network))
            return run
