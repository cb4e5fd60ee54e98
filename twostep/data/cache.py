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
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from twostep.data.sources import DataError
from twostep.files import reporting_write_errors, write_atomically
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


@dataclass(frozen=True)
class Item:
    """What tells an item of a cache from others.

    Attributes:
        name: in the cache.
        fingerprint: of what it was made from.
        weight: how often it is drawn in training, beside 1 for others.
    """

    name: str
    fingerprint: str
    weight: float = 1.0


class CacheWriter:
    """Collects items by size, writes them in shards, and makes the folder what its sources are.

    Attributes:
        folder: of the cache.
        on_item: called after every item with how many are done, and how many of them skipped.
        skipped: name -> reason of items that cannot be used.
        num_cached: items that are cached, or wait for their shard to be full.
        num_changed: items that were made anew because what they are made from had changed.
        num_dropped: items that were dropped because their sources have them no more.
        num_of_before: items of an older version, of which it is not known what they were made from.
        num_shards: shards in the folder.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        made_by: dict[str, Any],
        on_item: OnItem,
        *,
        redo: bool = False,
        keep_others: bool = False,
    ) -> None:
        """Open or begin a cache.

        Args:
            bundle: whose autoencoder and text encoders make the items.
            folder: of the cache.
            made_by: settings that all items must share; `sizes` among them.
            on_item: called after every item.
            redo: whether to delete what is there, and begin anew.
            keep_others: whether items stay that are not seen this time.

        Raises:
            DataError: something else made the folder.
        """
        self.folder = folder
        self.on_item = on_item
        self.keep_others = keep_others
        made_by = {"format": 1, **made_by, **fingerprints(bundle)}
        record = folder / "cache.json"
        if redo:
            for path in (*_shard_paths(folder), record, folder / "skipped.jsonl"):
                path.unlink(missing_ok=True)
        if record.is_file():
            _compare(_read_record(record), made_by, folder)
        else:
            with torch.no_grad():
                empty = bundle.conditioning([""], *made_by["sizes"][0])
            with write_atomically(folder / "empty.safetensors") as file:
                tensors = {"text": empty.text.half().cpu(), "pooled": empty.pooled.half().cpu()}
                file.write(save(tensors))
            with write_atomically(record) as file:
                file.write(json.dumps(made_by, indent=2).encode())
        shards = [read_shard(path) for path in _shard_paths(folder)]
        self.num_shards = len(shards)
        self.skipped: dict[str, str] = {}
        self.num_cached = 0
        self.num_changed = 0
        self.num_dropped = 0
        self.num_of_before = 0
        self._known: dict[str, str | None] = {}
        for shard in shards:
            self._known |= dict(zip(shard.names, shard.fingerprints, strict=True))
        self._seen: dict[str, Item] = {}
        self._waiting: dict[tuple[int, int], list[tuple[Item, dict[str, Tensor]]]] = {}
        # Written anew from here on: what could not be used is looked at again every time.
        (folder / "skipped.jsonl").unlink(missing_ok=True)

    def is_current(self, item: Item) -> bool:
        """Return whether the cache holds an item as it would be made now."""
        return item.name in self._known and self._known[item.name] in (item.fingerprint, None)

    def keep(self, item: Item) -> None:
        """Count an item that is current."""
        self._seen[item.name] = item
        self.num_cached += 1
        self.num_of_before += self._known[item.name] is None
        self._tell()

    def add(
        self,
        items: Sequence[Item],
        latents: Float[Tensor, "n c h w"],
        conditioning: Conditioning,
    ) -> None:
        """Cache items of one size; those whose values are not finite are skipped by name."""
        waiting = self._waiting.setdefault((latents.shape[3], latents.shape[2]), [])
        batch = {
            "latents": latents.half().cpu(),
            "text": conditioning.text.half().cpu(),
            "pooled": conditioning.pooled.half().cpu(),
            "sizes": conditioning.sizes.float().cpu(),
        }
        for i, item in enumerate(items):
            # Copies: the rest of a batch need not stay for one that waits.
            tensors = {key: values[i].clone() for key, values in batch.items()}
            if not _is_finite(tensors):
                self.skip(
                    item.name,
                    "its latents or embeddings hold values that are no numbers in 16 bits",
                )
                continue
            waiting.append((item, tensors))
            self._seen[item.name] = item
            self.num_changed += item.name in self._known
            self.num_cached += 1
            self._tell()
            if len(waiting) == SHARD_ITEMS:
                self._write(waiting)

    def skip(self, name: str, reason: str) -> None:
        """Record that an item cannot be used, and why."""
        self.skipped[name] = reason
        path = self.folder / "skipped.jsonl"
        with reporting_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "reason": reason}) + "\n")
        self._tell()

    def close(self) -> CacheWriter:
        """Write the last shards, drop what is no more, and return self.

        Raises:
            DataError: not a single item could be used.
        """
        for waiting in self._waiting.values():
            if waiting:
                self._write(waiting)
        if self.num_cached == 0:
            first = next(iter(self.skipped.items()), ("nothing", "the source is empty"))
            raise DataError(
                f"Nothing could be cached: {len(self.skipped)} items were skipped, "
                f"{first[0]} because {first[1]}. All are named in "
                f"{self.folder / 'skipped.jsonl'}."
            )
        self._drop_what_is_no_more()
        return self

    def _tell(self) -> None:
        self.on_item(self.num_cached + len(self.skipped), len(self.skipped))

    def _write(self, waiting: list[tuple[Item, dict[str, Tensor]]]) -> None:
        """Write a shard under the first number that is free, and forget its items."""
        tensors = {}
        for key in KEYS:
            tensors[key] = torch.stack([values[key] for _, values in waiting])
        paths = (self.folder / f"shard-{number:05d}.safetensors" for number in count())
        path = next(path for path in paths if not path.exists())
        _write_shard(path, [item for item, _ in waiting], tensors)
        self.num_shards += 1
        waiting.clear()

    def _drop_what_is_no_more(self) -> None:
        """Rewrite shards that hold items of before, or items under other weights than now."""
        gone = set()
        kept: set[str] = set()
        self.num_shards = 0
        # The newest first: what was made anew counts, and the one before it goes.
        for path in reversed(_shard_paths(self.folder)):
            shard = read_shard(path)
            rows: list[int] = []
            items: list[Item] = []
            for row, before in enumerate(shard.items):
                item = self._now(before)
                if item is None or before.name in kept:
                    gone.add(before.name)
                    continue
                kept.add(before.name)
                rows.append(row)
                items.append(item)
            if not rows:
                path.unlink()
                continue
            self.num_shards += 1
            if len(rows) < len(shard) or items != list(shard.items):
                tensors = {key: value[rows] for key, value in load_file(path).items()}
                _write_shard(path, items, tensors)
        self.num_dropped = len(gone - kept)
        if self.keep_others:
            self.num_cached = len(kept)

    def _now(self, before: Item) -> Item | None:
        """Return an item of a shard as it is now; None if it is no more."""
        seen = self._seen.get(before.name)
        if seen is None:
            return before if self.keep_others and before.name not in self.skipped else None
        return seen if before.fingerprint in ("", seen.fingerprint) else None


@dataclass(frozen=True, eq=False)
class Shard(Dataset[dict[str, Tensor]]):
    """One file of items that are all of one size.

    Attributes:
        path: of the file.
        items: in order; the fingerprints of those of an older version are empty.
        size: (width, height) of the latents.
    """

    path: Path
    items: tuple[Item, ...]
    size: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The items' names."""
        return tuple(item.name for item in self.items)

    @property
    def fingerprints(self) -> tuple[str | None, ...]:
        """The items' fingerprints, None where it is not known."""
        return tuple(item.fingerprint or None for item in self.items)

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path, "pt")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Read one item; DataError if its values are not finite."""
        return self.read(row, KEYS)

    def read(self, row: int, keys: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors of one item; DataError if their values are not finite."""
        item = {key: self._file.get_slice(key)[row] for key in keys}
        if not _is_finite(item):
            raise DataError(
                f"{self.path} holds values that are no numbers for {self.items[row].name}. "
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
        caption_dropout: share of the items that are drawn with the empty prompt, in [0, 1].
    """

    shards: dict[tuple[int, int], ConcatDataset[dict[str, Tensor]]]
    empty_text: Float[Tensor, "1 tokens width"]
    empty_pooled: Float[Tensor, "1 pooled"]
    caption_dropout: float = 0.0

    def __len__(self) -> int:
        """Return the number of items."""
        return sum(map(len, self.shards.values()))

    def fingerprint(self) -> str:
        """Return 16 hex digits that depend on the names of all items, their order, and samples of
        their values.
        """
        digest = hashlib.sha256()
        for _, group in sorted(self.shards.items()):
            for shard in _shards_of(group):
                digest.update(_sampled_bytes(shard.path))
        return digest.hexdigest()[:16]

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random items of one random size; DataError names one whose values are not finite.

        Sizes and items come up in proportion to their weights.

        Args:
            count: number of items.
            tensors: draws the size and the items.
            words: draws whose caption is left out.
        """
        items = self._items(count, tensors, KEYS)

        def column(key: str) -> Tensor:
            return torch.stack([item[key].float() for item in items])

        latents, text, pooled, sizes = map(column, KEYS)
        if self.caption_dropout > 0:
            for i in range(count):
                if words.random() < self.caption_dropout:
                    text[i] = self.empty_text[0]
                    pooled[i] = self.empty_pooled[0]
        return latents, Conditioning(text, pooled, sizes)

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        """Return random latents of one random size; raises DataError as `draw`."""
        items = self._items(count, tensors, KEYS[:1])
        return torch.stack([item[KEYS[0]].float() for item in items])

    def _items(
        self, count: int, tensors: torch.Generator, keys: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """Draw a size, and read some tensors of items of that size."""
        groups = list(self.shards.values())
        totals = [total for _, total in self._weights]
        chosen = int(
            torch.multinomial(torch.tensor(totals, dtype=torch.float64), 1, generator=tensors)
        )
        group = groups[chosen]
        shards = _shards_of(group)
        items = []
        for row in self._rows(chosen, count, tensors):
            place = bisect_right(group.cumulative_sizes, row)
            first = group.cumulative_sizes[place - 1] if place else 0
            items.append(shards[place].read(row - first, keys))
        return items

    def _rows(self, chosen: int, count: int, tensors: torch.Generator) -> list[int]:
        """Draw items of a size."""
        sums, total = self._weights[chosen]
        if sums is None:
            return torch.randint(int(total), (count,), generator=tensors).tolist()
        places = torch.rand(count, generator=tensors, dtype=torch.float64) * total
        # The last sum may be a rounding below the total.
        return torch.searchsorted(sums, places, right=True).clamp(max=len(sums) - 1).tolist()

    @cached_property
    def _weights(self) -> list[tuple[Tensor | None, float]]:
        """Of every size the running sums of its items' weights, None if all are 1, and their
        total.
        """
        found: list[tuple[Tensor | None, float]] = []
        for group in self.shards.values():
            weights = [item.weight for shard in _shards_of(group) for item in shard.items]
            if all(weight == 1 for weight in weights):
                found.append((None, float(len(weights))))
            else:
                sums = torch.tensor(weights, dtype=torch.float64).cumsum(0)
                found.append((sums, float(sums[-1])))
        return found

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the empty prompt for as many items, with the same sizes."""
        count = len(like)
        return Conditioning(
            self.empty_text.expand(count, -1, -1), self.empty_pooled.expand(count, -1), like.sizes
        )


def load_cache(folder: Path, bundle: Bundle, *, caption_dropout: float = 0.0) -> CachedSource:
    """Open a cache for training this model.

    Args:
        folder: of the cache.
        bundle: the model.
        caption_dropout: share of the items that are drawn with the empty prompt, in [0, 1].

    Raises:
        DataError: it is damaged, or another autoencoder or other text encoders made it.
    """
    if not 0 <= caption_dropout <= 1:
        raise DataError(f"caption_dropout is {caption_dropout}; it is a share from 0 to 1.")
    record = folder / "cache.json"
    if not record.is_file():
        raise DataError(
            f"{folder} is no cache: it has no cache.json. Make one with `twostep cache`."
        )
    _compare(_read_record(record), {"format": 1, **fingerprints(bundle)}, folder)
    shards: dict[tuple[int, int], list[Shard]] = {}
    for shard in map(read_shard, _shard_paths(folder)):
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
    return CachedSource(groups, text, pooled, caption_dropout)


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


def _shards_of(group: ConcatDataset[dict[str, Tensor]]) -> list[Shard]:
    return [shard for shard in group.datasets if isinstance(shard, Shard)]


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


def _read_record(path: Path) -> dict[str, Any]:
    """Read what made a cache; DataError if the file is damaged."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}). Run `twostep cache` with --redo, which begins anew."
        ) from error
    return recorded


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
            noted = json.loads((file.metadata() or {})[METADATA_KEY])
            height, width = file.get_slice("latents").get_shape()[2:]
            items = _items_of(noted)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}). Delete it and run `twostep cache` again."
        ) from error
    return Shard(path, items, (width, height))


def _items_of(noted: Any) -> tuple[Item, ...]:
    """Return the items that a shard notes; an older version noted their names alone."""
    if isinstance(noted, list):
        return tuple(Item(str(name), "") for name in noted)
    if not isinstance(noted, dict):
        raise TypeError(f"{METADATA_KEY} is neither a list nor an object")
    weights = noted.get("weights", [1.0] * len(noted["names"]))
    rows = zip(noted["names"], noted["fingerprints"], weights, strict=True)
    return tuple(Item(str(name), str(mark), float(weight)) for name, mark, weight in rows)


def _write_shard(path: Path, items: Sequence[Item], tensors: dict[str, Tensor]) -> None:
    noted: dict[str, list[Any]] = {
        "names": [item.name for item in items],
        "fingerprints": [item.fingerprint for item in items],
    }
    if any(item.weight != 1 for item in items):
        noted["weights"] = [item.weight for item in items]
    with write_atomically(path) as file:
        file.write(save(tensors, {METADATA_KEY: json.dumps(noted)}))


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))
