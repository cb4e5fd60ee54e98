"""Samplers: how a model goes from pure noise to data; a student's contract names its own.

`euler` follows the flow and adds no noise: the sampler of progressive and adversarial distillation
(arXiv 2402.13929) and of every teacher. `renoise` predicts x0 and adds fresh noise to it at the
next time: the multistep sampler of consistency models (algorithm 1 of arXiv 2303.01469), which LCM
(arXiv 2310.04378), ADD (arXiv 2311.17042) and DMD2 (arXiv 2405.14867) use. `dpmpp-2m` and `unipc`
follow the flow with a memory of one step, for teachers: see `solvers`.
"""

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Real
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.flow import Denoise, Keep, OnStep, initial_noise, solve, walk
from twostep.diffusion.prediction import Prediction
from twostep.diffusion.schedule import Schedule
from twostep.diffusion.shapes import Batch, Time
from twostep.diffusion.solvers import dpmpp_2m, unipc
from twostep.errors import TwostepError

DrawNoise = Callable[[int], Tensor]
"""i -> fresh noise of the shape of x, for the step after the i-th network call."""


class SamplerError(TwostepError):
    """A sampler that is not known."""


@runtime_checkable
class Sampler(Protocol):
    """From x at times[0] to x at times[-1], with one network call per interval."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        times: Tensor,
        schedule: Schedule,
        draw_noise: DrawNoise,
        *,
        on_step: OnStep | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Return x at the last time; arguments as of `flow.solve`."""


def euler(
    denoise: Denoise,
    x: Batch,
    times: Real[Tensor, "points batch"],
    schedule: Schedule,
    draw_noise: DrawNoise,
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Batch:
    """Follow the flow as `flow.solve` does; no noise is drawn."""
    return solve(denoise, x, times, schedule, on_step=on_step, keep=keep)


def renoise(
    denoise: Denoise,
    x: Batch,
    times: Real[Tensor, "points batch"],
    schedule: Schedule,
    draw_noise: DrawNoise,
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Batch:
    """Predict x0 at every time and add fresh noise to it at the next one.

    Args:
        denoise: what predicts x0; its eps is not used.
        x: the items at times[0].
        times: falling times of each item, at least two.
        schedule: whose times they are.
        draw_noise: asked once per step, with its number.
        on_step: called after every network call.
        keep: applied to x after every step.

    Raises:
        FlowError: as in `flow.solve`.
    """

    def move(i: int, prediction: Prediction, s: Tensor) -> Tensor:
        return schedule.add_noise(prediction.x0, draw_noise(i), s)

    return walk(denoise, x, times, schedule, move=move, on_step=on_step, keep=keep)


def renoised_input(
    denoise: Denoise,
    noise: Batch,
    times: Sequence[Time],
    index: int,
    schedule: Schedule,
    draw_noise: DrawNoise,
) -> Batch:
    """Return what a sampler that renoises feeds the network at times[index].

    Training on it, in the place of noised data, is the backward simulation of DMD2 (section 4.5 of
    arXiv 2405.14867): the network then learns on what it will meet when it samples.

    Args:
        denoise: what predicts x0.
        noise: pure noise, which is the input at times[0].
        times: of the sampler, falling, the same for all items.
        index: of the step whose input is asked for; so many network calls are made.
        schedule: whose times they are.
        draw_noise: asked once per call, with its number.
    """
    if index == 0:
        return noise
    columns = torch.tensor(times[: index + 1])[:, None].expand(-1, len(noise))
    return renoise(denoise, noise, columns, schedule, draw_noise)


_SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "renoise": renoise,
    "dpmpp-2m": dpmpp_2m,
    "unipc": unipc,
}

SOLVERS = ("euler", "dpmpp-2m", "unipc")
"""The names of the samplers that follow the flow, among which one may choose for a teacher."""


def find_sampler(name: str) -> Sampler:
    """Return the sampler of a name; SamplerError for an unknown one."""
    if name not in _SAMPLERS:
        *known, last = _SAMPLERS
        raise SamplerError(f"sampler {name!r} is not known; expected {', '.join(known)} or {last}.")
    return _SAMPLERS[name]


def seeded_noise(seeds: Sequence[int], like: Batch) -> DrawNoise:
    """Return a source of fresh noise that depends on seeds and steps alone.

    An item gets the same noise alone, in any batch and on any device.

    Args:
        seeds: one per item, in 0..2^63 - 1.
        like: the items, whose shape, dtype and device the noise has.
    """

    def draw_noise(i: int) -> Tensor:
        noise = torch.stack([_noise_of_step(seed, i, like.shape[1:]) for seed in seeds])
        return noise.to(like.dtype).to(like.device)

    return draw_noise


def seed_of_step(seed: int, i: int) -> int:
    """Return the seed of the fresh noise after network call i of an item.

    It is hashed, so that the noise is neither the initial one nor that of a neighbouring seed.
    """
    return random.Random(f"{seed}/{i}").getrandbits(31)


def _noise_of_step(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    return initial_noise(seed_of_step(seed, i), tuple(shape))
