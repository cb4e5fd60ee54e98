"""Latents that the teacher draws itself."""

import random
from dataclasses import replace

import pytest
import torch

from twostep.data.drawn import (
    DrawnItem,
    drawn_by_teacher,
    planned_items,
    read_prompts,
    walked_by_teacher,
)
from twostep.data.sources import DataError
from twostep.diffusion.samplers import SamplerError
from twostep.models.sampling import draw_noise, encode_prompts, sample_prompts
from twostep.pretrain.model import random_bundle


@pytest.fixture(scope="module")
def teacher():
    bundle = random_bundle()
    return replace(bundle, contract=replace(bundle.contract, guidance=2.0))


def test_what_is_drawn_is_what_the_teacher_draws(teacher, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\n a bird \n")
    told = []
    options = {"prompts": str(prompts), "count": 3, "steps": 1}
    source = drawn_by_teacher(teacher, tmp_path, lambda *each: told.append(each), **options)
    assert [item.prompt for item in source.items] == ["a fox", "a bird", "a fox"]
    assert told[-1] == (3, 3, "drawn by the teacher")
    item = source.items[2]
    guided = encode_prompts(teacher, [item.prompt], (64, 64))
    expected = sample_prompts(teacher, guided, [item.seed], (64, 64), steps=1)
    assert torch.equal(source.latents[2], expected[0].half())
    latents, conditioning = source.draw(4, torch.Generator().manual_seed(0), random.Random(0))
    assert latents.shape == (4, 4, 16, 16) and conditioning.variants == ()
    again = source.draw_latents(4, torch.Generator().manual_seed(0))
    assert torch.equal(latents, again)
    # Nothing is drawn a second time, and what was drawn from other prompts is refused.
    path = tmp_path / "drawn" / "000001.safetensors"
    before = path.stat().st_mtime_ns
    drawn_by_teacher(teacher, tmp_path, lambda *each: None, **options)
    assert path.stat().st_mtime_ns == before
    prompts.write_text("a fox\na cat\n")
    with pytest.raises(DataError, match=r"000001.* was drawn from .*a bird"):
        drawn_by_teacher(teacher, tmp_path, lambda *each: None, **options)
    # Told before any more is drawn beside it.
    more = {**options, "count": 5}
    with pytest.raises(DataError, match=r"000001.* was drawn from .*a bird"):
        drawn_by_teacher(teacher, tmp_path, lambda *each: None, **more)
    assert len(list(path.parent.iterdir())) == 3
    prompts.write_text("a fox\n a bird \n")
    longer = drawn_by_teacher(teacher, tmp_path, lambda *each: None, **more)
    assert torch.equal(longer.latents[:3], source.latents)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"x")
    with pytest.raises(DataError, match="is damaged"):
        drawn_by_teacher(teacher, tmp_path, lambda *each: None, **options)


def test_whole_walks_are_kept_with_what_made_them(teacher, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    options = {"prompts": str(prompts), "count": 2, "steps": 4}
    source = walked_by_teacher(teacher, tmp_path, lambda *_: None, **options, sampler="unipc")
    assert source.walks.shape == (2, 5, 4, 16, 16) and source.walks.dtype == torch.float16
    assert source.times == (1000, 750, 500, 250, 0)
    item = source.items[1]
    guided = encode_prompts(teacher, [item.prompt], (64, 64))
    last = sample_prompts(teacher, guided, [item.seed], (64, 64), steps=4, sampler="unipc")
    assert torch.equal(source.walks[1, -1], last[0].half())
    assert torch.equal(source.walks[1, 0], draw_noise([item.seed], (4, 16, 16))[0].half())
    # As examples they are where the walks end.
    latents = source.draw_latents(3, torch.Generator().manual_seed(0))
    walks = source.draw_walks(3, torch.Generator().manual_seed(0), random.Random(0))
    assert torch.equal(latents, walks.states[:, -1].float())
    again = walked_by_teacher(teacher, tmp_path, lambda *_: None, **options, sampler="unipc")
    assert again.fingerprint() == source.fingerprint()
    with pytest.raises(DataError, match=r"was drawn from .*unipc.*the recipe asks for"):
        walked_by_teacher(teacher, tmp_path, lambda *_: None, **options)
    with pytest.raises(SamplerError, match="dpm"):
        walked_by_teacher(teacher, tmp_path / "new", lambda *_: None, **options, sampler="dpm")


def test_several_at_once_are_what_each_is_by_itself(teacher, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na red bird on a blue background\n")
    options = {"prompts": str(prompts), "count": 5, "steps": 4}
    alone = walked_by_teacher(teacher, tmp_path / "alone", lambda *_: None, **options)
    # One that was drawn before stays, and what is missing is drawn beside others than it was.
    kept = tmp_path / "together" / "walked" / "000001.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes((tmp_path / "alone" / "walked" / kept.name).read_bytes())
    told = []
    together = walked_by_teacher(
        teacher,
        tmp_path / "together",
        lambda *each: told.append(each[:2]),
        **options,
        batch_size=3,
    )
    # Both were rounded to half precision, which has steps of 0.016 at the largest values here.
    near = {"rtol": 1e-3, "atol": 2e-3}
    assert torch.allclose(together.walks.float(), alone.walks.float(), **near)
    assert not torch.allclose(alone.walks[0].float(), alone.walks[2].float(), atol=0.1)
    assert told == [(1, 5), (4, 5), (5, 5)]
    drawn = drawn_by_teacher(teacher, tmp_path / "three", lambda *_: None, **options, batch_size=3)
    assert torch.allclose(drawn.latents.float(), alone.walks[:, -1].float(), **near)
    with pytest.raises(DataError, match="batch_size is 0"):
        drawn_by_teacher(teacher, tmp_path, lambda *_: None, **options, batch_size=0)


def test_every_network_draws_every_prompt_in_turn() -> None:
    items = planned_items(["a", "b", "c"], 12, 2)
    assert items[:4] == (
        DrawnItem("a", 900_000, 0),
        DrawnItem("b", 900_001, 1),
        DrawnItem("c", 900_002, 0),
        DrawnItem("a", 900_003, 1),
    )
    drawn = {(item.prompt, item.variant) for item in items}
    assert drawn == {(prompt, variant) for prompt in "abc" for variant in (0, 1)}
    assert len({item.seed for item in items}) == 12


def test_prompts_that_are_not_there_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="count is 0"):
        planned_items(["a"], 0, 1)
