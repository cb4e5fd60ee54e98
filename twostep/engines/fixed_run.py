"""All of a drawing but its text as one graph: the run of a student from noise to a picture.

A network of a few milliseconds loses as much time again between its calls: an engine's threads fall
asleep, PyTorch's wake up for a few sums, and the interpreter takes its turn. Students draw along
times that never change, so all of their steps can be traced together, and the decoder behind them,
which leaves one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from twostep.diffusion import prediction_from_output
from twostep.diffusion.grid import time_table
from twostep.diffusion.shapes import Latents, Time
from twostep.media.codec import FULL, Codec
from twostep.media.image import ImageCodec
from twostep.models.lora_stack import fused
from twostep.models.sampling import AllSteps, Guided
from twostep.models.shortage import if_it_fits
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

MOST_STEPS = 4
"""Of more steps no graph is made: it takes as long to trace as all of them, each by itself."""


class FixedRun(nn.Module):
    """A denoiser for so many steps, as one network that Euler's steps and a decoder are part of.

    Times are given to it as a table, and not built in: a graph computes the same with one step as
    with several, to the last bit, for none of it has the numbers of a certain time to simplify by.

    Args:
        denoiser: What predicts. LoRAs beside its layers are merged.
        num_steps: How many steps it takes.
        codec: Decodes the latents at the last time; None leaves them as they are.
    """

    def __init__(self, denoiser: Denoiser, num_steps: int, codec: ImageCodec | None = None) -> None:
        super().__init__()
        self.network = fused(denoiser.network)
        # So that its weights are among those of this network.
        self.decoder = None if codec is None else Decoder(codec)
        self._denoiser = denoiser.with_network(self.network)
        self._num_steps = num_steps

    @property
    def config(self) -> Any:
        """How the network is built."""
        return getattr(self.network, "config", None)

    def extra_repr(self) -> str:
        """Return what a graph of it depends on beside weights."""
        return f"steps={self._num_steps}, prediction={self._denoiser.prediction_type}"

    def forward(
        self, noise: Latents, text: Tensor, pooled: Tensor, sizes: Tensor, table: Tensor
    ) -> dict[str, Tensor]:
        """Return the latents at the last time, and their pictures.

        What each step predicts is not returned: where a graph gives out what lies between two sums,
        these are fused in other ways, and its last bits are others than those of one step.

        Args:
            noise: Latents at the first time [batch, ...].
            text: As in `Conditioning`, like the next two.
            pooled: One embedding per prompt as a whole.
            sizes: SDXL's micro-conditioning.
            table: Of all times, the landing included, as `time_table` returns it.
        """
        conditioning = Conditioning(text, pooled, sizes)
        ones = [1] * (noise.ndim - 1)
        x = noise
        for i in range(self._num_steps):
            time = table[0, i : i + 1].expand(len(noise))
            output = self._denoiser.backbone(x, time, conditioning)
            prediction = prediction_from_output(
                output.to(x.dtype),
                x,
                table[1, i].view(1, *ones),
                table[2, i].view(1, *ones),
                self._denoiser.prediction_type,
            )
            alpha, sigma = table[1, i + 1].view(1, *ones), table[2, i + 1].view(1, *ones)
            x = alpha * prediction.x0 + sigma * prediction.eps
        answer = {"latents": x}
        if self.decoder is not None:
            answer["pictures"] = self.decoder(x)
        return answer


class Decoder(nn.Module):
    """What makes pictures of latents, as one network.

    Args:
        codec: Whose it is.
    """

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self._codec = codec
        # So that its weights are among those of this network.
        self.network = _decoder(codec)

    @property
    def config(self) -> Any:
        """How the network is built."""
        return getattr(self.network, "config", None)

    def extra_repr(self) -> str:
        """Return what a graph of it depends on beside weights."""
        return f"scaling={self._codec.scaling_numbers}"

    def forward(self, latents: Latents) -> Tensor:
        """Return pictures in -1..1."""
        return self._codec.decode_in_one_go(latents)


def _decoder(codec: ImageCodec) -> nn.Module:
    """Return the network by which a codec decodes."""
    if codec.decoder == FULL:
        network: nn.Module = codec.vae
        return network
    assert codec.tiny is not None, "a codec decodes by its tiny decoder only if it has one"
    return codec.tiny.network


@runtime_checkable
class HasGraphs(Protocol):
    """A forward pass that is run from graphs: `GraphedForward`, or `CapturedForward`."""

    def graphed(self, *args: Any) -> Any:
        """Return what the network would; None where there can be no graph."""


class FixedRuns:
    """Runs all steps of plain drawings by an engine's graphs.

    Args:
        denoiser: As PyTorch runs it.
        codec: As PyTorch runs it. One of pictures decodes within the graphs, if the memory for that
            is there.
        forward: Returns the forward pass of a network as the engine runs it.
    """

    def __init__(
        self, denoiser: Denoiser, codec: Codec, forward: Callable[[nn.Module], HasGraphs]
    ) -> None:
        self._denoiser = denoiser
        self._codec = codec if isinstance(codec, ImageCodec) else None
        self._forward = forward
        self._lock = Lock()
        self._runs: dict[tuple[int, bool], HasGraphs] = {}
        self._tables: dict[tuple[Time, ...], Tensor] = {}

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
        texts = (conditioning.text, conditioning.pooled, conditioning.sizes)
        answer = self._answer(len(times) - 1, (noise, *texts, self._table(tuple(times))))
        return None if answer is None else AllSteps(answer["latents"], answer.get("pictures"))

    def in_pieces(
        self, conditioning: Conditioning, noise: Tensor, times: Sequence[Time]
    ) -> tuple[Tensor, Tensor] | None:
        """Return latents and pictures by a graph of one step and one of the decoder.

        Two small graphs are opened sooner than one large one. None where there can be none.

        Args:
            conditioning: What is to be drawn.
            noise: Latents at the first time.
            times: Falling times, the landing included.
        """
        if self._codec is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            decode = self._forward(Decoder(self._codec).eval())
        step = self._run(1, None)
        table = self._table(tuple(times))
        x = noise
        for i in range(len(times) - 1):
            part = table[:, i : i + 2].contiguous()
            answer = step.graphed(
                x, conditioning.text, conditioning.pooled, conditioning.sizes, part
            )
            if answer is None:
                return None
            x = answer["latents"]
        pictures = decode.graphed(x)
        return None if pictures is None else (x, pictures)

    def _answer(self, num_steps: int, inputs: Sequence[Tensor]) -> Any:
        """Return what the graph of so many steps gives; None where there can be none."""
        codec = self._codec
        if codec is not None:
            # In a tuple, for None also says that there is no graph.
            tried = if_it_fits(lambda: (self._run(num_steps, codec).graphed(*inputs),))
            if tried is not None:
                return tried[0]
            # A picture by itself can be decoded in tiles.
            with self._lock:
                self._codec = None
                self._runs = {key: run for key, run in self._runs.items() if not key[1]}
        return self._run(num_steps, None).graphed(*inputs)

    def _run(self, num_steps: int, codec: ImageCodec | None) -> HasGraphs:
        """Return the run of so many steps, made when it is first asked for."""
        key = (num_steps, codec is not None)
        with self._lock:
            if key not in self._runs:
                with torch.inference_mode(False), torch.no_grad():
                    network = FixedRun(self._denoiser, num_steps, codec).eval()
                self._runs[key] = self._forward(network)
            return self._runs[key]

    def _table(self, times: tuple[Time, ...]) -> Tensor:
        """Return the table of some times on the denoiser's device."""
        with self._lock:
            if times not in self._tables:
                table = time_table(times, self._denoiser.schedule)
                self._tables[times] = table.to(self._denoiser.device)
            return self._tables[times]
