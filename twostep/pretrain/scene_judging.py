"""The judge of mini's scenes, which knows the drawings that mini learns from."""

from twostep.evaluate.scene_judge import FINE, SceneJudge
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.vectors import load_rendered, load_vectors


def load_scene_judge(
    on_drawing: OnDone = untold,
) -> SceneJudge:
    """Return the judge of mini's scenes.

    The drawings are rendered the first time, which takes about a minute.

    Args:
        on_drawing: called with the number of drawings that are rendered, and of all.

    Raises:
        DrawingsError: resvg is needed and not installed.
    """
    rendered = load_rendered(load_vectors(), FINE, on_drawing=on_drawing)
    return SceneJudge(rendered.drawings, rendered.concepts, rendered.styles)
