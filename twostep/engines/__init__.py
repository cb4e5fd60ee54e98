"""Engines: how the networks of a loaded model are run."""

from twostep.engines.engine import Engine, find_engine, register_engine, registered_engine
from twostep.engines.errors import EngineError

__all__ = ["Engine", "EngineError", "find_engine", "register_engine", "registered_engine"]
