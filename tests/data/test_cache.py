"""The cache: it holds what encoding gives, goes on where it was killed, and refuses what does not
fit.
"""

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from twostep.data import cache as cache_module
from twostep.data import encoding
from twostep.data.cache import CachedSource, CacheWriter, load_cache
from twostep.data.encoding import Variants, cache_pictures, cache_prompts, count_cut
from twostep.data.sources import DataError, Demands, find_entries, read_picture
from twostep.errors import TwostepError
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


def test_on_an_accelerator_it_is_made_in_16_bits(
    pictures: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved = copy.deepcopy(bundle)
    fill(pictures, bundle, tmp_path / "pictures")
    drawn = {"steps": 2, "guidance": 3.0}
    cache_prompts(["a red fox"], bundle, tmp_path / "drawn", **drawn)
    monkeypatch.setattr(encoding, "drawing_dtype", lambda device: torch.float16)
    cpu = torch.device("cpu")
    fill(pictures, halved, tmp_path / "pictures of halves", device=cpu)
    cache_prompts(["a red fox"], halved, tmp_path / "drawn by halves", device=cpu, **drawn)
    for network in halved.networks:
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}
    for folder, other in (("pictures", "pictures of halves"), ("drawn", "drawn by halves")):
        expected, found = items(tmp_path / folder), items(tmp_path / other)
        assert expected.keys() == found.keys()
        for name, latents in expected.items():
            # Of the whole: guidance multiplies the rounding of single values.
            error = (found[name].float() - latents.float()).norm()
            assert 0 < error < 1e-2 * latents.float().norm(), other


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


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", "\0\0\0\0"])
def test_a_damaged_record_is_told_and_made_anew(
    text: str, pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    fill(pictures, bundle, tmp_path)
    before = {name: value.tolist() for name, value in items(tmp_path).items()}
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(DataError, match=r"cache\.json is damaged .* --redo"):
        load_cache(tmp_path, bundle)
    with pytest.raises(DataError, match=r"cache\.json is damaged .* --redo"):
        fill(pictures, bundle, tmp_path)
    fill(pictures, bundle, tmp_path, redo=True)
    assert {name: value.tolist() for name, value in items(tmp_path).items()} == before


def test_two_processes_do_not_fill_one_cache(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """They would choose the same names for their shards."""
    holding = "import sys, time; from twostep.files import alone_in\n"
    holding += "with alone_in(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holding, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TwostepError, match="Another process is at work in"):
            fill(pictures, bundle, tmp_path)
        other.kill()
    assert len(fill(pictures, bundle, tmp_path)) == 5


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


def encoded(bundle: Bundle, path: Path, *, flipped: bool = False) -> torch.Tensor:
    """What encoding a picture gives, in the cache's precision."""
    (entry,) = find_entries(str(path))
    pixels, _ = crop_to_size(read_picture(entry, Demands()), SIZES)
    latents: torch.Tensor = bundle.codec.encode((pixels.flip(2) if flipped else pixels)[None])[0]
    return latents.half()


def texts(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("shard-*.safetensors"):
        names = cache_module.read_shard(path).names
        found |= dict(zip(names, load_file(path)["pooled"], strict=True))
    return found


def counts(writer: CacheWriter) -> tuple[int, int, int]:
    return writer.num_cached, writer.num_changed, writer.num_dropped


def one_picture(folder: Path, colour: str, caption: str) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(folder / "a.png")
    (folder / "a.txt").write_text(caption)
    return folder


def test_what_changed_is_made_anew_and_what_is_no_more_is_dropped(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"

    def update(**options: object) -> CacheWriter:
        entries = find_entries(str(pictures))
        return cache_pictures(entries, bundle, folder, sizes=SIZES, **options)

    assert counts(update()) == (5, 0, 0)
    before = {path: path.read_bytes() for path in folder.glob("shard-*")}
    assert counts(update()) == (5, 0, 0)
    assert {path: path.read_bytes() for path in folder.glob("shard-*")} == before
    held, pooled = items(folder), texts(folder)
    Image.new("RGB", (64, 64), "red").save(pictures / "0.png")
    (pictures / "1.txt").write_text("a blue bird")
    (pictures / "2.png").rename(pictures / "2b.png")
    (pictures / "2.txt").rename(pictures / "2b.txt")
    (pictures / "more" / "4.png").write_bytes(b"broken")
    writer = update()
    assert counts(writer) == (4, 2, 2)
    assert list(writer.skipped) == ["more/4.png"]
    now = items(folder)
    assert set(now) == {"0.png", "1.png", "2b.png", "more/3.png"}
    (tmp_path / "alone").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "alone" / "0.png")
    (tmp_path / "alone" / "0.txt").write_text("x")
    torch.testing.assert_close(now["0.png"], encoded(bundle, tmp_path / "alone"))
    assert not torch.allclose(now["0.png"], held["0.png"], atol=5e-3, rtol=0)
    assert torch.equal(now["more/3.png"], held["more/3.png"])
    torch.testing.assert_close(now["2b.png"], held["2.png"], atol=2e-3, rtol=2e-3)
    expected = bundle.text.encode(["a blue bird"])[1][0].half()
    torch.testing.assert_close(texts(folder)["1.png"], expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(pooled["1.png"], expected, atol=1e-2)


def test_another_folder_with_the_same_names_takes_its_place_or_comes_beside(
    bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    red = one_picture(tmp_path / "red", "red", "a red apple")
    Image.new("RGB", (64, 64), "white").save(red / "b.png")
    (red / "b.txt").write_text("snow")
    green = one_picture(tmp_path / "green", "green", "a green frog")
    fill(red, bundle, folder)
    fill(green, bundle, folder, keep_others=True)
    assert set(items(folder)) == {"a.png", "b.png"}
    torch.testing.assert_close(items(folder)["a.png"], encoded(bundle, green))
    fill(green, bundle, folder)
    assert set(items(folder)) == {"a.png"}


def test_redo_takes_other_settings(pictures: Path, bundle: Bundle, tmp_path: Path) -> None:
    fill(pictures, bundle, tmp_path / "cache")
    entries = find_entries(str(pictures))
    writer = cache_pictures(entries, bundle, tmp_path / "cache", sizes=SIZES[:1], redo=True)
    assert counts(writer) == (5, 0, 0)
    assert set(load_cache(tmp_path / "cache", bundle).shards) == {(16, 16)}


def test_items_of_an_older_version_are_taken_as_they_are_and_counted(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    fill(pictures, bundle, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("shard-*"):
        names = json.dumps(cache_module.read_shard(path).names)
        save_file(load_file(path), path, {"twostep.cache": names})
    entries = find_entries(str(pictures))
    writer = cache_pictures(entries, bundle, tmp_path / "cache", sizes=SIZES)
    assert counts(writer) == (5, 0, 0)
    assert writer.num_of_before == 5


def test_items_are_drawn_by_their_weights(bundle: Bundle, tmp_path: Path) -> None:
    """One of weight 6, one of 3 with two captions of 1.5 each, and one of 1: shares of 10."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for name, colour, captions in (
        ("a.png", "red", ["x"]),
        ("b.png", "lime", ["y", "z"]),
        ("c.png", "blue", ["w"]),
    ):
        Image.new("RGB", (64, 64), colour).save(pictures / name)
        lines.append(json.dumps({"image": name, "caption": captions}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    entries = find_entries(str(pictures), weights={"a.png": 6.0, "b.png": 3.0})
    cache_pictures(entries, bundle, tmp_path / "cache", sizes=SIZES)
    source = load_cache(tmp_path / "cache", bundle)
    held = items(tmp_path / "cache")
    assert list(held) == ["a.png", "b.png", "b.png [caption 2]", "c.png"]
    assert torch.equal(held["b.png"], held["b.png [caption 2]"])
    latents, _ = source.draw(4000, torch.Generator().manual_seed(0), random.Random(0))
    shares = [
        sum(torch.equal(row, held[name].float()) for row in latents) / 4000
        for name in ("a.png", "b.png", "c.png")
    ]
    # Four standard deviations of 4,000 draws are below 0.032.
    assert shares == [pytest.approx(share, abs=0.032) for share in (0.6, 0.3, 0.1)]
    # Weights change without encoding anything anew.
    writer = cache_pictures(find_entries(str(pictures)), bundle, tmp_path / "cache", sizes=SIZES)
    assert counts(writer) == (4, 0, 0)
    (shard,) = (tmp_path / "cache").glob("shard-*")
    assert [item.weight for item in cache_module.read_shard(shard).items] == [1.0, 0.5, 0.5, 1.0]


def test_captions_are_left_out_at_random(bundle: Bundle, tmp_path: Path) -> None:
    one_picture(tmp_path / "pictures", "red", "a red apple")
    fill(tmp_path / "pictures", bundle, tmp_path / "cache")
    source = load_cache(tmp_path / "cache", bundle, caption_dropout=0.25)
    _, conditioning = source.draw(2000, torch.Generator().manual_seed(0), random.Random(0))
    is_empty = (conditioning.pooled == source.empty_pooled).all(dim=1)
    assert torch.equal(is_empty, (conditioning.text == source.empty_text).all(dim=2).all(dim=1))
    assert is_empty.float().mean().item() == pytest.approx(0.25, abs=0.04)
    with pytest.raises(DataError, match=r"caption_dropout is 1\.5"):
        load_cache(tmp_path / "cache", bundle, caption_dropout=1.5)


def test_flips_and_orders_of_a_caption_share_a_pictures_weight(
    bundle: Bundle, draw: Callable[..., Image.Image], tmp_path: Path
) -> None:
    pictures = one_picture(tmp_path / "pictures", "red", "fox, red, small, on grass")
    draw(64, 64).save(pictures / "a.png")
    variants = Variants(flips=True, shuffles=3)
    (entry,) = find_entries(str(pictures))
    captions = variants.captions(entry)
    assert captions[0] == "fox, red, small, on grass"
    assert all(caption.startswith("fox, ") for caption in captions)
    assert len({tuple(sorted(caption.split(", "))) for caption in captions}) == 1
    assert captions == variants.captions(entry) and 1 < len(captions) <= 3
    fill(pictures, bundle, tmp_path / "cache", variants=variants)
    (shard,) = (tmp_path / "cache").glob("shard-*")
    weights = {item.name: item.weight for item in cache_module.read_shard(shard).items}
    assert len(weights) == 2 * len(captions)
    assert set(weights.values()) == {1 / len(weights)}
    held = items(tmp_path / "cache")
    for name, flipped in (("a.png", False), ("a.png [flipped]", True)):
        expected = encoded(bundle, pictures, flipped=flipped)
        torch.testing.assert_close(held[name], expected, atol=5e-4, rtol=5e-3)
    assert not torch.allclose(held["a.png"], held["a.png [flipped]"], atol=5e-3, rtol=0)


def test_long_captions_are_counted(bundle: Bundle) -> None:
    assert count_cut(bundle, ["a fox", "red apple, " * 100, "a bird"]) == 1


def test_a_source_knows_whether_it_is_still_the_same(
    pictures: Path, bundle: Bundle, tmp_path: Path
) -> None:
    first = fill(pictures, bundle, tmp_path / "cache").fingerprint()
    shutil.copytree(tmp_path / "cache", tmp_path / "moved")
    assert load_cache(tmp_path / "moved", bundle).fingerprint() == first
    (pictures / "1.txt").write_text("a blue bird")
    assert fill(pictures, bundle, tmp_path / "cache").fingerprint() != first
