"""All steps of a drawing as one graph: the run of a student from noise to clean latents.

A network of a few milliseconds loses as much time again between its calls: an engine's threads fall
asleep, PyTorch's wake up for a few sums, and the interpreter takes its turn. Students draw along
times that never change, so all of their steps can be traced together, which leaves one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from twostep.diffusion import Prediction, prediction_from_output
from twostep.diffusion.grid import time_tensor
from twostep.diffusion.shapes import Latents, Time
from twostep.models.lora_stack import fused
from twostep.models.sampling import AllSteps, Guided
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

MOST_STEPS = 4
"""Of more steps no graph is made: it takes as long to trace as all of them, each by itself."""


class FixedRun(nn.Module):
    """A denoiser along fixed times, as one network that Euler's steps are part of.

    What depends on times alone is computed once and lies beside the weights: within a graph nothing
    is looked up or moved to a device.

    Args:
        denoiser: What predicts. LoRAs beside its layers are merged.
        times: Falling times, the landing included.
    """

    network_times: Tensor
    alphas: Tensor
    sigmas: Tensor

    def __init__(self, denoiser: Denoiser, times: Sequence[Time]) -> None:
        super().__init__()
        self.network = fused(denoiser.network)
        self._denoiser = denoiser.with_network(self.network)
        schedule = denoiser.schedule
        all_times = time_tensor(times)
        item = torch.zeros(len(times), *[1] * denoiser.backbone.spec.latent_ndim)
        alphas, sigmas = schedule.coefficients(all_times, item)
        tables = {
            "network_times": schedule.network_time(all_times[:-1]),
            "alphas": alphas,
            "sigmas": sigmas,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(denoiser.device))

    @property
    def config(self) -> Any:
        """How the network is built."""
        return getattr(self.network, "config", None)

    def extra_repr(self) -> str:
        """Return what a graph of it depends on beside weights and tables."""
        return f"prediction={self._denoiser.prediction_type}"

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
        conditioning = Conditioning(text, pooled, sizes)
        steps: list[Prediction] = []
        x = noise
        for i in range(len(self.network_times)):
            time = self.network_times[i : i + 1].expand(len(noise))
            output = self._denoiser.backbone(x, time, conditioning)
            prediction = prediction_from_output(
                output.to(x.dtype),
                x,
                self.alphas[i : i + 1],
                self.sigmas[i : i + 1],
                self._denoiser.prediction_type,
            )
            alpha, sigma = self.alphas[i + 1 : i + 2], self.sigmas[i + 1 : i + 2]
            x = alpha * prediction.x0 + sigma * prediction.eps
            steps.append(prediction)
        return {
            "latents": x,
            "x0": [each.x0 for each in steps],
            "eps": [each.eps for each in steps],
        }


@runtime_checkable
class HasGraphs(Protocol):
    """A forward pass that is run from graphs: `GraphedForward`, or `CapturedForward`."""

    def graphed(self, *args: Any) -> Any:
        """Return what the network would; None where there can be no graph."""


class FixedRuns:
    """Runs all steps of plain drawings by an engine's graphs.

    Args:
        denoiser: As PyTorch runs it.
        forward: Returns the forward pass of a network as the engine runs it.
    """

    def __init__(self, denoiser: Denoiser, forward: Callable[[nn.Module], HasGraphs]) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._lock = Lock()
        self._runs: dict[tuple[Time, ...], HasGraphs] = {}

    def __call__(
        self, guided: Guided, noise: Tensor, times: Sequence[Time], sampler: str
    ) -> AllSteps | None:
        """Return what the steps of one picture gave; None where they must be run one by one.

        Args:
            guided: What is to be drawn; guidance, ControlNets and known parts are not run so.
            noise: Latents at the first time.
            times: Falling times, the landing included.
            sampler: By its name in contracts; only `euler` is run so, which draws no noise.
        """
        conditioning = guided.positive
        is_plain = (
            len(noise) == 1
            and len(times) - 1 <= MOST_STEPS
            and sampler == "euler"
            and guided.negative is None
            and conditioning.known is None
            and not conditioning.hints
            and not conditioning.variants
        )
        if not is_plain:
            return None
        run = self._run(tuple(times))
        answer = run.graphed(noise, conditioning.text, conditioning.pooled, conditioning.sizes)
        if answer is None:
            return None
        pairs = zip(answer["x0"], answer["eps"], strict=True)
        return AllSteps(answer["latents"], [Prediction(x0, eps) for x0, eps in pairs])

    def _run(self, times: tuple[Time, ...]) -> HasGraphs:
        """Return the run along some times, made when it is first asked for."""
        with self._lock:
            if times not in self._runs:
                with torch.inference_mode(False), torch.no_grad():
                    network = FixedRun(self._denoiser, times).eval()
                self._runs[times] = self._forward(network)
            return self._runs[times]
