"""Other people's files: where a model lies, what a file is, and what its weights are called.

`resolve` turns whatever names a model into a `Checkpoint`, which is then passed on: the header of
every file is read once.
"""

from twostep.formats.checkpoint import Checkpoint, read_contracts, resolve
from twostep.formats.locate import ModelError

__all__ = ["Checkpoint", "ModelError", "read_contracts", "resolve"]
