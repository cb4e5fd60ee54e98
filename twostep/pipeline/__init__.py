"""Text to image: a `Request` goes in, a `Result` comes out, and every PNG says how it was made.

`request` holds the two nouns, `generation` runs the sampler, `png` writes and reads the pictures. Nothing here
remembers anything between two calls, and nothing here knows the command line, a server or a trainer.
"""

from typing import TYPE_CHECKING

from twostep.pipeline.png import OutputError, Provenance, ProvenanceError, read_provenance, save_images
from twostep.pipeline.request import Request, RequestError, Result

if TYPE_CHECKING:
    from twostep.diffusion import initial_noise
    from twostep.pipeline.generation import GenerationError, Progress, generate

__all__ = [
    "GenerationError",
    "OutputError",
    "Progress",
    "Provenance",
    "ProvenanceError",
    "Request",
    "RequestError",
    "Result",
    "generate",
    "initial_noise",
    "read_provenance",
    "save_images",
]


def __getattr__(name: str) -> object:
    """Load what needs torch when it is first asked for: requests and pictures are read without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from twostep.pipeline import generation

    return getattr(generation, name)
