"""The cache that training draws from: latents and text embeddings in shards, made once.

A folder holds `cache.json` (what made it), `empty.safetensors` (the empty prompt) and shards of at
most 256 items of one size. A shard is whole or not there and knows the names of its items, so the
same command goes on where a killed one stopped. What could not be used is in `skipped.jsonl` with
its reason.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from twostep.data.sources import DataError
from twostep.files import write_atomically
from twostep.models.bundle import Bundle, modules_of
from twostep.networks.conditioning import Conditioning

SHARD_ITEMS = 256
"""Items of a full shard."""

METADATA_KEY = "twostep.cache"
"""Where a shard keeps the names of its items."""

KEYS = ("latents", "text", "pooled", "sizes")
"""The tensors of an item: latents, both text embeddings, and SDXL's micro-conditioning."""

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096
"""What of a shard's values its fingerprint is made of: all of them would take minutes to read."""

OnItem = Callable[[int, int], None]
"""Called with the number of items that are done, and how many of them were skipped."""


class CacheWriter:
    """Collects items by size, writes them in shards, and knows what the folder holds already.

    Attributes:
        folder: of the cache.
        on_item: called after every item with how many are done, and how many of them skipped.
        known: names of all items that need not be looked at again, cached or skipped.
        skipped: name -> reason of items that cannot be used.
        num_cached: items that are cached, or wait for their shard to be full.
        num_shards: shards in the folder.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, made_by: dict[str, Any], on_item: OnItem
    ) -> None:
        """Open or begin a cache.

        Args:
            bundle: whose autoencoder and text encoders make the items.
            folder: of the cache.
            made_by: settings that all items must share; `sizes` among them.
            on_item: called after every item.

        Raises:
            DataError: something else made the folder.
        """
        self.folder = folder
        self.on_item = on_item
        made_by = {"format": 1, **made_by, **fingerprints(bundle)}
        record = folder / "cache.json"
        if record.is_file():
            _compare(json.loads(record.read_text()), made_by, folder)
        else:
            with torch.no_grad():
                empty = bundle.conditioning([""], *made_by["sizes"][0])
            with write_atomically(folder / "empty.safetensors") as file:
                file.write(save({"text": empty.text.half(), "pooled": empty.pooled.half()}))
            with write_atomically(record) as file:
                file.write(json.dumps(made_by, indent=2).encode())
        shards = [read_shard(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        self.num_shards = len(shards)
        self.skipped = dict(_read_skipped(folder))
        self.num_cached = sum(map(len, shards))
        self.known = {name for shard in shards for name in shard.names} | set(self.skipped)
        self._waiting: dict[tuple[int, int], list[tuple[str, dict[str, Tensor]]]] = {}

    def add(
        self, names: Sequence[str], latents: Float[Tensor, "n c h w"], conditioning: Conditioning
    ) -> None:
        """Cache items of one size; those whose values are not finite are skipped by name."""
        waiting = self._waiting.setdefault((latents.shape[3], latents.shape[2]), [])
        for i, name in enumerate(names):
            item = {
                "latents": latents[i].half(),
                "text": conditioning.text[i].half(),
                "pooled": conditioning.pooled[i].half(),
                "sizes": conditioning.sizes[i].float(),
            }
            if not _is_finite(item):
                self.skip(
                    name, "its latents or embeddings hold values that are no numbers in 16 bits"
                )
                continue
            waiting.append((name, item))
            self.num_cached += 1
            self.on_item(self.num_cached + len(self.skipped), len(self.skipped))
            if len(waiting) == SHARD_ITEMS:
                self._write(waiting)

    def skip(self, name: str, reason: str) -> None:
        """Record that an item cannot be used, and why."""
        self.skipped[name] = reason
        with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "reason": reason}) + "\n")
        self.on_item(self.num_cached + len(self.skipped), len(self.skipped))

    def close(self) -> CacheWriter:
        """Write the last shards and return self; DataError if not a single item could be used."""
        for waiting in self._waiting.values():
            if waiting:
                self._write(waiting)
        if self.num_cached == 0:
            first = next(iter(self.skipped.items()), ("nothing", "the source is empty"))
            raise DataError(
                f"Nothing could be cached: {len(self.skipped)} items were skipped, "
                f"{first[0]} because {first[1]}. All are named in "
                f"{self.folder / 'skipped.jsonl'}; delete the folder to begin anew."
            )
        return self

    def _write(self, waiting: list[tuple[str, dict[str, Tensor]]]) -> None:
        """Write a shard under the first number that is free, and forget its items."""
        items = [item for _, item in waiting]
        tensors = {}
        for key in KEYS:
            tensors[key] = torch.stack([item[key] for item in items])
        names = json.dumps([name for name, _ in waiting])
        paths = (self.folder / f"shard-{number:05d}.safetensors" for number in count())
        with write_atomically(next(path for path in paths if not path.exists())) as file:
            file.write(save(tensors, {METADATA_KEY: names}))
        self.num_shards += 1
        waiting.clear()


@dataclass(frozen=True, eq=False)
class Shard(Dataset[dict[str, Tensor]]):
    """One file of items that are all of one size.

    Attributes:
        path: of the file.
        names: of the items, in order.
        size: (width, height) of the latents.
    """

    path: Path
    names: tuple[str, ...]
    size: tuple[int, int]

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, "pt")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.names)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Read one item; DataError if its values are not finite."""
        item = {key: self._file.get_slice(key)[row] for key in KEYS}
        if not _is_finite(item):
            raise DataError(
                f"{self.path} holds values that are no numbers for {self.names[row]}. "
                "Delete that shard and run `twostep cache` again; it makes what is missing."
            )
        return item


@dataclass(frozen=True, eq=False)
class CachedSource:
    """What the trainer draws from.

    A batch is of one size; sizes come up as often as they are in the cache.

    Attributes:
        shards: (width, height) of latents -> the items of that size.
        empty_text: text embedding of the empty prompt.
        empty_pooled: its pooled embedding.
    """

    shards: dict[tuple[int, int], ConcatDataset[dict[str, Tensor]]]
    empty_text: Float[Tensor, "1 tokens width"]
    empty_pooled: Float[Tensor, "1 pooled"]

    def __len__(self) -> int:
        """Return the number of items."""
        return sum(map(len, self.shards.values()))

    def fingerprint(self) -> str:
        """Return 16 hex digits that depend on the names of all items, their order, and samples of
        their values.
        """
        digest = hashlib.sha256()
        for _, group in sorted(self.shards.items()):
            for shard in group.datasets:
                assert isinstance(shard, Shard)
                digest.update(_sampled_bytes(shard.path))
        return digest.hexdigest()[:16]

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random items of one random size; DataError names one whose values are not finite.

        Args:
            count: number of items.
            tensors: draws the size and the items.
            words: not needed; other sources write captions with it.
        """
        groups = list(self.shards.values())
        counts = [len(group) for group in groups]
        chosen = int(
            torch.multinomial(torch.tensor(counts, dtype=torch.float64), 1, generator=tensors)
        )
        rows = torch.randint(counts[chosen], (count,), generator=tensors).tolist()
        items = [groups[chosen][row] for row in rows]

        def column(key: str) -> Tensor:
            return torch.stack([item[key].float() for item in items])

        latents, text, pooled, sizes = map(column, KEYS)
        return latents, Conditioning(text, pooled, sizes)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the empty prompt for as many items, with the same sizes."""
        count = len(like)
        return Conditioning(
            self.empty_text.expand(count, -1, -1), self.empty_pooled.expand(count, -1), like.sizes
        )


def load_cache(folder: Path, bundle: Bundle) -> CachedSource:
    """Open a cache for training this model.

    Raises DataError if it is damaged, or another autoencoder or other text encoders made it.
    """
    record = folder / "cache.json"
    if not record.is_file():
        raise DataError(
            f"{folder} is no cache: it has no cache.json. Make one with `twostep cache`."
        )
    _compare(json.loads(record.read_text()), {"format": 1, **fingerprints(bundle)}, folder)
    shards: dict[tuple[int, int], list[Shard]] = {}
    for shard in map(read_shard, sorted(folder.glob("shard-*.safetensors"))):
        shards.setdefault(shard.size, []).append(shard)
    if not shards:
        raise DataError(
            f"{folder} holds no shards yet. Run `twostep cache` again; it goes on where it stopped."
        )
    with safe_open(folder / "empty.safetensors", "pt") as file:
        text = file.get_tensor("text").float()
        pooled = file.get_tensor("pooled").float()
    groups: dict[tuple[int, int], ConcatDataset[dict[str, Tensor]]] = {
        size: ConcatDataset(alike) for size, alike in shards.items()
    }
    return CachedSource(groups, text, pooled)


def fingerprints(bundle: Bundle) -> dict[str, str]:
    """Return what tells one autoencoder, and one pair of text encoders, from any other."""
    return {
        "autoencoder": fingerprint_of(modules_of(bundle.codec)),
        "text_encoders": fingerprint_of(bundle.text.networks.values()),
    }


def fingerprint_of(networks: Iterable[nn.Module]) -> str:
    """Return 16 hex digits that depend on every weight, in half precision."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled_bytes(path: Path) -> bytes:
    """Return the size of a shard, its header with the names, and some bytes of its tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        samples = []
        for i in range(_NUM_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            samples.append(file.read(_SAMPLE_BYTES))
    return b"".join([size.to_bytes(8, "little"), header, *samples])


def _is_finite(item: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in item.values())


def _compare(recorded: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Raise DataError where the record of a cache differs from what is expected."""
    for key, value in expected.items():
        if recorded.get(key) != value:
            raise DataError(
                f"{folder} was made with other {key.replace('_', ' ')} "
                f"({recorded.get(key)}, not {value}). "
                "Make a cache of its own for this model and these settings."
            )


def read_shard(path: Path) -> Shard:
    """Read what a shard holds, without its values; DataError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            names = tuple(json.loads((file.metadata() or {})[METADATA_KEY]))
            height, width = file.get_slice("latents").get_shape()[2:]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}). Delete it and run `twostep cache` again."
        ) from error
    return Shard(path, names, (width, height))


def _read_skipped(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and reason of the items that were skipped."""
    path = folder / "skipped.jsonl"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a killed run; its item is looked at again
        yield values["name"], values["reason"]
