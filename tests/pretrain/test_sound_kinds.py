"""Chords and drum hits beside notes: labels, captions, rendering, the cache, and training."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.sounds import LOOP
from twostep.cli import app
from twostep.evaluate.chords import name_chords
from twostep.media.audio import Sound, check_usable
from twostep.models.loading import load_bundle
from twostep.pretrain.chords import (
    CHORD_INSTRUMENTS,
    CHORDS,
    KEYS,
    chord_caption,
    is_held_out_chord,
    pitch_classes,
    random_chords,
    render_chords,
)
from twostep.pretrain.drum_judge import fit_drum_judge
from twostep.pretrain.drums import DRUMS, hit_caption, random_hits, render_hits
from twostep.pretrain.notes import INSTRUMENTS, Naming, NotesError, note_prompts
from twostep.pretrain.parts import load_part
from twostep.pretrain.sound_kinds import KINDS, Sounds, all_prompts, load_sounds
from twostep.pretrain.soundfont import NUM_SAMPLES, SOUNDFONTS

needs_soundfont = pytest.mark.skipif(
    not any(path.is_file() for path in SOUNDFONTS) or find_spec("tinysoundfont") is None,
    reason="there is no soundfont here, or nothing that plays it",
)


def named(prompt: str) -> set[str]:
    """The words of the vocabulary that a prompt names."""
    prompts = all_prompts()
    places = prompts.encode([prompt])[1][0].nonzero()[:, 0]
    return {prompts.vocabulary[place] for place in places}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a c major chord on a piano, soft", {"chord", "key-c", "major", "piano", "soft"}),
        ("a C major chord on a piano, soft", {"chord", "key-c", "major", "piano", "soft"}),
        ("an A3 minor chord on a guitar", {"chord", "key-a", "octave-3", "minor", "guitar"}),
        ("an a-natural minor chord", {"chord", "key-a", "minor"}),
        ("a Bb seventh chord, loud", {"chord", "key-a#", "seventh", "loud"}),
        ("a snare drum hit", {"drum", "snare"}),
        ("a crash cymbal, loud", {"drum", "crash", "loud"}),
        ("a kick drum hit, softly", {"drum", "kick", "soft"}),
        ("a low piano note, soft", {"piano", "low", "soft"}),
    ],
)
def test_prompts_name_what_they_say(prompt: str, words: set[str]) -> None:
    assert named(prompt) == words
    assert all_prompts().unknown_words(prompt) == []


def test_prompts_of_notes_alone_are_as_they_were() -> None:
    assert len(note_prompts().vocabulary) == 30
    assert all_prompts().vocabulary[:30] == note_prompts().vocabulary
    assert note_prompts().unknown_words("a c major chord") == ["c", "major", "chord"]


def test_every_twelfth_chord_is_held_out_and_never_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = random_chords(600, generator)
    assert not bool(is_held_out_chord(labels).any())
    assert bool(is_held_out_chord(random_chords(30, generator, held_out=True)).all())
    names = list(INSTRUMENTS)
    assert {names[number] for number in labels[:, 0].tolist()} == set(CHORD_INSTRUMENTS)
    assert {*labels[:, 2].tolist()} == {*range(len(CHORDS))}
    every = torch.tensor([(0, root, kind, 0) for kind in range(4) for root in range(48, 72)])
    # One root in every octave of every kind.
    assert is_held_out_chord(every).view(4, 2, 12).sum(dim=2).tolist() == [[1, 1]] * 4


def test_captions_say_what_there_is_and_sometimes_less() -> None:
    words = random.Random(0)
    assert chord_caption((0, 60, 0, 0), words) == "a C4 major chord on a piano, soft"
    assert hit_caption((1, 1), words) == "a snare drum hit, loud"
    chords = [chord_caption((0, 69, 1, 1), words, Naming()) for _ in range(300)]
    for each in chords:
        assert named(each) <= {"chord", "key-a", "octave-4", "minor", "piano", "loud"}
        # A kind without its root would be another chord's.
        assert ("minor" in each) == ("key-a" in named(each))
    assert 0.05 < chords.count("") / 300 < 0.15
    assert any("a-natural" in each for each in chords) and any("A4" in each for each in chords)
    hits = [hit_caption((1, 1), words, Naming()) for _ in range(300)]
    assert all(named(each) <= {"drum", "snare", "loud"} for each in hits)
    assert "a drum hit" in hits and "" in hits
    assert set(KEYS.values()) == {word for word in note_prompts().vocabulary if "key-" in word}


def test_a_cache_comes_back_is_captioned_by_kind_and_damage_is_told(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(6, 4, dtype=torch.uint8)
    for number, kind in enumerate(KINDS.values()):
        labels[2 * number : 2 * number + 2, : kind.columns] = kind.draw(2, generator)
    kinds = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.uint8)
    sounds = Sounds(torch.randn(6, 3, 2).half(), kinds, labels)
    sounds.save(tmp_path / "sounds.safetensors")
    loaded = load_sounds(tmp_path / "sounds.safetensors")
    for name in ("latents", "kinds", "labels"):
        assert torch.equal(getattr(loaded, name), getattr(sounds, name))
    latents, captions = loaded.draw(200, generator, random.Random(1))
    assert latents.shape == (200, 3, 2)
    for word in ("note", "chord", "drum hit"):
        assert 40 < sum(word in each for each in captions) < 80
    with pytest.raises(NotesError, match="holds no sounds"):
        load_sounds(tmp_path / "nowhere.safetensors")
    for change in ({"kinds": kinds + 1}, {"kinds": kinds[:3]}, {"latents": sounds.latents / 0}):
        tensors = {"latents": sounds.latents, "kinds": kinds, "labels": labels} | change
        save_file(tensors, tmp_path / "broken.safetensors")
        with pytest.raises(NotesError, match=r"broken\.safetensors is damaged"):
            load_sounds(tmp_path / "broken.safetensors")


def test_the_recipe_learns_from_all_kinds_and_has_their_words() -> None:
    settings = load_part("nano-audio-all-teacher").settings
    assert settings.sounds == "all"
    for prompt in settings.sample_prompts:
        assert all_prompts().unknown_words(prompt) == []
    assert load_part("nano-audio-teacher").settings.sounds == "notes"


@pytest.mark.slow
@needs_soundfont
def test_chords_and_hits_are_rendered_as_their_labels_say() -> None:
    generator = torch.Generator().manual_seed(3)
    chords = random_chords(40, generator)
    sounds = render_chords(chords, seed=1)
    assert sounds.shape == (40, NUM_SAMPLES)
    assert torch.equal(render_chords(chords[:2], seed=1), sounds[:2])
    wanted = [pitch_classes(root, kind) for _, root, kind, _ in chords.tolist()]
    every = {pitch_classes(root, kind) for root in range(12) for kind in range(len(CHORDS))}
    heard = name_chords(sounds, sorted(every, key=sorted))
    assert sum(a == b for a, b in zip(heard, wanted, strict=True)) >= 28
    learned, fresh = random_hits(240, generator), random_hits(40, generator)
    judge = fit_drum_judge(render_hits(learned, seed=1), learned[:, 0], list(DRUMS))
    struck = render_hits(fresh, seed=2)
    assert int((judge(struck) == fresh[:, 0]).sum()) >= 32
    for sound in (*sounds, *struck):
        check_usable(Sound(sound, 16_000))


@pytest.mark.slow
@needs_soundfont
def test_a_few_iterations_train_a_teacher_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"{name}={value}" for name, value in LOOP.model_dump(exclude_unset=True).items()]
    options = ["notes=12", "fitted_notes=72", "components=8", "width=32", "depth=2", "heads=2"]
    options += [f"loop.{each}".replace("fp32", '"fp32"') for each in small]
    arguments = [word for option in options for word in ("-o", option)]
    answer = CliRunner().invoke(
        app, ["pretrain", "nano-audio-all-teacher", "--out", "run", *arguments]
    )
    assert answer.exit_code == 0, answer.output
    teacher = load_bundle("run/model")
    assert teacher.text.unknown_words("a c major chord on a piano") == []
    assert len(load_sounds(Path("run/sounds.safetensors")).latents) == 12
