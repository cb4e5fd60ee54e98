"""How the networks of a bundle are run, and what an engine has to tell whoever draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from twostep.diffusion.shapes import Time
    from twostep.models.sampling import AllSteps, Guided


@runtime_checkable
class RunsAllSteps(Protocol):
    """What runs all steps of a drawing together, where it can."""

    def __call__(
        self, guided: Guided, noise: Tensor, times: Sequence[Time], sampler: str
    ) -> AllSteps | None:
        """Return what came of the steps; None where they must be run one by one.

        Args:
            guided: What is to be drawn and avoided.
            noise: Latents at the first time.
            times: Falling times, the landing included.
            sampler: By its name in contracts.
        """


def _as_it_is(network: Any) -> Any:
    return network


@dataclass(frozen=True, eq=False)
class Runtime:
    """What runs the networks of a bundle.

    Args:
        engine: The name of the engine.
        convert: Returns another network, a ControlNet for example, as the engine runs it.
        run: Runs all steps of a drawing that begins at pure noise, if the engine can do that.
    """

    engine: str = "eager"
    convert: Callable[[Any], Any] = _as_it_is
    run: RunsAllSteps | None = None


class _Notes(local):
    """What was said in a thread and is not taken yet, each sentence once."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}


_notes = _Notes()


def say(text: str) -> None:
    """Note a sentence for whoever draws in this thread: it becomes a warning of the next result."""
    _notes.texts[text] = None


def take_notes() -> list[str]:
    """Return what was said in this thread since the last time, in order."""
    texts = list(_notes.texts)
    _notes.texts.clear()
    return texts
