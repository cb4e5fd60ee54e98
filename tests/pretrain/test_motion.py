"""A teacher of clips: what an iteration draws, and how the words of motion are learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from twostep.evaluate.motions import MOTIONS, MotionNameError
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.networks.motion import MotionUnet
from twostep.pretrain import motion
from twostep.pretrain.clips import ClipLabels, MovingDrawings
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.loop import NetworkLoopSettings
from twostep.pretrain.motion import (
    KindProbes,
    LessonSettings,
    MotionSettings,
    TurnSettings,
    WordsSettings,
    new_motion_teacher,
    train_motion,
)
from twostep.training.run_folder import RunFolder

LOOP: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 9,
    "warmup_iterations": 1,
    "log_every": 1,
    "ema_decay": 0.5,
}


def settings(**others) -> MotionSettings:
    loop = NetworkLoopSettings(**LOOP, iterations=2, learning_rate=1e-3)
    # So fast that three iterations are seen.
    fast = NetworkLoopSettings(**LOOP, iterations=3, learning_rate=0.1)
    words = WordsSettings(rank=4, loop=fast)
    given = {"frames": 4, "frames_seen": 2, "kinds_together": True, "words": words} | others
    return MotionSettings(loop=loop, **given)


@pytest.mark.parametrize("learns_on_clips", [True, False])
def test_words_are_learnt_first_and_travel_beside_the_module(
    tmp_path: Path, learns_on_clips: bool
) -> None:
    chosen = settings()
    words = chosen.words.model_copy(update={"learns_on_clips": learns_on_clips})
    chosen = chosen.model_copy(update={"words": words})
    torch.manual_seed(0)
    teacher = new_motion_teacher(chosen, recipe="none", version="0")
    backbone = teacher.denoiser.backbone
    assert isinstance(backbone, MotionUnet) and backbone.adapter is not None
    lines: list[dict] = []
    folder = RunFolder(tmp_path / "run", chosen)
    folder.listeners.append(lines.append)

    def keep(iteration: int) -> None:
        save_bundle(teacher, tmp_path / "model")

    train_motion(load_drawings(), teacher, chosen, folder, on_checkpoint=keep)
    parts = [line["part"] for line in lines if "loss" in line]
    assert parts == sorted(parts, reverse=True) and set(parts) == {"words", "motion"}
    assert all(up.abs().max() > 0 for up in backbone.adapter.up)
    assert (tmp_path / "model" / "domain_adapter.safetensors").exists()

    loaded = load_bundle(tmp_path / "model")
    x = torch.randn(1, 4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    conditioning = teacher.conditioning(["a red fox, moving left"], 64, 64)
    base = backbone.bases[0]
    with torch.no_grad():
        merged = loaded.denoiser(x, torch.tensor([900]), conditioning).eps
        if not learns_on_clips:
            # It has been merged already.
            assert any(
                not torch.equal(value, base.state_dict()[name])
                for name, value in load_bundle("nano").denoiser.network.state_dict().items()
            )
            base.load_state_dict(load_bundle("nano").denoiser.network.state_dict())
        with backbone.adapter.applied(base):
            trained = teacher.denoiser(x, torch.tensor([900]), conditioning).eps
        without = teacher.denoiser(x, torch.tensor([900]), conditioning).eps
    # Both files are in 16 bits.
    assert torch.allclose(merged, trained, atol=2e-3)
    assert (merged - without).abs().max() > 0.05
    assert load_bundle(tmp_path / "model", outline=True).contract == loaded.contract


def test_a_longer_run_goes_on_with_the_words_that_were_learnt(tmp_path: Path) -> None:
    chosen = settings()
    first = new_motion_teacher(chosen, recipe="none", version="0")
    train_motion(load_drawings(), first, chosen, RunFolder(tmp_path / "run", chosen))
    loop = chosen.loop.model_copy(update={"iterations": 3, "learning_rate": 1e-9})
    longer = chosen.model_copy(update={"loop": loop})
    again = new_motion_teacher(longer, recipe="none", version="0")
    lines: list[dict[str, Any]] = []
    folder = RunFolder(tmp_path / "run", longer)
    folder.listeners.append(lines.append)
    train_motion(load_drawings(), again, longer, folder)
    assert [line["part"] for line in lines if "loss" in line] == ["motion"]
    learnt, loaded = first.denoiser.backbone.adapter, again.denoiser.backbone.adapter
    for before, after in zip(learnt.up, loaded.up, strict=True):
        assert after.abs().max() > 0.01 and torch.allclose(before, after, atol=1e-2)


def test_a_module_alone_learns_too(tmp_path: Path) -> None:
    chosen = settings(words=None, kinds_together=False, frames_seen=None)
    teacher = new_motion_teacher(chosen, recipe="none", version="0")
    before = {key: value.clone() for key, value in teacher.denoiser.network.state_dict().items()}
    train_motion(load_drawings(), teacher, chosen, RunFolder(tmp_path / "run", chosen))
    after = teacher.denoiser.network.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    save_bundle(teacher, tmp_path / "model")
    assert not (tmp_path / "model" / "domain_adapter.safetensors").exists()


def test_lessons_show_less_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = {"iterations": 1, "kinds": ["left", "grow"], "concepts": 1, "styles": 2}
    first = LessonSettings.model_validate({**lesson, "backgrounds": 1, "batch_size": 4})
    chosen = settings(words=None, lessons=(first,))
    teacher = new_motion_teacher(chosen, recipe="none", version="0")
    drawn: list[list[ClipLabels]] = []
    compose = MovingDrawings.compose

    def watched(self: MovingDrawings, *given: Any) -> Any:
        clips, labels = compose(self, *given)
        drawn.append(labels)
        return clips, labels

    monkeypatch.setattr(MovingDrawings, "compose", watched)
    train_motion(load_drawings(), teacher, chosen, RunFolder(tmp_path / "run", chosen))
    less, all_of_it = drawn
    assert [each.kind for each in less] == ["left", "grow"] * 2
    assert {(each.concept, each.background) for each in less} == {(0, 0)}
    assert {each.style for each in less} <= {0, 1}
    assert [each.kind for each in all_of_it] == list(MOTIONS)
    with pytest.raises(MotionNameError, match="'sideways' is none of still"):
        LessonSettings.model_validate({**lesson, "kinds": ["sideways"], "batch_size": 4})


def test_iterations_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames at any time, single ones without the module, some of all kinds at high noise."""
    shown = [("clips", 3), ("frames", 5), ("kinds", 9)]
    turns = tuple(TurnSettings(shows=shows, batch_size=size) for shows, size in shown)
    chosen = settings(turns=turns, high_noise_share=1.0)
    chosen = chosen.model_copy(update={"loop": chosen.loop.model_copy(update={"iterations": 6})})
    teacher = new_motion_teacher(chosen, recipe="none", version="0")
    seen: list[tuple[tuple[int, ...], bool]] = []
    has_module: list[bool] = []
    loss = motion.noise_loss

    def watched(denoiser: Any, x0: Any, conditioning: Any, *, t: Any, **others: Any) -> Any:
        seen.append((tuple(x0.shape[:3]), bool((t > 800).all())))
        has_module.append(denoiser.backbone.network is teacher.denoiser.network)
        return loss(denoiser, x0, conditioning, t=t, **others)

    monkeypatch.setattr(motion, "noise_loss", watched)
    train_motion(load_drawings(), teacher, chosen, RunFolder(tmp_path / "run", chosen))
    words, rounds = seen[:3], seen[3:]
    assert [shape for shape, _ in words] == [(9, 4, 1)] * 3
    assert [shape for shape, _ in rounds] == [(3, 4, 4), (5, 4, 1), (9, 4, 2)] * 2
    assert has_module == [False] * 3 + [True, False, True] * 2
    assert rounds[2][1] and rounds[5][1]
    assert not all(is_high for _, is_high in (*words, *rounds[:2], *rounds[3:5]))


def test_single_frames_need_an_adapter() -> None:
    turn = TurnSettings(shows="frames", batch_size=4)
    with pytest.raises(ValueError, match="the domain adapter alone learns, and there is none"):
        settings(words=None, turns=(turn,))
    words = settings().words.model_copy(update={"learns_on_clips": False})
    with pytest.raises(ValueError, match=r"set words\.learns_on_clips"):
        settings(words=words, turns=(turn,))


def test_the_kind_is_told_by_the_direction_of_what_is_read() -> None:
    chosen = settings()
    network = new_motion_teacher(chosen, recipe="none", version="0").denoiser.network
    kinds = ("left", "right", "spin")
    probes = KindProbes.on(network, kinds)
    norm, directions = probes.norms[0], probes.directions[0]
    assert torch.allclose(directions.mT @ directions, torch.eye(3), atol=1e-5)
    torch.nn.init.zeros_(norm.weight)
    said = [2, 0]
    with torch.no_grad(), probes.read() as scores:
        for kind in said:
            norm.bias.data = 5 * directions[:, kind]
            norm(torch.randn(1, len(norm.weight), 2, 4, 4))
    assert [int(each.argmax()) for each in scores] == said
    rows = [torch.cat(scores)]
    right = probes.loss(rows, ["spin", "left"], ["a fox, spinning", "a fox, moving left"])
    wrong = probes.loss(rows, ["left", "spin"], ["a fox, moving left", "a fox, spinning"])
    assert right < 0.01 and wrong == pytest.approx(10, abs=0.1)
    empty = probes.loss(rows, ["left", "left"], ["", "a fox, moving left"])
    assert empty == pytest.approx(float(right) / 2, abs=0.01)
    assert probes.loss(rows, ["left", "spin"], ["", ""]) == 0
