"""Rendered notes and their captions, and the loss of rectified flow."""

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.sounds import LOOP, TINY, tiny_sound_model, tones
from twostep.diffusion import RectifiedFlow
from twostep.media.audio import AudioCodec, Sound, check_usable
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.flow import draw_logit_normal_times, flow_loss
from twostep.pretrain.notes import (
    INSTRUMENTS,
    Naming,
    NoteCache,
    NotesError,
    caption,
    encoded,
    is_held_out,
    load_notes,
    note_prompts,
    random_labels,
    render_notes,
    sound_source,
)
from twostep.pretrain.parts import load_part
from twostep.pretrain.sound import train_sound_teacher
from twostep.pretrain.soundfont import NUM_SAMPLES, SOUNDFONTS
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder

needs_soundfont = pytest.mark.skipif(
    not any(path.is_file() for path in SOUNDFONTS) or find_spec("tinysoundfont") is None,
    reason="there is no soundfont here, or nothing that plays it",
)


def test_every_twelfth_combination_is_held_out_and_never_drawn() -> None:
    combinations = torch.tensor([(i, m, 0) for i in range(10) for m in range(48, 84)])
    held_out = is_held_out(combinations)
    # One in every octave of every instrument, and no pitch class at all of them.
    counts = held_out.view(10, 3, 12).sum(dim=2)
    assert bool((counts == 1).all())
    assert held_out.view(10, 3, 12).any(dim=1).sum(dim=0).max() < 10
    generator = torch.Generator().manual_seed(0)
    drawn = random_labels(500, generator)
    assert len(drawn) == 500 and not bool(is_held_out(drawn).any())
    assert {*drawn[:, 0].tolist()} == {*range(len(INSTRUMENTS))}
    assert bool(is_held_out(random_labels(50, generator, held_out=True)).all())


def test_a_caption_says_what_the_note_is() -> None:
    prompts = note_prompts()
    words = random.Random(0)
    assert {caption((2, 60, 1), words) for _ in range(20)} == {
        "a violin note, C4, loud",
        "a loud violin note, C4",
    }
    said = [caption((2, 60, 1), words, Naming()) for _ in range(300)]
    right = {"violin", "middle", "loud", "key-c", "octave-4"}
    for each in said:
        assert prompts.unknown_words(each) == []
        named = {
            prompts.vocabulary[place] for place in prompts.encode([each])[1][0].nonzero()[:, 0]
        }
        assert named <= right
    assert 0.05 < said.count("") / len(said) < 0.15
    assert any("middle" in each for each in said) and any("C4" in each for each in said)


@pytest.mark.slow
@needs_soundfont
def test_notes_are_rendered_as_their_labels_say() -> None:
    from twostep.evaluate.pitch import pitches

    labels = torch.tensor([(7, 69, 0), (7, 69, 1), (4, 57, 1)], dtype=torch.uint8)
    notes = render_notes(labels, seed=1)
    assert notes.shape == (3, NUM_SAMPLES)
    for note in notes:
        check_usable(Sound(note, 16_000))
    level = notes.square().mean(dim=1)
    assert float(level[1]) > 2 * float(level[0])
    assert torch.equal(render_notes(labels, seed=1), notes)
    assert not torch.equal(render_notes(labels, seed=2), notes)
    if find_spec("torchcrepe") is None:
        pytest.skip("CREPE, which judges pitches, is not installed")
    assert pitches(notes)[0].tolist() == pytest.approx([69, 69, 57], abs=0.3)


def test_a_missing_or_broken_soundfont_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = random_labels(1, torch.Generator().manual_seed(0))
    monkeypatch.setattr("twostep.pretrain.soundfont.SOUNDFONTS", (tmp_path / "none.sf2",))
    with pytest.raises(NotesError, match="apt-get install fluid-soundfont-gm"):
        render_notes(labels, seed=0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tinysoundfont", None)
        with pytest.raises(NotesError, match="pip install --no-deps tinysoundfont"):
            render_notes(labels, seed=0, soundfont=tmp_path / "any.sf2")
    pytest.importorskip("tinysoundfont")
    (tmp_path / "broken.sf2").write_bytes(b"no soundfont")
    with pytest.raises(NotesError, match=r"broken\.sf2 cannot be read as a soundfont"):
        render_notes(labels, seed=0, soundfont=tmp_path / "broken.sf2")


def test_cached_notes_come_back_and_damage_is_told(tmp_path: Path) -> None:
    bundle, labels = tiny_sound_model(8)
    cache = NoteCache(encoded(tones(labels), bundle.codec), labels)
    cache.save(tmp_path / "notes.safetensors")
    loaded = load_notes(tmp_path / "notes.safetensors")
    assert torch.equal(loaded.latents, cache.latents) and torch.equal(loaded.labels, labels)
    with pytest.raises(NotesError, match="holds no notes"):
        load_notes(tmp_path / "nowhere.safetensors")
    broken = cache.latents.clone()
    broken[0, 0, 0] = float("inf")
    for latents in (broken, cache.latents[:4]):
        save_file({"latents": latents, "labels": labels}, tmp_path / "broken.safetensors")
        with pytest.raises(NotesError, match=r"broken\.safetensors is damaged"):
            load_notes(tmp_path / "broken.safetensors")


class Straight(torch.nn.Module):
    """Predicts one velocity for everything."""

    spec = BackboneSpec("straight", in_channels=4, out_channels=4, latent_ndim=2)

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity = torch.nn.Parameter(velocity)

    def forward(self, x: torch.Tensor, time: torch.Tensor, _: Conditioning) -> torch.Tensor:
        return self.velocity.expand_as(x)


def test_the_loss_is_the_error_of_the_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(3, 4, 5, generator=generator)
    eps = torch.randn(3, 4, 5, generator=generator)
    t = draw_logit_normal_times(3, generator)
    conditioning = Conditioning(torch.zeros(3, 1, 0), torch.zeros(3, 2), torch.zeros(3, 6))
    right = Denoiser(Straight(eps - x0), RectifiedFlow(), "flow")
    assert float(flow_loss(right, x0, conditioning, t, eps)) == pytest.approx(0, abs=1e-10)
    zero = Denoiser(Straight(torch.zeros(1)), RectifiedFlow(), "flow")
    expected = float((eps - x0).square().mean())
    assert float(flow_loss(zero, x0, conditioning, t, eps)) == pytest.approx(expected, rel=1e-5)


def test_times_lie_in_the_middle() -> None:
    t = draw_logit_normal_times(20_000, torch.Generator().manual_seed(0))
    assert float(t.min()) > 0 and float(t.max()) < 1
    assert float(t.median()) == pytest.approx(0.5, abs=0.01)
    # The 84.13th percentile of logits is 1.
    upper = float(t.quantile(0.8413))
    assert upper == pytest.approx(1 / (1 + 2.718281828**-1), abs=0.01)


def test_drawings_are_not_for_sounds(tmp_path: Path) -> None:
    part = load_part("nano-audio-teacher")
    assert len(part.find_drawings().concepts) == 0
    with pytest.raises(RecipeError, match="does not learn from drawings"):
        part.find_drawings(tmp_path)


@pytest.mark.slow
def test_a_teacher_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: str, iterations: int) -> tuple[list[float], torch.Tensor]:
        bundle, labels = tiny_sound_model()
        assert isinstance(bundle.codec, AudioCodec)
        notes = NoteCache(encoded(tones(labels), bundle.codec), labels)
        loop = LOOP.model_copy(
            update={"iterations": iterations, "batch_size": 32, "checkpoint_every": 20}
        )
        settings = TINY.model_copy(update={"loop": loop})
        run = RunFolder(tmp_path / folder, settings)
        losses: list[float] = []
        train_sound_teacher(
            bundle,
            sound_source(notes, bundle.text),
            run.settled(settings),
            run,
            on_iteration=lambda _, figures: losses.append(figures["loss"]),
        )
        return losses, bundle.denoiser.network.enter.weight.detach()

    losses, whole = train("whole", 80)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    first, _ = train("parts", 80)
    again, parts = train("parts", 80)
    assert first == losses and again == [] and torch.equal(whole, parts)
