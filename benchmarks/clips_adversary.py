"""Does a discriminator do for clips what regression cannot? Arms of one start, teacher and time.

    python benchmarks/clips_adversary.py --out runs/clips-adversary --prepare
    python benchmarks/clips_adversary.py --out runs/clips-adversary --arms regression,both \\
        --seeds 0,1,2 --minutes 15

Every arm trains nano-motion's 2-step student on, a LoRA on the motion module, for so many minutes
of one processor core, everything its own networks and the teacher compute included.

With `--data walks` all learn steps of the teacher's whole walks (16 guided steps of DPM-Solver++),
which `--prepare` makes; the teacher is not asked again. With `drawn` the shipped 4-step student
teaches, as in a chain, from clips that it drew itself (as arXiv 2403.12706 does), and with
`drawings` from moving drawings.

    python benchmarks/clips_adversary.py --out runs/clips-two-models --arms regression \
        --data walks-of-two --further examples/openmoji \
        --further-judge examples/openmoji/judge.safetensors

`--further` names another picture model. Students are measured on it as well, and with
`walks-of-two` every second walk is that model's, so that they learn from both, as
AnimateDiff-Lightning does: an iteration's gradient is the mean over the models of its clips.

Measured are the same prompts as `benchmarks/clips.py` has, against the teacher's clips of the same
noise. What is finished stays; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import print_progress, run_apart, train_and_count
from clips import Row, Wish, drawn, line, on_bases, save_moving, save_strips, wishes
from safetensors.torch import load_file, save, save_file

from twostep.data.drawn import FIRST_SEED, DrawnSource, WalkedSource, latents_of, planned_items
from twostep.distill.chain import prepared_stages
from twostep.distill.pairs import Source
from twostep.distill.recipe import DistillRecipe
from twostep.distill.roles import file_weights
from twostep.evaluate.clip_scores import score_clips
from twostep.evaluate.judge import BUILT_IN, load_judge
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.motion import read_settings
from twostep.pretrain.clips import MovingDrawings, moving_drawings, walked_drawings
from twostep.pretrain.drawings import load_drawings
from twostep.training.run_folder import RunFolder

MODEL = "nano-motion"
STEPS = 2
WALK = 16
"""Steps of the teacher's walks."""

GUIDANCE = 3.0

OF_TWO = "walks-of-two"
DATA = ("walks", OF_TWO, "drawn", "drawings")

TIMES = (3.0, 1.0, 3.0, 1.0)
"""How often each trained time is drawn: more often those at which two steps begin."""

GAME: dict[str, Any] = {
    "name": "adversarial",
    "objective": "unconditional",
    "time_weights": TIMES,
    "discriminator_learning_rate": 1e-4,
    "head_learning_rate": 1e-3,
    "discriminator_warmup": 15,
}
ARMS: dict[str, dict[str, Any]] = {
    "regression": {
        "method": {"name": "regression", "time_weights": TIMES},
        "learning_rate": 5e-4,
    },
    "both": {"method": {**GAME, "regression_weight": 300.0}, "learning_rate": 5e-4},
    "adversarial": {"method": GAME, "learning_rate": 1e-4},
    "lightning": {
        "method": {
            "name": "lightning",
            "objective": "conditional",
            "time_weights": TIMES,
            "discriminator_learning_rate": 2e-4,
        },
        "learning_rate": 1e-4,
    },
}


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    data: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its figures."""
        return f"{self.arm}-{self.data}-seed{self.seed}"

    @property
    def is_walked(self) -> bool:
        """Whether steps of whole walks are learnt."""
        return self.data.startswith("walks")


@dataclass(frozen=True)
class Measured:
    """What students are measured on.

    Attributes:
        suffix: of the names of their figures.
        reference: name of the file that keeps the teacher's clips.
        model: of clips, on one picture model.
        asked: the prompts.
        judge: of what its pictures show.
    """

    suffix: str
    reference: str
    model: str
    asked: Sequence[Wish]
    judge: Path


def measured_on(options: argparse.Namespace) -> list[Measured]:
    """Return the model's own picture model, and then the further one if there is one."""
    found = [Measured("", "reference", MODEL, wishes(options.count), BUILT_IN)]
    if options.further:
        bases = [str(options.further.resolve())]
        model = on_bases(MODEL, bases, options.out / "on-further")
        asked = wishes(options.further_count, with_style=False)
        found.append(Measured("-further", "further", model, asked, options.further_judge))
    return found


def teaching_model(options: argparse.Namespace) -> str:
    """Return the model that teaches, for walks of two with the further picture model in it."""
    if options.data != OF_TWO:
        return MODEL
    own = read_settings(resolve(MODEL).path).bases
    bases = [*own, str(options.further.resolve())]
    return on_bases(MODEL, bases, options.out / "two-models")


def reference(on: Measured, out: Path) -> torch.Tensor:
    """Return the first teacher's clips, from the folder if they are there."""
    path = out / f"{on.reference}-{len(on.asked)}.safetensors"
    if not path.exists():
        teacher = load_bundle(on.model)
        row = Row("teacher", teacher, steps=12, sampler="dpmpp-2m", guidance=GUIDANCE)
        clips, _ = drawn(row, on.asked)
        save_file({"clips": clips}, path)
    return load_file(path)["clips"]


def drawn_source(out: Path, teacher: Bundle, count: int) -> DrawnSource:
    """Return clips that the 4-step student drew, from the folder if they are there."""
    prompts = MovingDrawings(load_drawings(), teacher).captions(count, FIRST_SEED)
    student = load_bundle(MODEL, steps=2 * STEPS)
    items = planned_items(prompts, count, variants=1)
    return latents_of(student, items, out, print_progress, steps=2 * STEPS)


def walked_source(options: argparse.Namespace, teacher: Bundle) -> WalkedSource:
    """Return walks of the teacher, from the folder if they are there."""
    folder = options.out / "of-two" if options.data == OF_TWO else options.out
    return walked_drawings(teacher, folder, print_progress, count=options.walks)


def source_of(job: Job, options: argparse.Namespace, teacher: Bundle) -> Source:
    """Return the examples of a training."""
    if job.is_walked:
        return walked_source(options, teacher)
    if job.data == "drawn":
        return drawn_source(options.out, teacher, options.drawn)
    return moving_drawings(teacher, options.out, lambda *_: None)


def make_recipe(job: Job, options: argparse.Namespace, start: Path | None = None) -> DistillRecipe:
    """Return the one stage of a training, which ends by the clock, from the LoRA `start`."""
    shipped = resolve(MODEL).path / "students" / f"nano-motion_{STEPS}step_lora.safetensors"
    start = start or options.start or shipped
    arm = ARMS[job.arm]
    stage = {
        "student_steps": STEPS,
        "teacher": "first",
        "teacher_steps": WALK if job.is_walked else 2 * STEPS,
        "iterations": options.iterations or 1_000_000,
        "limit_seconds": None if options.iterations else 60 * options.minutes,
        "batch_size": options.batch,
        "lora_rank": 32,
        "lora_start": str(start),
        "precision": "fp32",
        "warmup_iterations": 10,
        "ema_decay": 0.98,
        "decay_share": 0.5,
        "log_every": 5,
        "checkpoint_every": 1_000_000,
        "checkpoint_seconds": 300,
        "seed": job.seed,
        **arm,
        "method": {**arm["method"], "walks": job.is_walked},
    }
    return DistillRecipe.model_validate(
        {"model": MODEL, "data": "builtin", "sample_prompts": ["a fox"], "stages": [stage]}
    )


def run(job: Job, options: argparse.Namespace) -> None:
    """Train one student and measure it."""
    torch.set_num_threads(1)
    began = time.monotonic()
    model = teaching_model(options)
    teacher = load_bundle(model)
    recipe = make_recipe(job, options)
    folder = options.out / job.name
    (prepared,) = prepared_stages(recipe, teacher.as_teacher())
    done = train_and_count(
        prepared.stage,
        source_of(job, options, teacher),
        teacher=load_bundle(model, steps=2 * STEPS).denoiser.standalone(),
        student=prepared.student,
        folder=RunFolder(folder, recipe),
        codec=teacher.codec,
    )
    seconds = time.monotonic() - began
    weights = folder / "student.safetensors"
    with write_atomically(weights) as file:
        file.write(save(file_weights(prepared.student)))
    shipped = load_bundle(MODEL, steps=STEPS).contract
    student = replace(teacher, denoiser=prepared.student, contract=shipped)
    beside = {"job": asdict(job), "iterations": done, "trained": round(seconds)}
    own, *others = measured_on(options)
    report(job.name, student, own, options.out, **beside)
    for on in others:
        other = load_bundle(on.model)
        (prepared,) = prepared_stages(make_recipe(job, options, weights), other.as_teacher())
        student = replace(other, denoiser=prepared.student, contract=shipped)
        report(job.name, student, on, options.out, **beside)


def report(name: str, bundle: Bundle, on: Measured, out: Path, **beside: Any) -> None:
    """Draw the clips of a model, measure them, and write figures and sheets."""
    name += on.suffix
    truth = reference(on, out)
    clips, seconds = drawn(Row(name, bundle), on.asked)
    wanted = [wish.asked for wish in on.asked]
    found = score_clips(clips, wanted, load_judge(on.judge), reference=truth)
    print(line(name, found, seconds), flush=True)
    folder = out / "clips"
    folder.mkdir(exist_ok=True)
    save_strips(clips, folder / f"{name}.png")
    save_moving(clips, folder / f"{name}.webp", bundle.codec.frames_per_second)
    save_file({"clips": clips.half()}, folder / f"{name}.safetensors")
    with write_atomically(report_path(name, out)) as file:
        file.write(json.dumps({**found.to_dict(), **beside}, indent=2).encode())


def report_path(name: str, out: Path) -> Path:
    """Return where the figures of a training stand."""
    return out / f"{name}.json"


def prepare(options: argparse.Namespace) -> None:
    """Measure what ships, and compute what the arms share."""
    torch.set_num_threads(1)
    walked_source(options, load_bundle(teaching_model(options)))
    for on in measured_on(options):
        for steps in resolve(MODEL).students:
            report(f"shipped-{steps}", load_bundle(on.model, steps=steps), on, options.out)


def main() -> None:
    """Train and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--data", default="walks", choices=DATA)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=15, help="of every training")
    parser.add_argument("--iterations", type=int, help="in the place of minutes")
    parser.add_argument("--batch", type=int, default=2, help="clips an iteration")
    parser.add_argument("--start", type=Path, help="the LoRA that is trained on; else what ships")
    parser.add_argument("--walks", type=int, default=256, help="walks of the teacher")
    parser.add_argument(
        "--drawn", type=int, default=240, help="clips that the 4-step student draws"
    )
    parser.add_argument("--count", type=int, default=54, help="prompts to measure on")
    parser.add_argument("--further", type=Path, help="another picture model")
    parser.add_argument("--further-judge", type=Path, help="of what its pictures show")
    parser.add_argument("--further-count", type=int, default=27, help="prompts to measure it on")
    parser.add_argument("--prepare", action="store_true", help="what the arms share, and no more")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data == OF_TWO and not options.further:
        parser.error(f"{OF_TWO} are of a picture model that --further names")
    if options.further and not options.further_judge:
        parser.error("what --further shows is told by a judge of its own: --further-judge")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        prepare(options)
        return
    if options.job is not None:
        arm, seed = options.job.split(":")
        run(Job(arm, options.data, int(seed)), options)
        return
    for seed in map(int, options.seeds.split(",")):
        for arm in options.arms.split(","):
            job = Job(arm, options.data, seed)
            if report_path(job.name, options.out).exists():
                continue
            run_apart(job.name, f"{arm}:{seed}")


if __name__ == "__main__":
    main()
