"""The cache: it holds what encoding gives, goes on where it was killed, and refuses what does not
fit.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twostep.data import cache as cache_module
from twostep.data.cache import CachedSource, load_cache
from twostep.data.encoding import cache_pictures, cache_prompts
from twostep.data.sources import DataError, Demands, find_entries, read_picture
from twostep.media.image import ImageCodec
from twostep.media.pictures import crop_to_size
from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle

SIZES = ((64, 64), (96, 48), (48, 96))


def fill(pictures: Path, bundle: Bundle, folder: Path, **options: object) -> CachedSource:
    cache_pictures(
        find_entries(str(pictures)), bundle, folder, sizes=SIZES, batch_size=2, **options
    )
    return load_cache(folder, bundle)


def items(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("shard-*.safetensors"):
        names = cache_module.read_shard(path).names
        found |= dict(zip(names, load_file(path)["latents"], strict=True))
    return found


def test_it_holds_what_encoding_gives(pictures: Path, bundle: Bundle, tmp_path: Path) -> None:
    source = fill(pictures, bundle, tmp_path / "cache")
    assert len(source) == 5
    assert set(source.shards) == {(width // 4, height // 4) for width, height in SIZES}
    held = items(tmp_path / "cache")
    for entry in find_entries(str(pictures)):
        pixels, _ = crop_to_size(read_picture(entry, Demands()), SIZES)
        torch.testing.assert_close(
            held[entry.name].float(), bundle.codec.encode(pixels[None])[0], atol=5e-3, rtol=5e-3
        )


def test_a_batch_is_of_one_size_with_its_own_conditioning(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    source = fill(pictures, bundle, tmp_path / "cache")
    seen = set()
    for seed in range(20):
        latents, conditioning = source.draw(
            3, torch.Generator().manual_seed(seed), random.Random(seed)
        )
        height, width = latents.shape[2] * 4, latents.shape[3] * 4
        assert conditioning.sizes[:, 4:].tolist() == [[height, width]] * 3
        seen.add((width, height))
        empty = source.empty(conditioning)
        torch.testing.assert_close(empty.sizes, conditioning.sizes)
        expected = bundle.text.encode([""])
        torch.testing.assert_close(empty.text[2:], expected[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(empty.pooled[2:], expected[1], atol=1e-2, rtol=1e-2)
    assert seen == set(SIZES)


def test_a_broken_picture_is_named_and_the_rest_is_kept(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    (pictures / "1.png").write_bytes(b"broken")
    (pictures / "2.txt").unlink()
    writer = cache_pictures(find_entries(str(pictures)), bundle, tmp_path / "cache", sizes=SIZES)
    assert writer.num_cached == 3
    assert set(writer.skipped) == {"1.png", "2.png"}
    lines = (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"name": "2.png", "reason": "it has no caption"}


def test_killed_it_goes_on_and_holds_everything_once(
    pictures: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def die(done: int, skipped: int) -> None:
        if done == 4:
            raise Killed

    monkeypatch.setattr(cache_module, "SHARD_ITEMS", 1)
    with pytest.raises(Killed):
        fill(pictures, bundle, tmp_path / "cut", on_item=die)
    assert 0 < len(items(tmp_path / "cut")) < 5
    fill(pictures, bundle, tmp_path / "cut")
    fill(pictures, bundle, tmp_path / "whole")
    whole, resumed = items(tmp_path / "whole"), items(tmp_path / "cut")
    assert set(whole) == set(resumed)
    assert (
        sum(len(cache_module.read_shard(path).names) for path in (tmp_path / "cut").glob("shard-*"))
        == 5
    )
    # A batch of another composition rounds differently.
    assert all(torch.allclose(whole[name], resumed[name], atol=2e-3) for name in whole)


def test_a_shard_that_was_deleted_is_made_again_and_no_other_is_lost(
    pictures: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_ITEMS", 1)
    fill(pictures, bundle, tmp_path / "cache")
    whole = set(items(tmp_path / "cache"))
    (tmp_path / "cache" / "shard-00001.safetensors").unlink()
    fill(pictures, bundle, tmp_path / "cache")
    assert set(items(tmp_path / "cache")) == whole and len(whole) == 5


def test_prompts_alone_give_the_teachers_pictures(bundle: Bundle, tmp_path: Path) -> None:
    prompts = ["a red fox", "a bird"]
    options = {"per_prompt": 2, "steps": 2, "guidance": 2.0}
    writer = cache_prompts(prompts, bundle, tmp_path / "cache", batch_size=3, **options)
    assert writer.num_cached == 4
    held = items(tmp_path / "cache")
    assert set(held) == {"000000 a red fox", "000001 a red fox", "000002 a bird", "000003 a bird"}
    assert not torch.equal(held["000000 a red fox"], held["000001 a red fox"])
    alone = cache_prompts(prompts, bundle, tmp_path / "alone", batch_size=1, **options)
    assert alone.num_cached == 4
    for name, latents in items(tmp_path / "alone").items():
        torch.testing.assert_close(latents, held[name], atol=2e-3, rtol=2e-3)
    assert cache_prompts(prompts, bundle, tmp_path / "cache", **options).num_shards == 1
    with pytest.raises(DataError, match="other guidance"):
        cache_prompts(prompts, bundle, tmp_path / "cache", per_prompt=2, steps=2, guidance=3.0)
    with pytest.raises(DataError, match="no prompts"):
        cache_prompts(["", " "], bundle, tmp_path / "none")


def test_what_another_model_made_is_refused(pictures: Path, bundle: Bundle, tmp_path: Path) -> None:
    fill(pictures, bundle, tmp_path / "cache")
    other = random_bundle(seed=1)
    with pytest.raises(DataError, match="other autoencoder"):
        load_cache(tmp_path / "cache", replace(bundle, codec=other.codec))
    with pytest.raises(DataError, match="other text encoders"):
        load_cache(tmp_path / "cache", replace(bundle, text=other.text))
    with pytest.raises(DataError, match="other sizes"):
        cache_pictures(find_entries(str(pictures)), bundle, tmp_path / "cache", sizes=SIZES[:1])


def test_damage_is_told(pictures: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no cache"):
        load_cache(tmp_path, bundle)
    fill(pictures, bundle, tmp_path / "cache")
    path = sorted((tmp_path / "cache").glob("shard-*"))[0]
    shard = cache_module.read_shard(path)
    tensors = load_file(path)
    tensors["latents"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path, {"twostep.cache": json.dumps(shard.names)})
    poisoned = load_cache(tmp_path / "cache", bundle)
    with pytest.raises(DataError, match="no numbers for " + shard.names[0]):
        for seed in range(100):
            poisoned.draw(4, torch.Generator().manual_seed(seed), random.Random(seed))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        load_cache(tmp_path / "cache", bundle)


def test_latents_that_are_no_numbers_are_skipped_by_name(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    calls = []

    class Overflowing(ImageCodec):
        def encode(self, media: torch.Tensor) -> torch.Tensor:
            calls.append(media)
            latents = super().encode(media)
            return latents + (float("inf") if len(calls) == 1 else 0.0)

    codec = Overflowing(bundle.codec.vae)
    writer = cache_pictures(
        find_entries(str(pictures)),
        replace(bundle, codec=codec),
        tmp_path / "cache",
        sizes=SIZES,
        batch_size=1,
    )
    assert writer.num_cached == 4
    assert list(writer.skipped) == ["0.png"]


def test_nothing_usable_is_an_error(pictures: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5 items were skipped.*0.png because it is 64x64"):
        cache_pictures(
            find_entries(str(pictures)),
            bundle,
            tmp_path / "cache",
            sizes=SIZES,
            demands=Demands(min_side=1000),
        )
