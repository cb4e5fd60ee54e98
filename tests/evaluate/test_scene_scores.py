"""What of a prompt is right on a picture whose things are known, and the figures of many."""

import pytest

from twostep.evaluate.attributes import Box, Concept, SceneAttributes, ThingAttributes
from twostep.evaluate.scene_judge import SeenThing, Sight
from twostep.evaluate.scene_scores import SceneVerdict, judge_scene, summarise_scenes

CONCEPTS = (
    Concept("fox", "mammal", ("fox", "vixen")),
    Concept("owl", "bird", ("owl",)),
    Concept("pizza", "", ("pizza",)),
)
STYLES = ("flat", "3d")
FOX = ThingAttributes(("fox", "vixen"), "3d")
OWL = ThingAttributes(("owl",), "flat")
RED = ("red", "red")


def _seen(concept: int, style: int, *also: tuple[int, int]) -> SeenThing:
    return SeenThing(concept, style, Box(0.0, 0.0, 0.5), 0.9, frozenset({(concept, style), *also}))


def _verdict(asked: SceneAttributes, *things: SeenThing, relation=None, background=RED):
    return judge_scene(asked, Sight(things, relation, background), CONCEPTS, STYLES)


def test_one_thing_that_is_there_is_right() -> None:
    asked = SceneAttributes((FOX,), None, RED)
    assert _verdict(asked, _seen(0, 1)) == SceneVerdict(True, None, True, None, True)
    assert _verdict(asked, _seen(0, 1)).overall is True


@pytest.mark.parametrize(
    ("things", "single", "style"),
    [
        ((), False, False),
        ((_seen(1, 1),), False, False),
        ((_seen(0, 0),), True, False),
        ((_seen(0, 1), _seen(1, 1)), False, False),
        ((_seen(2, 1, (0, 1)),), True, True),  # looks like the fox
        ((_seen(2, 1, (0, 0)),), True, False),
    ],
)
def test_one_thing(things: tuple[SeenThing, ...], single: bool, style: bool) -> None:
    verdict = _verdict(SceneAttributes((FOX,)), *things)
    assert (verdict.single, verdict.style) == (single, style)
    assert (verdict.two, verdict.position, verdict.background) == (None, None, None)
    assert verdict.overall is (single and style)


def test_a_kind_is_shown_by_any_thing_of_it() -> None:
    bird = SceneAttributes((ThingAttributes(("bird",)),))
    assert _verdict(bird, _seen(1, 0)).single is True
    assert _verdict(bird, _seen(0, 0)).single is False
    assert _verdict(bird, _seen(1, 0)).style is None


@pytest.mark.parametrize(
    ("first", "second", "relation", "expected"),
    [
        (_seen(0, 1), _seen(1, 0), "left of", (True, True, True)),
        (_seen(1, 0), _seen(0, 1), "left of", (True, True, False)),
        (_seen(0, 1), _seen(1, 0), "above", (True, True, False)),
        (_seen(0, 0), _seen(1, 1), "left of", (True, False, True)),  # styles changed places
        (_seen(0, 1), _seen(2, 0), "left of", (False, False, False)),
        (_seen(0, 1), _seen(0, 1), "left of", (False, False, False)),
    ],
)
def test_two_things(first, second, relation, expected) -> None:
    asked = SceneAttributes((FOX, OWL), "left of")
    verdict = _verdict(asked, first, second, relation=relation)
    assert (verdict.two, verdict.style, verdict.position) == expected
    assert verdict.single is None


def test_without_a_relation_any_order_is_right() -> None:
    asked = SceneAttributes((OWL, FOX), None)
    verdict = _verdict(asked, _seen(0, 1), _seen(1, 0), relation="above")
    assert verdict == SceneVerdict(None, True, True, None, None)


def test_one_of_two_things_is_not_enough() -> None:
    verdict = _verdict(SceneAttributes((FOX, OWL), "above"), _seen(0, 1))
    assert (verdict.two, verdict.position) == (False, False)


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (("red", "blue"), True),
        (("blue", "red"), False),
        (("red", "red"), False),
        (("red", None), False),
    ],
)
def test_a_gradient_has_both_its_colours_where_they_belong(seen, right: bool) -> None:
    asked = SceneAttributes((FOX,), None, ("red", "blue"))
    assert _verdict(asked, _seen(0, 1), background=seen).background is right


def test_nothing_asked_is_neither_right_nor_wrong() -> None:
    assert _verdict(SceneAttributes(), _seen(0, 1)).overall is None


def test_a_report_counts_each_row_where_it_is_asked() -> None:
    right = SceneVerdict(True, None, True, None, True)
    wrong = SceneVerdict(False, None, None, None, True)
    pair = SceneVerdict(None, True, None, False, None)
    report = summarise_scenes([right, wrong, pair, None], ["a", "b", "c", 3])
    assert (report.num_images, report.num_unknown) == (4, 1)
    counts = {
        row: (getattr(report, row).num_right, getattr(report, row).num_asked)
        for row in ("single", "two", "style", "position", "background", "overall")
    }
    assert counts == {
        "single": (1, 2),
        "two": (1, 1),
        "style": (1, 1),
        "position": (0, 1),
        "background": (2, 2),
        "overall": (1, 3),
    }
    assert report.to_dict()["overall"]["share"] == pytest.approx(1 / 3)
    assert report.overall.low == 0
    assert report.overall.high == 1
