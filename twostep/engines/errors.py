"""What can go wrong with an engine."""

from twostep.errors import TwostepError


class EngineError(TwostepError):
    """An engine that is not known, cannot be loaded, or cannot run a model."""
