"""The one error type of the package, at the very bottom so that every room may build on it.

Each room defines its own subclasses beside the code that raises them. A message says what was
given, what was expected, and what to do; it knows nothing of how it will be shown.
"""


class TwostepError(Exception):
    """Something the caller can put right: a wrong value, file, folder or recipe."""


def reason_of(error: BaseException) -> str:
    """Return what an error says; of the system's, its words without number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
