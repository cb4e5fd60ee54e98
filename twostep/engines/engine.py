"""What an engine is, and how one is found by its name.

An engine prepares a loaded model for the sizes that are to be drawn: it may compile its networks or
hand them to another runtime. The bundle that it returns is sampled like any other.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, runtime_checkable

from twostep.engines.auto import Auto
from twostep.engines.compiled import Compiled
from twostep.engines.eager import Eager
from twostep.engines.errors import EngineError
from twostep.engines.onnx import Onnx
from twostep.engines.openvino import EXACT, PRECISIONS, OpenVino
from twostep.models.bundle import Bundle


@runtime_checkable
class Engine(Protocol):
    """A way to run the networks of a model."""

    @property
    def name(self) -> str:
        """The name by which the engine is chosen."""

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle that draws the same with this engine.

        Args:
            bundle: A loaded model, where it is to run and in its final precision.
            sizes: The (width, height) in pixels that are to be drawn.
        """


_BUILT_IN: tuple[Engine, ...] = (
    Eager(),
    Auto(),
    Compiled(),
    EXACT,
    *map(OpenVino, PRECISIONS[1:]),
    Onnx(),
)

_ENGINES: dict[str, Engine] = {engine.name: engine for engine in _BUILT_IN}
"""Engines by name: those that are built in, and those that were registered."""


def register_engine(engine: Engine) -> None:
    """Make an engine known by its name; EngineError if another one has the name."""
    known = _ENGINES.get(engine.name)
    if known is not None and known is not engine:
        raise EngineError(
            f"There is an engine called {engine.name!r} already ({type(known).__name__}). "
            "Give the new one another name."
        )
    _ENGINES[engine.name] = engine


def registered_engine(name: str) -> Engine:
    """Return an engine by its built-in or registered name, and import nothing.

    Requests may come from files and from strangers, so what they say must not import code.

    Raises:
        EngineError: There is none; the message lists the names that are known.
    """
    if name not in _ENGINES:
        raise EngineError(
            f"There is no engine {name!r}. Known are {', '.join(sorted(_ENGINES))}; "
            "register one of your own with `register_engine`."
        )
    return _ENGINES[name]


def find_engine(name: str) -> Engine:
    """Return an engine by its built-in or registered name, or as "module:attribute".

    The latter imports the module: take such a name from your own code or command line only.

    Raises:
        EngineError: There is none, or it cannot be loaded.
    """
    if name in _ENGINES or ":" not in name:
        return registered_engine(name)
    module_name, _, attribute = name.partition(":")
    try:
        engine = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"The engine {name!r} cannot be loaded: {error}. "
            'Expected "module:attribute", of a module that can be imported.'
        ) from error
    if not isinstance(engine, Engine):
        raise EngineError(
            f"{name} is a {type(engine).__name__}, not an engine: an engine has a `name` and a "
            "method `prepare(bundle, sizes)`."
        )
    return engine
