"""Scenes: the same from any start, of the shares they are said to have, and composed exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

from twostep.evaluate.attributes import BACKGROUNDS, Box
from twostep.pretrain.scenes import (
    NO_THING,
    UNITS,
    PlacedThing,
    Scene,
    SceneError,
    SceneLaw,
    SceneTable,
    compose,
    random_scenes,
    table_of,
)

COLOURS = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1


def _equal(one: SceneTable, other: SceneTable) -> bool:
    names = ("layout", "concepts", "styles", "boxes", "colours")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def _table(*things: PlacedThing, relation=None, background=(10, 10)) -> SceneTable:
    return table_of([Scene(things, relation, background)])


@pytest.fixture(scope="module")
def many() -> SceneTable:
    return random_scenes(50, 4, count=20_000, seed=0)


def test_scene_number_i_is_the_same_from_any_start(many: SceneTable) -> None:
    part = random_scenes(50, 4, count=300, seed=0, first=4000)  # over the border of a block
    assert _equal(part, many.rows(slice(4000, 4300)))
    assert not _equal(part, random_scenes(50, 4, count=300, seed=1, first=4000))


def test_shares_are_those_of_the_law(many: SceneTable) -> None:
    law = SceneLaw()
    shares = torch.bincount(many.layout.int(), minlength=3) / len(many)
    is_pair = many.layout > 0
    same = (many.styles[:, 0] == many.styles[:, 1])[is_pair].float().mean()
    plain = (many.colours[:, 0] == many.colours[:, 1]).float().mean()
    # Four standard deviations of a share of 20,000, or of the 10,000 pairs.
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert float(same) == pytest.approx(law.same_style + (1 - law.same_style) / 4, abs=0.02)
    assert float(plain) == pytest.approx(law.plain, abs=0.013)
    assert torch.bincount(many.concepts[:, 0].int(), minlength=50).min() > 300


def test_things_lie_where_their_layout_says(many: SceneTable) -> None:
    start = many.boxes[:, :, :2] / UNITS
    side = many.boxes[:, :, 2:] / UNITS
    end = start + side
    rounding = 1.5 / UNITS
    assert start.min() >= 0
    assert end.max() <= 1 + rounding
    for layout, axis in ((1, 0), (2, 1)):
        chosen = many.layout == layout
        assert end[chosen, 0, axis].max() <= 0.5 + rounding
        assert start[chosen, 1, axis].min() >= 0.5 - rounding
        assert 0.40 - rounding <= side[chosen].min() < 0.41
        assert 0.48 < side[chosen].max() <= 0.49 + rounding
    alone = many.layout == 0
    assert (many.concepts[alone, 1] == NO_THING).all()
    assert (many.concepts[~alone, 0] != many.concepts[~alone, 1]).all()


def test_a_table_holds_the_scenes_it_was_made_of(many: SceneTable) -> None:
    some = many.rows(slice(0, 100))
    assert _equal(table_of(some.scenes()), some)


def test_a_ground_goes_from_its_upper_to_its_lower_colour() -> None:
    nothing = torch.zeros(1, 1, 4, 8, 8, dtype=torch.uint8)
    thing = PlacedThing(0, 0, Box(0.1, 0.1, 0.8))
    picture = compose(_table(thing, background=(0, 5)), nothing, 9)[0]
    torch.testing.assert_close(picture[:, 0], COLOURS[0, :, None].expand(-1, 9))
    torch.testing.assert_close(picture[:, 8], COLOURS[5, :, None].expand(-1, 9))
    torch.testing.assert_close(picture[:, 4, 0], (COLOURS[0] + COLOURS[5]) / 2)


def test_at_its_own_size_a_drawing_is_laid_on_the_ground_as_it_is() -> None:
    drawings = torch.randint(0, 256, (2, 2, 4, 16, 16), dtype=torch.uint8)
    picture = compose(
        _table(PlacedThing(1, 1, Box(0.0, 0.0, 1.0)), background=(3, 3)), drawings, 16
    )[0]
    colour, alpha = (drawings[1, 1] / 255).split([3, 1])
    ground = (COLOURS[3][:, None, None] + 1) / 2
    torch.testing.assert_close((picture + 1) / 2, colour * alpha + (1 - alpha) * ground)


def test_a_drawing_is_scaled_as_pillow_does_it() -> None:
    """Pillow's bilinear reduction has the same triangles; transparent margins hide its borders."""
    drawing = torch.zeros(4, 64, 64, dtype=torch.uint8)
    drawing[:3, 12:52, 12:52] = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    drawing[3, 12:52, 12:52] = 255
    black = (PlacedThing(0, 0, Box(16 / 64, 8 / 64, 20 / 64)),)
    picture = compose(_table(*black), drawing[None, None], 64)[0]
    on_black = drawing[:3].permute(1, 2, 0).numpy()
    for channel in range(3):
        plane = Image.fromarray(on_black[:, :, channel].astype(np.float32), mode="F")
        alpha = Image.fromarray(drawing[3].numpy().astype(np.float32), mode="F")
        small = np.array(plane.resize((20, 20), Image.Resampling.BILINEAR)) / 255
        covered = np.array(alpha.resize((20, 20), Image.Resampling.BILINEAR)) / 255
        ground = (float(COLOURS[10, channel]) + 1) / 2
        expected = torch.from_numpy(small + (1 - covered) * ground) * 2 - 1
        got = picture[channel, 8:28, 16:36]
        torch.testing.assert_close(got, expected.float(), atol=2e-5, rtol=0)


def test_what_is_covered_is_the_area_of_the_box() -> None:
    white = torch.full((1, 1, 4, 32, 32), 255, dtype=torch.uint8)
    for side in (0.43, 0.77):
        picture = compose(_table(PlacedThing(0, 0, Box(0.11, 0.07, side))), white, 64)[0, 0]
        ground = float(COLOURS[10, 0])
        covered = float(((picture - ground) / (1 - ground)).mean())
        rounded = round(side * UNITS) / UNITS
        assert covered == pytest.approx(rounded**2, rel=2e-3)


def test_the_second_thing_lies_over_the_ground_too() -> None:
    drawings = torch.zeros(2, 1, 4, 8, 8, dtype=torch.uint8)
    drawings[0, 0, 0] = 255
    drawings[1, 0, 1] = 255
    drawings[:, :, 3] = 255
    first = PlacedThing(0, 0, Box(0.0, 0.25, 0.5))
    second = PlacedThing(1, 0, Box(0.5, 0.25, 0.5))
    picture = compose(_table(first, second, relation="left of"), drawings, 64)[0]
    assert picture[:, 32, 10].tolist() == pytest.approx([1, -1, -1])
    assert picture[:, 32, 54].tolist() == pytest.approx([-1, 1, -1])
    torch.testing.assert_close(picture[:, 2, 2], COLOURS[10])


@pytest.mark.parametrize(("count", "relation"), [(1, "above"), (2, None), (3, "left of")])
def test_what_is_no_scene_is_refused(count: int, relation: str | None) -> None:
    thing = PlacedThing(0, 0, Box(0.0, 0.0, 0.4))
    with pytest.raises(SceneError, match="thing"):
        Scene((thing,) * count, relation, (0, 0))
