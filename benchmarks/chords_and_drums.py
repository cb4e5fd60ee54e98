"""Chords and drum hits: how right their judges are on real ones, and a model by these judges.

    python benchmarks/chords_and_drums.py --hits FOLDER --model runs/nano-audio-all-teacher/model

Real chords and hits are rendered anew, hits by which the drum judge is measured with another seed
than those it is fitted to. `--hits` is a folder with recordings whose names begin with a drum's and
an underscore, as snare_1.flac; they are from no soundfont. `--model` is played in its own number of
steps.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from twostep.evaluate.chords import name_chords
from twostep.media.audio import read_sound
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pretrain.chords import (
    CHORDS,
    chord_caption,
    pitch_classes,
    random_chords,
    render_chords,
)
from twostep.pretrain.drum_judge import DrumJudge, fit_drum_judge
from twostep.pretrain.drums import DRUMS, hit_caption, random_hits, render_hits
from twostep.pretrain.soundfont import NUM_SAMPLES, RATE

_BATCH = 30
_FITTED_SEED, _SEED = 1, 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="chords, and hits, of every row")
    parser.add_argument("--fitted", type=int, default=800, help="hits that the judge is fitted to")
    parser.add_argument("--hits", type=Path, help="a folder with recordings of hits")
    parser.add_argument("--model", help="a model of all kinds of sounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(_SEED)
    chords = random_chords(arguments.count, generator)
    hits = random_hits(arguments.count, generator)
    learned = random_hits(arguments.fitted, torch.Generator().manual_seed(_FITTED_SEED))
    judge = fit_drum_judge(render_hits(learned, _FITTED_SEED), learned[:, 0], list(DRUMS))
    print(f"real chords: {share_of_chords(render_chords(chords, _SEED), chords):.3f}")
    print(f"real hits: {share_of_hits(judge, render_hits(hits, _SEED), hits[:, 0]):.3f}")
    if arguments.hits is not None:
        show_recordings(judge, arguments.hits)
    if arguments.model is not None:
        show_model(load_bundle(arguments.model), chords, hits, judge)


def share_of_chords(sounds: Tensor, labels: Tensor) -> float:
    """Return the share of chords in which the pitch classes of their labels are heard."""
    wanted = [pitch_classes(root, kind) for _, root, kind, _ in labels.tolist()]
    kinds = range(len(CHORDS))
    every = {pitch_classes(root, kind) for root in range(12) for kind in kinds}
    pairs = zip(name_chords(sounds, sorted(every, key=sorted)), wanted, strict=True)
    return sum(heard == right for heard, right in pairs) / len(wanted)


def share_of_hits(judge: DrumJudge, sounds: Tensor, drums: Tensor) -> float:
    """Return the share of hits that are named rightly."""
    return float((judge(sounds) == drums).float().mean())


def show_recordings(judge: DrumJudge, folder: Path) -> None:
    """Print what share of a folder's recordings is named rightly, by drums."""
    right, total = Counter[str](), Counter[str]()
    for path in sorted(folder.iterdir()):
        name = path.name.partition("_")[0]
        if name in DRUMS:
            total[name] += 1
            right[name] += judge.drums[int(judge(recording(path)))] == name
    print(f"recorded hits: {sum(right.values())} of {sum(total.values())}")
    for name, count in total.items():
        print(f"  {name}: {right[name]} of {count}")


def recording(path: Path) -> Tensor:
    """Return the beginning of a recording at the rate of the judge, as one row."""
    sound, _ = read_sound(path)
    count = round(len(sound.samples) * RATE / sound.rate)
    spectrum = torch.fft.rfft(sound.samples)[: count // 2 + 1]
    samples = torch.fft.irfft(spectrum, n=count) * (count / len(sound.samples))
    row = torch.zeros(1, NUM_SAMPLES)
    row[0, : min(count, NUM_SAMPLES)] = samples[:NUM_SAMPLES]
    return row


def show_model(bundle: Bundle, chords: Tensor, hits: Tensor, judge: DrumJudge) -> None:
    """Print what share of a model's chords and hits is right."""
    words = random.Random(_SEED)
    played = play(bundle, [chord_caption(tuple(label), words) for label in chords.tolist()])
    print(f"chords of {bundle.contract.name}: {share_of_chords(played, chords):.3f}")
    played = play(bundle, [hit_caption(tuple(label), words) for label in hits.tolist()])
    print(f"hits of {bundle.contract.name}: {share_of_hits(judge, played, hits[:, 0]):.3f}")


@torch.no_grad()
def play(bundle: Bundle, prompts: list[str]) -> Tensor:
    """Return the waveforms of prompts, of seeds from 0 up."""
    size = bundle.contract.sizes[0]
    sounds = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        seeds = list(range(start, start + len(part)))
        latents = sample_prompts(
            bundle, encode_prompts(bundle, part, size), seeds, size, steps=bundle.contract.steps
        )
        sounds.append(decode(bundle, latents))
    return torch.cat(sounds)


if __name__ == "__main__":
    main()
