"""Folders of weights that other libraries fill, and that appear whole or not at all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from twostep.files import UNHARMED, WriteError, folder_atomically

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust say what the system refused."""


@contextmanager
def weights_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to be filled that takes its place at `path` once it is complete.

    As `files.folder_atomically`, also where safetensors or tokenizers cannot write. Raises
    WriteError.
    """
    with folder_atomically(path) as partial:
        try:
            yield partial
        except SafetensorError as error:
            raise WriteError(
                f"{path} cannot be written ({error}): free some space, or give another place. "
                f"{UNHARMED}"
            ) from error
        except Exception as error:
            # tokenizers raises nothing more particular than an Exception.
            number = _OS_ERROR.search(str(error))
            if type(error) is not Exception or number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code)) from error
