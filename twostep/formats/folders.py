"""Folders of weights that other libraries fill, and that appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from twostep.files import UNHARMED, WriteError, folder_atomically


@contextmanager
def weights_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to be filled that takes its place at `path` once it is complete.

    As `files.folder_atomically`, also where safetensors cannot write. Raises WriteError.
    """
    with folder_atomically(path) as partial:
        try:
            yield partial
        except SafetensorError as error:
            raise WriteError(
                f"{path} cannot be written ({error}): free some space, or give another place. "
                f"{UNHARMED}"
            ) from error
