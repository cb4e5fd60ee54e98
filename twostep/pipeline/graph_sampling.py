"""Sampling in ComfyUI's graphs: noise levels, and which of its nodes take which steps.

ComfyUI counts noise as sigma / alpha, and its coordinates are x / alpha. In these the steps here
are its samplers: `flow.step` is `euler`, DPM-Solver++ 2M is `dpmpp_2m`, and to renoise is to begin
again from the prediction with the noise of another seed. Its scheduler `simple` rounds times down,
the trailing grid to the nearest: where that differs, the levels are written out (ManualSigmas).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from twostep.contract import Contract, VariancePreservingSpec
from twostep.pipeline.graph_nodes import Graph, Link, output
from twostep.pipeline.request import Control, Request

MAX_CHAIN = 8
"""The most steps that are drawn by nodes of their own; longer chains nobody can read."""

_NAMES = {"euler": "euler", "dpmpp-2m": "dpmpp_2m"}
"""ComfyUI's names of the samplers that one node can walk all times with."""

_LAST_INDEX = 999
"""ComfyUI counts SDXL's times from 0."""

MOST_SCALE = 10
"""The largest number that ComfyUI's nodes take for strengths and multipliers."""


@dataclass(frozen=True)
class Walk:
    """The times of a drawing, and how they are walked.

    Args:
        times: falling whole times of SDXL, the landing 0 included.
        top: the time of pure noise.
        schedule: whose times they are.
        sampler: "euler", "dpmpp-2m" or "renoise".
        has_mask: whether known parts are put back.
    """

    times: tuple[int, ...]
    top: int
    schedule: VariancePreservingSpec
    sampler: str
    has_mask: bool

    @classmethod
    def of(cls, contract: Contract, request: Request) -> Walk | None:
        """Return the walk of a settled request; None where ComfyUI's nodes cannot take it."""
        if not isinstance(contract.schedule, VariancePreservingSpec):
            return None
        top = len(contract.schedule.trained) or contract.schedule.num_times
        times = _times(contract, contract.schedule, request, top)
        sampler = request.sampler or contract.sampler
        walk = cls(
            times=times,
            top=top,
            schedule=contract.schedule,
            # With one step there is nothing to add fresh noise to.
            sampler="euler" if times == (top, 0) else sampler,
            has_mask=request.mask is not None,
        )
        return walk if walk.is_expressible else None

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """sigma / alpha at each time."""
        # Imported here, for it loads torch, which the commonest graphs do not need.
        from twostep.diffusion import make_schedule, noise_levels

        return tuple(noise_levels(make_schedule(**asdict(self.schedule)), self.times))

    @property
    def is_expressible(self) -> bool:
        """Whether ComfyUI's nodes can walk so."""
        if self.sampler not in (*_NAMES, "renoise"):
            return False
        if not self.is_chain:
            return True
        return self.sampler != "dpmpp-2m" and self.num_steps <= MAX_CHAIN

    @property
    def is_chain(self) -> bool:
        """Whether every step needs a node of its own.

        Fresh noise does, and so does a mask from pure noise: what is kept is pure noise there too,
        where ComfyUI would leave some of the image in it.
        """
        return self.sampler == "renoise" or (self.has_mask and self.begins_at_top)

    @property
    def begins_at_top(self) -> bool:
        """Whether the first time is that of pure noise, in which no image is left."""
        return self.times[0] == self.top

    @property
    def num_steps(self) -> int:
        """Network calls."""
        return len(self.times) - 1

    @property
    def is_simple(self) -> bool:
        """Whether ComfyUI's scheduler `simple` visits these times, left out some of the first."""
        return self.simple_steps is not None

    @property
    def simple_steps(self) -> int | None:
        """The steps of `simple` whose last times these are; None if there are none."""
        if self.schedule.zero_snr:
            return None  # its largest level is another
        # Its times are multiples of one spacing where that divides the top.
        spacing = self.times[-2]
        multiples = tuple(spacing * k for k in range(self.num_steps, -1, -1))
        if self.top % spacing or self.times != multiples:
            return None
        return self.top // spacing


def _times(
    contract: Contract, spec: VariancePreservingSpec, request: Request, top: int
) -> tuple[int, ...]:
    """Return the times at which a request is drawn, the landing 0 included."""
    steps = request.steps or contract.steps
    begins_with_image = request.image is not None and request.strength is not None
    if not begins_with_image and not contract.sampling_times and top % steps == 0:
        # The commonest grid, which needs no torch to be known.
        return tuple(range(top, -1, -top // steps))

    from twostep.diffusion import make_schedule
    from twostep.models.sampling import sampling_times

    start = None
    if begins_with_image:
        assert request.strength is not None
        start = round(request.strength * top)
    schedule = make_schedule(**asdict(spec))
    times = sampling_times(contract, schedule, steps=request.steps, start=start)
    return tuple(int(t) for t in times)


@dataclass(frozen=True)
class Drawing:
    """What the nodes that sample are connected to.

    `image` are the latents of the image that is changed, and `mask` where it is drawn anew, at the
    size of latents.
    """

    model: Link
    positive: Link
    negative: Link
    image: Link | None = None
    mask: Link | None = None


def add_sampling(graph: Graph, request: Request, walk: Walk, drawing: Drawing) -> Link | None:
    """Add what draws latents; None where the first step has a scale that no node takes."""
    if walk.is_chain:
        return _add_chain(graph, request, walk, drawing)
    if drawing.image is None and walk.is_simple and walk.begins_at_top:
        return _add_ksampler(graph, request, walk, drawing)
    begun = drawing.image
    if begun is None:
        begun = _empty(graph, request)
    if drawing.mask is not None:
        begun = graph.add("SetLatentNoiseMask", samples=begun, mask=drawing.mask)
    sigmas = _all_levels(graph, walk, drawing)
    sampler = _NAMES[walk.sampler]
    return _add_custom(graph, request, drawing, begun, sigmas, sampler=sampler, seed=request.seed)


def control_range(control: Control, walk: Walk) -> tuple[float, float] | None:
    """Return between which of ComfyUI's percents a ControlNet acts; None if it never does.

    Here a step counts if it lies wholly in the control's share of the steps. There a noise level
    does, and percents are shares of the times: bounds are laid midway between two times.
    """
    count = walk.num_steps
    acting = [
        i for i in range(count) if control.start <= i / count and (i + 1) / count <= control.end
    ]
    if not acting:
        return None
    start = 0.0
    end = 1.0
    if acting[0] > 0:
        start = _percent_between(walk.times[acting[0] - 1], walk.times[acting[0]])
    if acting[-1] < count - 1:
        end = _percent_between(walk.times[acting[-1]], walk.times[acting[-1] + 1])
    return start, end


def _percent_between(before: int, after: int) -> float:
    """Return ComfyUI's percent midway between two times."""
    index = (before + after) / 2 - 1
    return 1 - index / _LAST_INDEX


def _add_ksampler(graph: Graph, request: Request, walk: Walk, drawing: Drawing) -> Link:
    """Add the one node that most graphs have."""
    return graph.add(
        "KSampler",
        model=drawing.model,
        positive=drawing.positive,
        negative=drawing.negative,
        latent_image=_empty(graph, request),
        seed=request.seed,
        steps=walk.num_steps,
        cfg=float(request.guidance or 1),
        sampler_name=_NAMES[walk.sampler],
        scheduler="simple",
        denoise=1.0,
    )


def _all_levels(graph: Graph, walk: Walk, drawing: Drawing) -> Link:
    """Add the noise levels of a whole walk."""
    if not walk.is_simple:
        return _levels(graph, walk.levels)
    steps = walk.simple_steps
    assert steps is not None
    sigmas = graph.add(
        "BasicScheduler", model=drawing.model, scheduler="simple", steps=steps, denoise=1.0
    )
    if steps == walk.num_steps:
        return sigmas
    split = graph.add("SplitSigmas", sigmas=sigmas, step=steps - walk.num_steps)
    return output(split, 1)


def _add_chain(graph: Graph, request: Request, walk: Walk, drawing: Drawing) -> Link | None:
    """Add a sampler for every step, and between them fresh noise and what is put back."""
    latents = _first(graph, request, walk, drawing)
    if latents is None:
        return None
    seed: int | None = request.seed
    if not walk.begins_at_top and drawing.image is None:
        seed = None  # scaled noise already
    for i in range(walk.num_steps):
        after = walk.levels[i + 1]
        lands = after if walk.sampler == "euler" else 0.0
        sigmas = _levels(graph, (walk.levels[i], lands))
        latents = _add_custom(graph, request, drawing, latents, sigmas, sampler="euler", seed=seed)
        fresh = _fresh_seed(request.seed, i) if walk.sampler == "renoise" else None
        if drawing.mask is None:
            seed = fresh
            continue
        seed = None
        if fresh is not None and after > 0:
            latents = _noised(graph, drawing, latents, fresh, after)
        latents = _put_back(graph, request, drawing, latents, after)
    return latents


def _first(graph: Graph, request: Request, walk: Walk, drawing: Drawing) -> Link | None:
    """Add the latents that the first sampler of a chain adds noise to."""
    if drawing.image is not None and not walk.begins_at_top:
        return drawing.image
    empty = _empty(graph, request)
    if walk.begins_at_top:
        return empty
    # Pure noise that the network takes for latents of a lower time: longer than the level's own.
    level = walk.levels[0]
    longer = math.hypot(level, 1) / level
    if longer > MOST_SCALE:
        return None
    noised = _noised(graph, drawing, empty, request.seed, level)
    return graph.add("LatentMultiply", samples=noised, multiplier=longer)


def _put_back(
    graph: Graph, request: Request, drawing: Drawing, latents: Link, level: float
) -> Link:
    """Add what puts the image back where the mask keeps it, noised to a level."""
    assert drawing.image is not None
    known = drawing.image
    if level > 0:
        known = _noised(graph, drawing, known, request.seed, level)
    return graph.add(
        "LatentCompositeMasked",
        destination=known,
        source=latents,
        x=0,
        y=0,
        resize_source=False,
        mask=drawing.mask,
    )


def _noised(graph: Graph, drawing: Drawing, latents: Link, seed: int, level: float) -> Link:
    """Add what adds the noise of a seed to latents."""
    return graph.add(
        "AddNoise",
        model=drawing.model,
        noise=graph.add("RandomNoise", noise_seed=seed),
        sigmas=_levels(graph, (level,)),
        latent_image=latents,
    )


def _add_custom(
    graph: Graph,
    request: Request,
    drawing: Drawing,
    latents: Link,
    sigmas: Link,
    *,
    sampler: str,
    seed: int | None,
) -> Link:
    """Add a sampler of given noise levels; it adds the noise of a seed, or none."""
    return graph.add(
        "SamplerCustom",
        model=drawing.model,
        positive=drawing.positive,
        negative=drawing.negative,
        sampler=graph.add("KSamplerSelect", sampler_name=sampler),
        sigmas=sigmas,
        latent_image=latents,
        add_noise=seed is not None,
        noise_seed=request.seed if seed is None else seed,
        cfg=float(request.guidance or 1),
    )


def _empty(graph: Graph, request: Request) -> Link:
    """Add latents without an image."""
    return graph.add("EmptyLatentImage", width=request.width, height=request.height, batch_size=1)


def _levels(graph: Graph, levels: Sequence[float]) -> Link:
    """Add noise levels that are written out, which ComfyUI reads without exponents."""
    return graph.add("ManualSigmas", sigmas=", ".join(_decimal(level) for level in levels))


def _decimal(value: float) -> str:
    """Return a number as ComfyUI reads it, precise to float32."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _fresh_seed(seed: int, i: int) -> int:
    """Return the seed of the noise that is added after step i."""
    from twostep.diffusion.samplers import seed_of_step

    return seed_of_step(seed, i)
