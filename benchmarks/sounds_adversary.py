"""What settings of the adversary are worth for sounds: arms of one start, one teacher and one time.

    twostep pretrain nano-audio-judge --out runs/nano-audio-judge
    python benchmarks/sounds_adversary.py --judge runs/nano-audio-judge \\
        --out runs/sounds-adversary --seeds 0,1,2 --minutes 3

Every arm trains a shipped student of nano-audio on, for so many minutes of one processor core,
everything its own networks and the teacher compute included; the shipped student of twice as many
steps teaches. `relativistic` compares pairs, `wrong-prompts` shows the discriminator also real
notes under another note's prompt, and `arc` takes rendered notes for real as well (both of arXiv
2505.08175); `both` adds the mean squared error.

Measured are the notes of `benchmarks/audio.py`. What is finished stays; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from arms import run_apart, train_and_count
from audio import figures_of, play, spread_labels
from safetensors.torch import save

from twostep.distill.chain import prepared_stages
from twostep.distill.recipe import DistillRecipe
from twostep.distill.roles import weights_of
from twostep.evaluate.pitch import sound_features
from twostep.evaluate.sound_judge import load_sound_judge
from twostep.evaluate.sounds import note_diversity
from twostep.files import write_atomically
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pretrain.notes import INSTRUMENTS, caption, render_notes, rendered
from twostep.pretrain.sound_judge import SOUND_JUDGE_FILE
from twostep.training.run_folder import RunFolder

MODEL = "nano-audio"
NUM_SEEDS = 8
SEED = 5

GAME: dict[str, Any] = {
    "name": "adversarial",
    "objective": "unconditional",
    "discriminator_learning_rate": 2e-4,
    "head_learning_rate": 1e-3,
    "discriminator_warmup": 20,
}
ARMS: dict[str, dict[str, Any]] = {
    "regression": {"method": {"name": "regression"}, "learning_rate": 1e-4},
    "non-saturating": {"method": {**GAME, "loss": "non-saturating"}},
    "relativistic": {"method": GAME},
    "wrong-prompts": {"method": {**GAME, "mismatched_weight": 1.0}},
    "arc": {"method": {**GAME, "mismatched_weight": 1.0, "real": "data"}},
    "both": {"method": {**GAME, "regression_weight": 100.0}},
}


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its figures."""
        return f"{self.arm}-{self.steps}step-seed{self.seed}"


def make_recipe(job: Job, options: argparse.Namespace) -> DistillRecipe:
    """Return the one stage of a training, which ends by the clock."""
    arm = ARMS[job.arm]
    teaches = arm["method"].get("real") != "data"
    stage = {
        "student_steps": job.steps,
        "teacher": "first",
        "teacher_steps": 2 * job.steps if teaches else None,
        "iterations": 1_000_000,
        "limit_seconds": 60 * options.minutes,
        "batch_size": options.batch,
        "learning_rate": options.rate,
        "precision": "fp32",
        "warmup_iterations": 20,
        "ema_decay": 0.99,
        "decay_share": 0.5,
        "log_every": 20,
        "checkpoint_every": 1_000_000,
        "seed": job.seed,
        **arm,
    }
    return DistillRecipe.model_validate(
        {"model": MODEL, "data": "builtin", "sample_prompts": ["a note"], "stages": [stage]}
    )


def run(job: Job, options: argparse.Namespace) -> None:
    """Train one student and measure it."""
    torch.set_num_threads(1)
    teacher = load_bundle(MODEL)
    start = load_bundle(MODEL, steps=job.steps)
    source = rendered(teacher, options.out, lambda *_: None, count=options.notes)
    recipe = make_recipe(job, options)
    (prepared,) = prepared_stages(recipe, teacher, start=start.denoiser.standalone())
    folder = options.out / job.name
    began = time.monotonic()
    done = train_and_count(
        prepared.stage,
        source,
        teacher=load_bundle(MODEL, steps=2 * job.steps).denoiser.standalone(),
        student=prepared.student,
        folder=RunFolder(folder, recipe),
        codec=teacher.codec,
    )
    seconds = round(time.monotonic() - began)
    with write_atomically(folder / "student.safetensors") as file:
        file.write(save(dict(weights_of(prepared.student).state_dict())))
    student = replace(start, denoiser=prepared.student)
    report(job.name, student, options, job=asdict(job), iterations=done, trained=seconds)


def report(name: str, bundle: Bundle, options: argparse.Namespace, **beside: Any) -> None:
    """Play the notes of a student, measure them, and write the figures."""
    judge = load_sound_judge(options.judge / SOUND_JUDGE_FILE)
    labels = spread_labels(options.count)
    real = sound_features(render_notes(labels, seed=SEED))
    words = Random(SEED)
    prompts = [caption(tuple(label), words) for label in labels.tolist()]
    steps = bundle.contract.steps
    sounds = play(bundle, steps, prompts, list(range(len(prompts))))
    open_prompts = [f"a middle {instrument} note" for instrument in INSTRUMENTS] * NUM_SEEDS
    many = play(bundle, steps, open_prompts, list(range(1000, 1000 + len(open_prompts))))
    found = {
        **figures_of(sounds, labels, judge, real),
        "diversity": note_diversity(many, open_prompts),
        **beside,
    }
    with write_atomically(report_path(name, options.out)) as file:
        file.write(json.dumps(found, indent=2).encode())
    write_table(options.out)


def report_path(name: str, out: Path) -> Path:
    """Return where the figures of a training stand."""
    return out / "reports" / f"{name}.json"


_COLUMNS = {"everything": 100, "instrument": 100, "loudness": 100, "pitch": 100, "distance": 1}
_COLUMNS |= {"diversity": 1}


def write_table(out: Path) -> None:
    """Write a line for every arm, the mean, lowest and highest of its seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "reports").glob("*.json")):
        name = path.stem.rpartition("-seed")[0] or path.stem
        groups.setdefault(name, []).append(json.loads(path.read_text()))
    lines = [f"| arm | iterations | {' | '.join(_COLUMNS)} |", f"|{'---|' * (len(_COLUMNS) + 2)}"]
    for name, found in groups.items():
        cells = [name, ", ".join(str(each.get("iterations", "")) for each in found)]
        for key, factor in _COLUMNS.items():
            values = [factor * each[key] for each in found]
            cell = f"{mean(values):.4g}"
            if len(values) > 1:
                cell += f" ({min(values):.4g} to {max(values):.4g})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge's run")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", default="2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=3, help="of every training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-5, help="of students in a game")
    parser.add_argument("--notes", type=int, default=4000, help="that are rendered to learn from")
    parser.add_argument("--count", type=int, default=180, help="notes to measure on")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    (options.out / "reports").mkdir(parents=True, exist_ok=True)
    if options.job is not None:
        arm, steps, seed = options.job.split(":")
        if arm == "shipped":
            report(f"shipped-{steps}step", load_bundle(MODEL, steps=int(steps)), options)
        else:
            run(Job(arm, int(steps), int(seed)), options)
        return
    jobs = [f"shipped:{steps}:0" for steps in options.steps.split(",")]
    for seed in options.seeds.split(","):
        for steps in options.steps.split(","):
            jobs += [f"{arm}:{steps}:{seed}" for arm in options.arms.split(",")]
    for job in jobs:
        arm, steps, seed = job.split(":")
        name = f"shipped-{steps}step" if arm == "shipped" else Job(arm, int(steps), int(seed)).name
        if report_path(name, options.out).exists():
            continue
        run_apart(name, job)


if __name__ == "__main__":
    main()
