"""Shapes in signatures are checked in every test, and one worker uses one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook(["twostep", "examples.nano"], "beartype.beartype")
