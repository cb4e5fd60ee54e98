"""Two-step text-to-image: progressive adversarial diffusion distillation (arXiv 2402.13929), open
from data to picture.

The names below are the public ones. They are loaded when first touched, so that `import twostep`
stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from twostep.errors import TwostepError

if TYPE_CHECKING:
    from twostep.contract import Contract
    from twostep.diffusion.flow import solve
    from twostep.diffusion.prediction import Prediction
    from twostep.diffusion.schedule import VariancePreserving
    from twostep.models.bundle import Bundle
    from twostep.models.loading import load_bundle as load
    from twostep.pipeline.generation import generate
    from twostep.pipeline.request import Request, Result
    from twostep.pipeline.studio import Studio
    from twostep.serve.client import Client

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Client",
    "Contract",
    "Prediction",
    "Request",
    "Result",
    "Studio",
    "TwostepError",
    "VariancePreserving",
    "__version__",
    "generate",
    "load",
    "solve",
]

_HOMES = {
    "Bundle": ("twostep.models.bundle", "Bundle"),
    "Client": ("twostep.serve.client", "Client"),
    "Contract": ("twostep.contract", "Contract"),
    "VariancePreserving": ("twostep.diffusion.schedule", "VariancePreserving"),
    "Prediction": ("twostep.diffusion.prediction", "Prediction"),
    "Request": ("twostep.pipeline.request", "Request"),
    "Result": ("twostep.pipeline.request", "Result"),
    "Studio": ("twostep.pipeline.studio", "Studio"),
    "generate": ("twostep.pipeline.generation", "generate"),
    "load": ("twostep.models.loading", "load_bundle"),
    "solve": ("twostep.diffusion.flow", "solve"),
}


def __getattr__(name: str) -> object:
    """Load a public name from its room when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'twostep' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
