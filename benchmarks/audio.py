"""What the models of sounds play: right instrument, loudness and pitch, distance, diversity, speed.

    python benchmarks/audio.py --model runs/nano-audio/model --judge runs/nano-audio-judge \
        --out runs/audio.json

Notes of every instrument at pitches spread over the range, soft and loud in turn, by the teacher in
its own number of steps and in few, and by every student. `--control` names the model of a matched
run whose students are measured beside them. Real notes, rendered anew, are measured in the same
way: what no model exceeds. Diversity is that of eight seeds for each of ten prompts which leave the
pitch open within an octave. Seconds are those of one processor core, for one note at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from twostep.evaluate.pitch import sound_features
from twostep.evaluate.sound_judge import SoundJudge, load_sound_judge
from twostep.evaluate.sounds import measure_notes, note_diversity
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.media.audio import AudioCodec
from twostep.media.spectrogram import Spectrogram
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pretrain.notes import (
    INSTRUMENTS,
    LOWEST_PITCH,
    NUM_PITCHES,
    Labels,
    caption,
    is_held_out,
    render_notes,
)
from twostep.pretrain.sheets import write_sheet
from twostep.pretrain.sound_judge import SOUND_JUDGE_FILE

FEW_STEPS = (8, 4, 2, 1)
_BATCH = 30
_NUM_SEEDS = 8
_SEED = 5
_TIMED_NOTES = 5


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the teacher and its students")
    parser.add_argument("--control", help="folder of students by another recipe")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge's run")
    parser.add_argument("--count", type=int, default=180, help="notes of every row")
    parser.add_argument("--steps", type=int, nargs="*", default=FEW_STEPS, help="of the students")
    parser.add_argument(
        "--teacher-steps", type=int, nargs="*", default=(32, *FEW_STEPS), help="of the teacher"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/audio.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judge = load_sound_judge(arguments.judge / SOUND_JUDGE_FILE)
    labels = spread_labels(arguments.count)
    real = sound_features(render_notes(labels, seed=_SEED))
    rows: dict[str, dict[str, float | None]] = {}
    pictures = []
    again = render_notes(labels, seed=_SEED + 1)
    rows["real notes"] = figures_of(again, labels, judge, real)
    show(rows)
    measured = models(arguments.model, arguments.control, arguments.teacher_steps, arguments.steps)
    for name, bundle, steps in measured:
        rows[name] = measure(bundle, steps, labels, judge, real)
        pictures.append(sample_row(bundle, steps))
        show({name: rows[name]})
        write_sheet(torch.stack(pictures), arguments.out.with_suffix(".png"))
        with write_atomically(arguments.out) as file:
            file.write(json.dumps({"judge": dict(judge.accuracy), "rows": rows}, indent=1).encode())
    show(rows)


def models(
    model: str, control: str | None, teacher_steps: list[int], student_steps: list[int]
) -> Iterator[tuple[str, Bundle, int]]:
    """Yield what is measured: its name, the model, and its network's steps."""
    teacher = load_bundle(model)
    for steps in teacher_steps:
        yield f"teacher, {steps} steps", teacher, steps
    for name, folder in (("student", model), ("control", control)):
        students = resolve(folder).students if folder else {}
        for steps in student_steps:
            if steps in students:
                yield f"{name}, {steps} steps", load_bundle(folder or "", steps=steps), steps


def spread_labels(count: int) -> Labels:
    """Return labels of every instrument at pitches spread over the range, soft and loud in turn."""
    per_instrument = count // len(INSTRUMENTS)
    labels = []
    for instrument in range(len(INSTRUMENTS)):
        for number in range(per_instrument):
            # Instruments begin at different pitches, so that all pitches occur.
            place = (number * NUM_PITCHES // per_instrument + instrument) % NUM_PITCHES
            labels.append((instrument, LOWEST_PITCH + place, (number + instrument) % 2))
    return torch.tensor(labels, dtype=torch.uint8)


def measure(
    bundle: Bundle, steps: int, labels: Labels, judge: SoundJudge, real: Tensor
) -> dict[str, float | None]:
    """Return all figures of a model."""
    words = random.Random(_SEED)
    prompts = [caption(tuple(label), words) for label in labels.tolist()]
    sounds = play(bundle, steps, prompts, list(range(len(prompts))))
    open_prompts = [f"a middle {instrument} note" for instrument in INSTRUMENTS] * _NUM_SEEDS
    many = play(bundle, steps, open_prompts, list(range(1000, 1000 + len(open_prompts))))
    seconds, seconds_of_network = time_of(bundle, steps)
    return {
        **figures_of(sounds, labels, judge, real),
        "diversity": note_diversity(many, open_prompts),
        "seconds": seconds,
        "seconds_of_network": seconds_of_network,
    }


def figures_of(
    sounds: Tensor, labels: Labels, judge: SoundJudge, real: Tensor
) -> dict[str, float | None]:
    """Return the figures of notes, and what share of those with new pitches is right."""
    numbers = labels.long()
    log_mel = Spectrogram().log_mel(sounds)
    figures: dict[str, float | None] = dict(
        asdict(measure_notes(sounds, log_mel, numbers, judge, real))
    )
    new = is_held_out(labels)
    if bool(new.any()):
        of_new = measure_notes(sounds[new], log_mel[new], numbers[new], judge, real)
        figures["everything_new_pitches"] = of_new.everything
    return figures


@torch.no_grad()
def play(bundle: Bundle, steps: int, prompts: list[str], seeds: list[int]) -> Tensor:
    """Return the waveforms of prompts."""
    size = bundle.contract.sizes[0]
    sounds = []
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        guided = encode_prompts(bundle, prompts[part], size)
        latents = sample_prompts(bundle, guided, seeds[part], size, steps=steps)
        sounds.append(decode(bundle, latents))
    return torch.cat(sounds)


@torch.no_grad()
def time_of(bundle: Bundle, steps: int) -> tuple[float, float]:
    """Return the median seconds of one note, and what of them the network takes."""
    size = bundle.contract.sizes[0]
    whole, of_network = [], []
    for seed in range(_TIMED_NOTES + 1):
        begin = time.perf_counter()
        guided = encode_prompts(bundle, ["a piano note, C4"], size)
        latents = sample_prompts(bundle, guided, [seed], size, steps=steps)
        of_network.append(time.perf_counter() - begin)
        decode(bundle, latents)
        whole.append(time.perf_counter() - begin)
    # The first is slower, for memory is new.
    return sorted(whole[1:])[_TIMED_NOTES // 2], sorted(of_network[1:])[_TIMED_NOTES // 2]


@torch.no_grad()
def sample_row(bundle: Bundle, steps: int) -> Tensor:
    """Return spectrograms of one note of every instrument as pictures."""
    size = bundle.contract.sizes[0]
    prompts = [f"a {instrument} note, C4" for instrument in INSTRUMENTS]
    guided = encode_prompts(bundle, prompts, size)
    latents = sample_prompts(bundle, guided, list(range(len(prompts))), size, steps=steps)
    assert isinstance(bundle.codec, AudioCodec)
    return bundle.codec.preview(latents)


def show(rows: dict[str, dict[str, float | None]]) -> None:
    """Print figures as a table."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    table = Table("", *names)
    for row, figures in rows.items():
        values = [figures.get(name) for name in names]
        table.add_row(row, *("" if value is None else f"{value:.3f}" for value in values))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
