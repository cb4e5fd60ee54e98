"""How long drawings take: engines beside each other and beside other programs, on this machine.

Everything that is compared takes turns in every round, so that what else the machine does falls on
all alike. What is reported are medians with quartiles, by stages where a program has them, and
ratios of the same rounds.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from twostep import __version__
from twostep.engines.openvino import graph_calls, settings
from twostep.errors import TwostepError
from twostep.export.verification import vanilla_pipeline
from twostep.models.bundle import Bundle, modules_of
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.prepare import STAGES
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.reports.genai import (
    guidance_of,
    has_genai,
    is_readable,
    open_pipeline,
    write_folder,
)
from twostep.training.cpu import num_cores

PROMPT = "a 3d red apple on a blue background"

VANILLA = "diffusers"
"""The name of diffusers' own pipeline among what is compared."""

GENAI = "OpenVINO GenAI"
"""The name of OpenVINO's own pipeline, where it is installed."""

BARE = "openvino, bare calls"
"""The name of OpenVINO's own time for the same networks, with nothing around them."""

ROOF = "arithmetic alone"
"""The name of the least time of a drawing: its sums and products at the rate of one large product
of matrices.
"""

NUM_WARM = 2
"""Rounds that are not counted."""

_SIDE = 1024
"""Of the matrices whose product says how fast a CPU computes."""

_SIDE_ELSEWHERE = 8192
"""The same of an accelerator, which a smaller product does not fill."""

Draw = Callable[[int], dict[str, float]]
"""Draws from a seed and returns the seconds of its stages; none where it has no stages."""


class SpeedError(TwostepError):
    """A comparison that cannot be made."""


@dataclass(frozen=True)
class Case:
    """What is drawn: steps, (width, height) in pixels, and pictures at once."""

    steps: int
    size: tuple[int, int]
    batch: int

    def __str__(self) -> str:
        """Return it as a person writes it."""
        width, height = self.size
        return f"{self.steps} steps, {width}x{height}, batch {self.batch}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one stage over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, float]:
        """Return median and quartiles."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high}


@dataclass(frozen=True)
class Row:
    """One program, or engine, in one case; `stages` has "total" and what of it was timed apart."""

    name: str
    case: Case
    stages: Mapping[str, Timing]

    @property
    def total(self) -> Timing:
        """Seconds of a whole drawing."""
        return self.stages["total"]

    def times_as_fast_as(self, other: Row) -> Timing:
        """Return how many times as fast this was as another, round by round."""
        pairs = zip(self.total.seconds, other.total.seconds, strict=True)
        return Timing(tuple(theirs / ours for ours, theirs in pairs))


def compare_speed(
    model: str,
    *,
    engines: Sequence[str],
    cases: Sequence[Case],
    rounds: int,
    peers: bool = True,
    device: str = "cpu",
    on_case: Callable[[Case], None] | None = None,
) -> list[Row]:
    """Time engines, and other programs, in every case.

    Args:
        model: A built-in name, a folder, a file or a hub id.
        engines: Their names.
        cases: What is drawn.
        rounds: Drawings of each that count.
        peers: Also time diffusers' own pipeline, OpenVINO GenAI's where it is installed, and
            OpenVINO's calls with nothing around them; and say what the arithmetic alone would take.
        device: As torch names it, or "auto". OpenVINO's programs run on the CPU whatever it is.
        on_case: Called before each case.

    Raises:
        SpeedError: Nothing is to be compared.
        EngineError: An engine is not there.
        RecipeError: This machine does not have the device.
    """
    if not engines or not cases or rounds < 1:
        raise SpeedError("give at least one engine, one number of steps and one round.")
    studio = Studio(device=device, max_models=len({case.steps for case in cases}))
    rows = []
    for case in cases:
        if on_case is not None:
            on_case(case)
        with tempfile.TemporaryDirectory() as folder:
            draws = _draws(studio, model, case, engines, Path(folder) if peers else None)
            rows += _timed(draws, case, rounds)
        if peers:
            rows.append(_roof(studio, model, case, rounds))
    return rows


def every_case(
    steps: Sequence[int], sizes: Sequence[tuple[int, int]], batches: Sequence[int]
) -> list[Case]:
    """Return all combinations."""
    return [Case(*values) for values in product(steps, sizes, batches)]


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Say what the figures were measured on, if need be with a device beside the processor."""
    accelerator = {}
    if device is not None and device.type == "cuda":
        accelerator = {"device": torch.cuda.get_device_name(device)}
    return {
        **accelerator,
        "processor": _processor(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "twostep": __version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as plain values."""
    return [
        {
            "name": row.name,
            "steps": row.case.steps,
            "size": list(row.case.size),
            "batch": row.case.batch,
            "rounds": len(row.total.seconds),
            "seconds": {name: timing.as_json() for name, timing in row.stages.items()},
        }
        for row in rows
    ]


def plot(rows: Sequence[Row]) -> str:
    """Return an SVG with a bar for every row: milliseconds a picture, and their quartiles."""
    longest = max(row.total.quartiles[1] / row.case.batch for row in rows)
    height = 22
    parts = []
    cases = list(dict.fromkeys(row.case for row in rows))
    y = 6
    for case in cases:
        y += height
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{case}</text>')
        for row in rows:
            if row.case != case:
                continue
            y += height
            scale = 380 / longest / case.batch
            low, high = (scale * value for value in row.total.quartiles)
            wide = scale * row.total.median
            middle = y - 5
            parts.append(f'<text x="8" y="{y}">{row.name}</text>')
            parts.append(
                f'<rect x="190" y="{y - 13}" width="{wide:.1f}" height="16" fill="#4c78a8"/>'
            )
            parts.append(
                f'<line x1="{190 + low:.1f}" y1="{middle}" x2="{190 + high:.1f}" y2="{middle}" '
                'stroke="#222" stroke-width="2"/>'
            )
            label = f"{1e3 * row.total.median / case.batch:.1f} ms"
            parts.append(f'<text x="{198 + max(wide, high):.1f}" y="{y}">{label}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 16}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _draws(
    studio: Studio, model: str, case: Case, engines: Sequence[str], peers: Path | None
) -> dict[str, Draw]:
    """Return what is compared, by name.

    Args:
        studio: Loads the model.
        model: What is drawn with.
        case: What is drawn.
        engines: Their names.
        peers: An empty folder for what other programs read; None to leave those out.
    """
    request = _request(model, case)
    bundles = {name: studio.load(replace(request, engine=name)) for name in engines}
    draws = {name: _ours(bundle, request) for name, bundle in bundles.items()}
    if peers is None:
        return draws
    drawing = studio.load(request)
    whole = _whole(drawing, model)
    draws[VANILLA] = _vanilla(whole, request)
    if drawing.denoiser.device.type == "cpu" and has_genai() and is_readable(whole):
        draws[GENAI] = _genai(whole, case, peers)
    if "openvino" in bundles:
        draws[BARE] = _bare(bundles["openvino"], request)
    return draws


def _request(model: str, case: Case) -> Request:
    """Return the drawing of a case."""
    width, height = case.size
    return Request(
        PROMPT,
        model=model,
        steps=case.steps,
        num_images=case.batch,
        width=width,
        height=height,
    )


def _ours(bundle: Bundle, request: Request) -> Draw:
    def draw(seed: int) -> dict[str, float]:
        return generate(bundle, replace(request, seed=seed)).seconds

    return draw


def _whole(drawing: Bundle, model: str) -> Bundle:
    """Return the same model with the networks of diffusers and transformers.

    What was loaded to draw with gets their weights, so that these are in memory once.
    """
    contract = drawing.contract
    whole = load_bundle(model, steps=contract.steps if contract.role == "student" else None)
    whole.to(drawing.denoiser.device, drawing.denoiser.dtype)
    pairs = [(drawing.parts[name], part) for name, part in whole.parts.items()]
    pairs += zip(modules_of(drawing.codec), modules_of(whole.codec), strict=True)
    for network, other in pairs:
        network.load_state_dict(other.state_dict(), assign=True)
    return whole


def _vanilla(bundle: Bundle, request: Request) -> Draw:
    """Return a drawing by diffusers with the same networks, and guidance only for teachers."""
    pipeline = vanilla_pipeline(bundle)
    guidance = guidance_of(bundle)

    def draw(seed: int) -> dict[str, float]:
        seeds = range(seed, seed + request.num_images)
        pipeline(
            PROMPT,
            num_inference_steps=request.steps,
            guidance_scale=guidance,
            num_images_per_prompt=request.num_images,
            generator=[torch.Generator().manual_seed(each) for each in seeds],
            width=request.width,
            height=request.height,
        )
        return {}

    return draw


def _genai(bundle: Bundle, case: Case, folder: Path) -> Draw:
    """Return a drawing by OpenVINO GenAI with the same networks, on as many threads."""
    write_folder(bundle, folder, size=case.size, batch=case.batch)
    pipeline = open_pipeline(
        folder,
        settings("f32"),
        size=case.size,
        batch=case.batch,
        guidance=guidance_of(bundle),
    )

    def draw(seed: int) -> dict[str, float]:
        pipeline(PROMPT, seed, case.steps)
        return {}

    return draw


def _bare(bundle: Bundle, request: Request) -> Draw:
    """Return the same calls of compiled networks as of one drawing, with nothing around them.

    A denoiser is called once a step, as everyone does who calls OpenVINO himself.
    """
    by_step = replace(bundle, runtime=replace(bundle.runtime, run=None))
    with graph_calls() as calls:
        # The second time, for the first compares graphs with PyTorch.
        for _ in range(2):
            calls.clear()
            generate(by_step, request)
        recorded = [call.again() for call in calls]

    def draw(seed: int) -> dict[str, float]:
        for call in recorded:
            call()
        return {}

    return draw


def _roof(studio: Studio, model: str, case: Case, rounds: int) -> Row:
    """Return what the arithmetic of a case alone takes, once its text is encoded."""
    request = _request(model, case)
    bundle = studio.load(request)
    work = count_operations(bundle, request)
    denoiser = bundle.denoiser
    least = (work / rate(denoiser.device, denoiser.dtype) for _ in range(rounds))
    return Row(ROOF, case, {"total": Timing(tuple(least))})


def count_operations(bundle: Bundle, request: Request) -> int:
    """Return the sums and products of a drawing by PyTorch, whose text is encoded before."""
    generate(bundle, request)
    with FlopCounterMode(display=False) as counter:
        generate(bundle, request)
    return int(counter.get_total_flops())


def rate(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> float:
    """Return how many sums and products a second a large product of matrices does.

    Args:
        device: Where; the CPU if not given.
        dtype: Of the matrices.
    """
    device = device or torch.device("cpu")
    if device.type == "cpu":
        return _rate(torch.ones(_SIDE, _SIDE, dtype=dtype), products=1)
    # Of random numbers, for a GPU multiplies zeros and ones at a higher clock.
    matrix = torch.randn(_SIDE_ELSEWHERE, _SIDE_ELSEWHERE, device=device, dtype=dtype)
    _rate(matrix, products=3)
    return _rate(matrix, products=10)


def _rate(matrix: Tensor, products: int) -> float:
    """Return the sums and products a second of so many products of a square matrix with itself."""
    wait_for(matrix.device)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(matrix, matrix)
    wait_for(matrix.device)
    return products * 2 * len(matrix) ** 3 / (time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timed(draws: Mapping[str, Draw], case: Case, rounds: int) -> list[Row]:
    """Let everything draw in turns; the order moves on from round to round."""
    names = list(draws)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(-NUM_WARM, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            start = time.perf_counter()
            stages = draws[name](number + NUM_WARM)
            total = time.perf_counter() - start
            if number < 0:
                continue
            for stage, taken in {**stages, "total": total}.items():
                seconds[name].setdefault(stage, []).append(taken)
    return [
        Row(
            name,
            case,
            {
                stage: Timing(tuple(seconds[name][stage]))
                for stage in (*STAGES, "total")
                if stage in seconds[name]
            },
        )
        for name in names
    ]


def _processor() -> str:
    """Return the processor's name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
