"""A bank of teacher landings: computed once, kept on disk, shared by every run that may use them.

Only the landings are kept, for everything else of a batch is drawn again from its number. They lie
in pieces of 16 examples, `landings.f32`, beside `done.u8` with a byte of 1 for every example that
is there, and `bank.json`, which says of what the landings were made. Several processes may fill one
bank at once: they write the same values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twostep.files import reporting_write_errors, write_atomically
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.digest import digest_of_tensors
from twostep.training.recipe import RecipeError

CHUNK = 16
"""Examples of one piece."""

_BYTES = 4


class Bank:
    """The landings of one teacher on one grid from the examples of one source."""

    def __init__(
        self, path: Path, made_of: Mapping[str, Any], latent_shape: tuple[int, ...]
    ) -> None:
        """Open a bank, or begin one.

        Args:
            path: its folder.
            made_of: everything on which the landings depend, as JSON values by what they are.
            latent_shape: of one item, [channels, ...].

        Raises:
            RecipeError: the folder holds landings that were made of something else.
            WriteError: it cannot be written.
        """
        self.path = path
        self.latent_shape = latent_shape
        self._item_bytes = _BYTES * math.prod(latent_shape)
        self._landings = path / "landings.f32"
        self._done = path / "done.u8"
        described = json.loads(json.dumps({**made_of, "latents": list(latent_shape)}))
        record = path / "bank.json"
        if record.exists():
            _check_same(path, _read_record(record), described)
        else:
            with write_atomically(record) as file:
                file.write(json.dumps(described, indent=2).encode() + b"\n")
        # Also of a bank that is there: whoever began it may have been killed here.
        with reporting_write_errors(path):
            self._landings.touch()
            self._done.touch()

    def read(self, chunk: int, items: slice) -> Tensor | None:
        """Return the landings of some items of a piece; None if one of them is not there yet.

        Args:
            chunk: number of the piece, from 0.
            items: which of its examples.
        """
        first, count = _span(chunk, items)
        with self._done.open("rb") as file:
            file.seek(first)
            if file.read(count) != b"\x01" * count:
                return None
        with self._landings.open("rb") as file:
            file.seek(first * self._item_bytes)
            data = file.read(count * self._item_bytes)
        values = np.frombuffer(data, dtype="<f4").reshape(count, *self.latent_shape)
        return torch.from_numpy(values.copy())

    def write(self, chunk: int, items: slice, landings: Tensor) -> None:
        """Keep landings; they count as there only once they are on the disk.

        Args:
            chunk: number of the piece, from 0.
            items: which of its examples.
            landings: one for each of them.

        Raises:
            WriteError: the disk is full, or the place cannot be written.
        """
        first, count = _span(chunk, items)
        values = landings.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
        with reporting_write_errors(self.path):
            _write_at(self._landings, first * self._item_bytes, values.tobytes())
            _write_at(self._done, first, b"\x01" * count)

    @property
    def num_done(self) -> int:
        """How many examples are there."""
        return self._done.read_bytes().count(1)


def digest_of_weights(denoiser: Denoiser) -> str:
    """Return a digest of the weights that take part in a denoiser's calls."""
    state = denoiser.network.state_dict()
    at_work = {
        # PEFT renames a layer once a LoRA stands on it, at work or not.
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if _is_at_work(name, denoiser.lora)
    }
    return digest_of_tensors(sorted(at_work.items()))


def digest_of_examples(x0: Tensor, conditioning: Conditioning) -> str:
    """Return a digest of latents and their conditioning."""
    return digest_of_tensors(
        [("x0", x0), ("text", conditioning.text), ("pooled", conditioning.pooled)]
    )


def _is_at_work(name: str, lora: str | None) -> bool:
    """Tell whether a weight takes part in a call: PEFT writes a LoRA's name into its weights'."""
    if ".lora_" not in name:
        return True
    return lora is not None and f".{lora}." in name


def _read_record(record: Path) -> dict[str, Any]:
    """Read what a bank was made of; RecipeError if that is damaged."""
    try:
        made_of = json.loads(record.read_bytes())
        if not isinstance(made_of, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{record} is damaged ({error}), so nobody knows what these landings were made of. "
            "Delete that folder; they are computed anew."
        ) from error
    return made_of


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a bank that was made of something else: RecipeError names what differs."""
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise RecipeError(
            f"the bank {path} holds landings with another {', another '.join(differing)}. "
            "Give this run a bank of its own, or delete that folder."
        )


def _span(chunk: int, items: slice) -> tuple[int, int]:
    """Return the position of the first of some items of a piece, and their number."""
    start, stop, _ = items.indices(CHUNK)
    return chunk * CHUNK + start, stop - start


def _write_at(path: Path, position: int, data: bytes) -> None:
    """Write bytes at a position, and see them onto the disk."""
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
