"""Few-step methods on one bench: one teacher, one start, one budget of time, rates tuned alike.

    python benchmarks/field.py --out runs/field --steps 2 --minutes 5   # 2.5 hours of one core
    python benchmarks/field.py --out runs/field --methods lcm,dmd2 --factors 1

Every method trains the shipped student of twice as many steps on, in float32, on the same examples,
at the first rate with seed 0 for so many minutes by the clock, and at other rates and seeds for as
many iterations. Who teaches is what the method's paper says: the first teacher with its guidance,
or, where landings on a grid are learnt, the student that is trained on, as in a progressive chain.
The methods whose names end in `-walks` learn from `--walks` whole sampling trajectories of the
guided teacher in the place of that, which are sampled once, before, and not counted in the time of
the trainings.

Each method is trained with three rates, those below times 1, 3 and 0.33. All are measured on open
and on complete prompts; of a method's three, the one whose pictures are nearest to the teacher's
fresh ones on open prompts counts, and `table.md` says which. What is finished stays; the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from adversary import BOTH, CAPTIONS, RELATIVISTIC, DeviceSource, flatten, save_grid
from arms import print_progress, run_apart, train_and_count
from safetensors.torch import save

from twostep.data.drawn import WalkedSource, walked_by_teacher
from twostep.distill.chain import prepared_stages
from twostep.distill.pairs import Source
from twostep.distill.recipe import DistillRecipe
from twostep.distill.roles import weights_of
from twostep.files import write_atomically
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pretrain.latents import LatentCache, LatentSource, builtin
from twostep.reports.benchmark import Bench, draw_student
from twostep.training.halves import halved
from twostep.training.run_folder import RunFolder

FACTORS = (1.0, 3.0, 0.33)
"""Of the learning rates of a recipe, the student's and all others."""

WARM: dict[str, Any] = {
    "method": {"name": "regression"},
    "learning_rate": 1e-4,
    "taught_by": "start",
    "share": 0.25,
}
"""What the adversarial methods begin with: a quarter of their time."""

OURS: dict[str, Any] = {**BOTH, "real": "data", "discriminator_warmup": 20}
PAIRS: dict[str, Any] = {**RELATIVISTIC, "discriminator_warmup": 20}
"""Of landings, as in a progressive chain: the student's beside the one that it should make."""
WALKED: dict[str, Any] = {
    "method": {"name": "regression", "walks": True},
    "learning_rate": 1e-4,
    "share": 0.25,
}
"""As `WARM`, but taught by the teacher's whole walks."""

WALKED_PAIRS: dict[str, Any] = {**PAIRS, "walks": True, "regression_weight": 10.0}
"""Of landings on the teacher's walks: what is real is what the teacher draws."""

LCM: dict[str, Any] = {
    "method": {"name": "lcm", "least_guidance": 2.0},
    "learning_rate": 1e-4,
    "guidance": 5.0,
}


def lightning(objective: str, share: float) -> dict[str, Any]:
    """Return a stage by the paper to the letter."""
    return {
        "method": {
            "name": "lightning",
            "objective": objective,
            "discriminator_learning_rate": 1e-4,
        },
        "learning_rate": 3e-5,
        "taught_by": "start",
        "share": share,
    }


# At pure noise a student that predicts eps says an x0 that moves 15 times as far as its output, so
# adversaries of x0 need slow students: with 5e-5 `add` and `ladd` collapsed in 100 iterations.
METHODS: dict[str, list[dict[str, Any]]] = {
    "regression": [{**WARM, "share": 1.0}],
    "lightning": [WARM, lightning("conditional", 0.4), lightning("unconditional", 0.35)],
    "adversarial": [WARM, {"method": OURS, "learning_rate": 5e-5, "share": 0.75}],
    "adversarial-landings": [
        WARM,
        {"method": PAIRS, "learning_rate": 5e-5, "taught_by": "start", "share": 0.75},
    ],
    "regression-walks": [{**WALKED, "share": 1.0}],
    "adversarial-walks": [
        WALKED,
        {"method": WALKED_PAIRS, "learning_rate": 5e-5, "share": 0.75},
    ],
    "lcm": [LCM],
    "lcm-lora": [{**LCM, "lora_rank": 16}],
    "add": [
        {
            "method": {
                "name": "add",
                "features": "judge",
                "heads_learning_rate": 1e-3,
                "heads_warmup": 20,
            },
            "learning_rate": 1e-5,
            "guidance": 3.0,
        }
    ],
    "ladd": [
        {
            "method": {
                "name": "ladd",
                "heads_learning_rate": 1e-3,
                "low_noise_iterations": 50,
                "heads_warmup": 20,
            },
            "learning_rate": 1e-5,
        }
    ],
    "dmd2": [
        {
            "method": {"name": "dmd2", "fake_learning_rate": 1e-4},
            "learning_rate": 3e-5,
            "guidance": 3.0,
        }
    ],
}
"""Stages of every method, each with its share of the time, and who teaches if it is the student
that is trained on, whose landings are learnt then."""

WALK = 16
"""Steps of the teacher's walks."""

_OURS = ("share", "taught_by")
"""What is said of stages here, and no setting of a recipe."""

_RATES = (
    "learning_rate",
    "discriminator_learning_rate",
    "head_learning_rate",
    "heads_learning_rate",
    "fake_learning_rate",
    "fake_score_learning_rate",
)
_NUM_SHOWN = 48


@dataclass(frozen=True)
class Job:
    """One training."""

    method: str
    steps: int
    factor: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its figures."""
        return f"{self.method}-{self.steps}step-x{self.factor:.2g}-seed{self.seed}"


def report_path(job: Job, out: Path) -> Path:
    """Return where the figures of a training stand."""
    return out / "reports" / f"{job.name}.json"


def make_recipe(job: Job, options: argparse.Namespace) -> DistillRecipe:
    """Return the stages of a method.

    Each ends by the clock, or after as many iterations as the clock gave to the first rate with
    seed 0, so that the other rates and seeds may be trained while the machine is busy.
    """
    first = report_path(replace(job, factor=1.0, seed=0), options.out)
    known = json.loads(first.read_text())["iterations"] if first.exists() else []
    stages = []
    for position, given in enumerate(METHODS[job.method]):
        values: dict[str, Any] = {key: given[key] for key in given if key not in _OURS}
        method = dict(values["method"])
        for key in _RATES:
            if key in method:
                method[key] *= job.factor
        if method.get("walks"):
            values |= {"teacher": "first", "teacher_steps": WALK}
        elif given.get("taught_by") == "start":
            values |= {"teacher": "first", "teacher_steps": 2 * job.steps}
        elif method["name"] == "adversarial":
            values |= {"teacher": "first", "teacher_steps": 32}
        stages.append(
            values
            | {
                "method": method,
                "learning_rate": values["learning_rate"] * job.factor,
                "student_steps": job.steps,
                "iterations": known[position] if known else 1_000_000,
                "limit_seconds": None if known else 60 * options.minutes * given.get("share", 1.0),
                "batch_size": options.batch,
                "precision": "fp32",
                "warmup_iterations": 20,
                "ema_decay": 0.99,
                "log_every": 10,
                "checkpoint_every": 1_000_000,
                "seed": job.seed,
            }
        )
    return DistillRecipe.model_validate(
        {"model": "nano", "data": "builtin", "sample_prompts": ["a fruit"], "stages": stages}
    )


def walks(cache: LatentCache, teacher: Bundle, options: argparse.Namespace) -> WalkedSource:
    """Return the teacher's walks to captions as the other methods' examples have them."""
    words = Random(8)
    order = torch.randperm(len(cache.latents), generator=torch.Generator().manual_seed(8))
    captions = [cache.caption(int(row), words) for row in order.repeat(2)]
    # One in twenty is empty, which is no prompt; as many as are left are taken in turns.
    captions = [each for each in captions if each][: options.walks]
    path = options.out / "walked-prompts.txt"
    with write_atomically(path) as file:
        file.write("\n".join(captions).encode())
    return walked_by_teacher(
        teacher,
        options.out,
        print_progress,
        prompts=str(path),
        count=options.walks,
        steps=WALK,
        sampler="dpmpp-2m",
        batch_size=64,
    )


def run(job: Job, options: argparse.Namespace) -> None:
    """Train one student and measure it."""
    began = time.monotonic()
    teacher = load_bundle("nano")
    made = builtin(teacher, options.out, lambda *_: None, variants=16)
    assert isinstance(made, LatentSource)
    cache = replace(made.latents, omission=replace(CAPTIONS, background=0.5))
    source: Source
    if any(given["method"].get("walks") for given in METHODS[job.method]):
        source = walks(cache, teacher, options)
    else:
        source = DeviceSource.of(cache, teacher, 4)
    start = load_bundle("nano", steps=2 * job.steps).denoiser
    recipe = make_recipe(job, options)
    folder = options.out / job.name
    num_iterations = []
    prepared_ones = prepared_stages(recipe, teacher, start=start.standalone())
    for given, prepared in zip(METHODS[job.method], prepared_ones, strict=True):
        stage = prepared.stage
        done = train_and_count(
            stage,
            source,
            teacher=start if given.get("taught_by") == "start" else prepared.teacher,
            student=prepared.student,
            folder=RunFolder(folder, recipe),
            codec=teacher.codec,
            continues=prepared.continues,
            is_continued=prepared.is_continued,
        )
        num_iterations.append(done)
        student = prepared.student
        changes = stage.make_method().describe(start)
    seconds = time.monotonic() - began
    with write_atomically(folder / "student.safetensors") as file:
        file.write(save(halved(dict(weights_of(student).state_dict()))))
    bench = Bench.of(
        teacher,
        num_pictures=options.pictures,
        batch_size=32,
        cache=options.out / "teacher-pictures",
    )
    drawn = draw_student(
        student,
        replace(bench, cache=None),
        steps=job.steps,
        times=changes.times_from_noise(job.steps, start.schedule),
        sampler=changes.sampler,
    )
    for name, pictures in drawn.items():
        save_grid(pictures[:_NUM_SHOWN], folder / f"{name}.png")
    values = {name: flatten(bench.report(pictures, name)) for name, pictures in drawn.items()}
    found = {
        "job": vars(job),
        "minutes": options.minutes,
        "iterations": num_iterations,
        "seconds": round(seconds),
        **values,
    }
    with write_atomically(report_path(job, options.out)) as file:
        file.write(json.dumps(found, indent=2).encode())


_COLUMNS = {
    "off palette, %": ("off_palette", 100),
    "backgrounds": ("background_to_reference.value", 1),
    "fine detail, %": ("high_pass_ratio.value", 100),
    "Frechet": ("frechet_to_reference.value", 1),
    "concept, %": ("concept", 100),
    "style, %": ("style", 100),
    "loyalty, %": ("loyalty.value", 100),
    "diversity": ("feature_diversity", 1),
}


def write_table(out: Path) -> None:
    """Write a line for every method: its best rate, and what the other rates reached."""
    found = [json.loads(path.read_text()) for path in sorted((out / "reports").glob("*.json"))]
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for each in found:
        job = each["job"]
        groups.setdefault((job["method"], job["steps"], job["seed"]), []).append(each)
    lines = []
    for name in ("open", "complete"):
        head = [
            "method",
            "steps",
            "seed",
            "rates times",
            "iterations",
            *_COLUMNS,
            "Frechet by rate",
        ]
        lines += [f"{name} prompts", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for (method, steps, seed), group in sorted(groups.items()):
            best = min(group, key=_distance)
            cells = [method, str(steps), str(seed), f"{best['job']['factor']:.2g}"]
            cells.append(" + ".join(map(str, best["iterations"])))
            for key, factor in _COLUMNS.values():
                value = _figure(best[name], key)
                cells.append("" if value is None else f"{value * factor:.3g}")
            others = sorted(group, key=lambda each: each["job"]["factor"])
            cells.append(", ".join(f"{e['job']['factor']:.2g}: {_distance(e):.3g}" for e in others))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    (out / "table.md").write_text("\n".join(lines))


def _figure(values: dict[str, float], key: str) -> float | None:
    """Return a figure, or the share of a score; None where nothing was asked."""
    if key in values:
        return values[key]
    num_asked = values.get(f"{key}.num_asked")
    return values[f"{key}.num_right"] / num_asked if num_asked else None


def _distance(found: dict[str, Any]) -> float:
    return float(found["open"]["frechet_to_reference.value"])


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield all trainings that were asked for, the same rates of all methods together."""
    for seed in map(int, options.seeds.split(",")):
        for factor in map(float, options.factors.split(",")):
            for steps in map(int, options.steps.split(",")):
                for method in options.methods.split(","):
                    yield Job(method, steps, factor, seed)


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", default="2")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--factors", default=",".join(f"{each:.4g}" for each in FACTORS))
    parser.add_argument(
        "--minutes", type=float, default=5, help="of every training at the first rate"
    )
    parser.add_argument("--walks", type=int, default=4096, help="walks of the teacher")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=256, help="of each set of prompts")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.job is not None:
        method, steps, factor, seed = options.job.split(":")
        run(Job(method, int(steps), float(factor), int(seed)), options)
        return
    for job in jobs(options):
        if report_path(job, options.out).exists():
            continue
        words = f"{job.method}:{job.steps}:{job.factor}:{job.seed}"
        run_apart(job.name, words)
        write_table(options.out)


if __name__ == "__main__":
    main()
