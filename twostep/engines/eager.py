"""The eager engine: PyTorch runs the networks as they are."""

from collections.abc import Sequence

from twostep.models.bundle import Bundle


class Eager:
    """Runs every network as it was loaded, at any size and without preparation."""

    name = "eager"

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return the bundle itself."""
        return bundle
