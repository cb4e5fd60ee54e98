"""500 damaged headers of a cache's shards: each is refused in a line, or read."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from twostep.data.cache import METADATA_KEY, DataError, Item, read_shard

ODD: list[Any] = [None, [], {}, "", -1, 2**70, 1.5, True, [1], [[1]], {"a": 1}, "NaN"]


def damaged(header: dict[str, Any], rng: random.Random) -> bytes:
    changed = copy.deepcopy(header)
    noted = json.loads(changed["__metadata__"][METADATA_KEY])
    how = rng.randrange(5)
    if how == 0:
        noted[rng.choice(sorted(noted))] = rng.choice(ODD)
    elif how == 1:
        noted[rng.choice(sorted(noted))][0] = rng.choice(ODD)
    elif how == 2:
        noted = rng.choice(ODD)
    elif how == 3:
        changed["latents"][rng.choice(sorted(changed["latents"]))] = rng.choice(ODD)
    changed["__metadata__"][METADATA_KEY] = json.dumps(noted)
    data = bytearray(json.dumps(changed).encode())
    if how == 4:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.filterwarnings("error")
def test_500_damaged_shards(tmp_path: Path) -> None:
    noted = {"names": ["a", "b"], "fingerprints": ["1", "2"], "weights": [1.0, 2.0]}
    data = save({"latents": torch.zeros(2, 4, 8, 8)}, {METADATA_KEY: json.dumps(noted)})
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), data[end:]
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(data)
    assert read_shard(path).items == (Item("a", "1", 1.0), Item("b", "2", 2.0))
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        text = damaged(header, rng)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        try:
            shard = read_shard(path)
        except DataError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            continue
        assert shard.size == (8, 8)
        for item in shard.items:
            assert isinstance(item.name, str) and isinstance(item.weight, float)
    assert refused > 200
