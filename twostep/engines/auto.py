"""The engine `auto`: the fastest of those that are installed, by a measurement on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from twostep.engines.eager import Eager
from twostep.engines.errors import EngineError
from twostep.engines.measured import measured_once
from twostep.engines.openvino import EXACT, versions
from twostep.models.bundle import Bundle
from twostep.models.runtime import say
from twostep.models.sampling import draw_noise

_CALLS = 3


class Auto:
    """Draws with PyTorch or with OpenVINO, whichever calls the denoiser faster.

    That is measured once for every kind of network, size and number of threads, and kept in the
    cache folder. On an accelerator it is PyTorch without a measurement. It never picks an engine
    that changes pictures.
    """

    name = "auto"

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return the bundle as the faster engine runs it."""
        eager = Eager().prepare(bundle, sizes)
        if bundle.denoiser.device.type != "cpu":
            return eager
        try:
            compiled = EXACT.prepare(bundle, sizes)
        except EngineError as error:
            say(f"auto draws with eager: {error}")
            return eager
        size = sizes[0]
        seconds = measured_once(
            _facts(bundle, size),
            lambda: {each.runtime.engine: _seconds(each, size) for each in (eager, compiled)},
        )
        if seconds.get(compiled.runtime.engine, 0.0) <= seconds.get(eager.runtime.engine, 0.0):
            return compiled
        return eager


def _facts(bundle: Bundle, size: tuple[int, int]) -> dict[str, object]:
    """Return what the speed of a denoiser depends on: not on the values of its weights."""
    config: Any = getattr(bundle.denoiser.network, "config", None)
    return {
        "what": "seconds of one call of the denoiser",
        "network": str(bundle.denoiser.network),
        "config": str(config),
        "size": size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _seconds(bundle: Bundle, size: tuple[int, int]) -> float:
    """Return the seconds of a call of the denoiser for one picture: the median of some."""
    x = draw_noise([0], bundle.latent_shape(*size))
    time_in = torch.tensor([bundle.denoiser.schedule.top])
    with torch.inference_mode():
        conditioning = bundle.conditioning([""], *size)
        return _median_of(lambda: bundle.denoiser(x, time_in, conditioning))


def _median_of(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after a first one that may compile."""
    call()
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
