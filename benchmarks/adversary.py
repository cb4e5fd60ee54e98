"""What an adversary is worth: matched arms from one start, one bank and one budget, judged alike.

    python benchmarks/adversary.py --out runs/adversary                      # on one GPU, 8 minutes
    python benchmarks/adversary.py --out runs/adversary --device cpu ...     # hours: see --help

All arms start from the shipped student of so many steps, see the same examples in the same order,
learn from the same landings of the first teacher (guidance 3, 32 steps, from a bank that all share)
and stop at the same number of examples. Every arm is a process of its own. At every checkpoint it
looks at its student and writes its weights, a grid and its figures, so a run that is cut short
still tells; the same command goes on. At the end everything is measured on open and on complete
prompts (`twostep.reports.benchmark`), and `table.md` stands in the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from twostep.distill.landings import Landings, LandingSettings
from twostep.distill.pairs import Batches
from twostep.distill.recipe import Stage
from twostep.distill.trainer import train_stage
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.detail import high_pass_energy
from twostep.evaluate.histograms import histogram, total_variation
from twostep.evaluate.palette import OFF_PALETTE, nearest_background, palette_distance
from twostep.files import write_atomically
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, draw_noise, encode_prompts, sample_latents
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.captions import Omission
from twostep.pretrain.drawings import built_in_concepts
from twostep.pretrain.latents import LatentCache, LatentSource, builtin
from twostep.pretrain.prompt_sets import open_tasks
from twostep.reports.benchmark import Bench, evaluate_student
from twostep.training.device import find_device
from twostep.training.halves import halved
from twostep.training.loop import Randomness
from twostep.training.run_folder import RunFolder

GUIDANCE = 3.0
TEACHER_STEPS = 32
NUM_LOOKED_AT = 192

CAPTIONS = Omission(everything=0.05, style=0.4, background=0.5, concept=0.05, subgroup_instead=0.1)
"""`--open` of the captions leave the background open: what is to be learned shows there."""

RELATIVISTIC: dict[str, Any] = {
    "name": "adversarial",
    "r1_weight": 0.05,
    "discriminator_learning_rate": 2e-4,
    "head_learning_rate": 8e-4,
    "discriminator_warmup": 50,
}
FROM_NOISE = (16.0, 1.0, 1.0, 1.0)
"""Five sixths of the examples start from where a student of one step draws; alike, a quarter."""
STRONG: dict[str, Any] = {
    **RELATIVISTIC,
    "student_first": True,
    "discriminator_warmup": 150,
    "discriminator_steps": 2,
    "noised_weights": (6.0, 2.0, 1.0, 1.0),
}
"""A discriminator that is always ahead of a student that learns more slowly."""
MATCHING: dict[str, Any] = {
    "matching_weight": 0.5,
    "matching_guidance": GUIDANCE,
    "discriminator_steps": 2,
    "fake_score_learning_rate": 5e-5,
}
BOTH: dict[str, Any] = {
    **RELATIVISTIC,
    "matching_weight": 5.0,
    "matching_guidance": 2.0,
    "fake_score_learning_rate": 1e-4,
}
"""Relativistic pairs and distribution matching together."""
MOSTLY: dict[str, Any] = {"matching_weight": 20.0, "discriminator_warmup": 50}
"""Distribution matching that outweighs the discriminator's loss."""
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    "mse": (1e-4, {"name": "regression"}),
    "lightning": (
        3e-5,
        {
            "name": "lightning",
            "objective": "unconditional",
            "early_weight": 5,
            "discriminator_learning_rate": 1e-4,
        },
    ),
    "adversarial": (5e-5, RELATIVISTIC),
    "adversarial-fast": (1.5e-4, RELATIVISTIC),
    "adversarial-conditional": (5e-5, {**RELATIVISTIC, "objective": "conditional"}),
    "adversarial-data": (5e-5, {**RELATIVISTIC, "real": "data"}),
    "adversarial-data-fast": (1.5e-4, {**RELATIVISTIC, "real": "data"}),
    "adversarial-data-student-first": (
        5e-5,
        {**RELATIVISTIC, "real": "data", "student_first": True},
    ),
    "adversarial-data-strong": (2e-5, {**STRONG, "real": "data"}),
    "matching": (5e-5, {**RELATIVISTIC, **MATCHING}),
    "matching-data": (5e-5, {**RELATIVISTIC, **MATCHING, "real": "data"}),
    "mostly-matching": (3e-5, {**STRONG, **MATCHING, **MOSTLY, "real": "data"}),
    "mostly-matching-unguided": (
        3e-5,
        {**STRONG, **MATCHING, **MOSTLY, "real": "data", "matching_guidance": 1.0},
    ),
    "both": (5e-5, {**BOTH, "real": "data", "time_weights": FROM_NOISE}),
    "both-bank": (5e-5, BOTH),
    # What each piece of the method pays: one thing changed of "adversarial".
    "without-levels": (5e-5, {**RELATIVISTIC, "levels": "mid"}),
    "without-pairs": (5e-5, {**RELATIVISTIC, "loss": "non-saturating"}),
    "without-r1": (5e-5, {**RELATIVISTIC, "r1_weight": 0.0}),
    "with-r2": (5e-5, {**RELATIVISTIC, "r2_weight": 0.05}),
    "with-mismatched": (5e-5, {**RELATIVISTIC, "mismatched_weight": 0.5}),
    "without-warmup": (5e-5, {**RELATIVISTIC, "discriminator_warmup": 0}),
    "with-time-weights": (5e-5, {**RELATIVISTIC, "time_weights": (3.0, 1.0, 1.0, 1.0)}),
    "in-bf16": (5e-5, {**RELATIVISTIC, "discriminator_precision": "stage"}),
}
"""Learning rate of the student, and method, by arm."""


@dataclass(eq=False)
class DeviceSource:
    """The drawings with captions that were all written and encoded before, on the device.

    Args:
        latents: of the drawings, on the device.
        captions: numbers of the texts that a drawing may have, on the CPU.
        texts: every text once, encoded, on the device.
        blank: the empty prompt.
    """

    latents: Tensor
    captions: Tensor
    texts: Conditioning
    blank: Conditioning

    @staticmethod
    @torch.no_grad()
    def of(cache: LatentCache, teacher: Bundle, per_drawing: int) -> DeviceSource:
        """Write `per_drawing` captions of every drawing, and encode each text once."""
        device = teacher.denoiser.device
        size = teacher.contract.sizes[0]
        words = Random(7)
        numbers: dict[str, int] = {}
        rows = [
            [
                numbers.setdefault(cache.caption(row, words), len(numbers))
                for _ in range(per_drawing)
            ]
            for row in range(len(cache.latents))
        ]
        texts = list(numbers)
        parts = [
            teacher.text.conditioning(texts[start : start + 256], *size).to(device)
            for start in range(0, len(texts), 256)
        ]
        return DeviceSource(
            latents=cache.latents.float().to(device),
            captions=torch.tensor(rows),
            texts=Conditioning.cat(parts),
            blank=teacher.text.conditioning([""], *size).to(device),
        )

    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of one of their captions each."""
        rows = torch.randint(len(self.latents), (count,), generator=tensors)
        columns = torch.randint(self.captions.shape[1], (count,), generator=tensors)
        texts = self.captions[rows, columns].to(self.latents.device)
        return self.latents[rows.to(self.latents.device)], self.texts[texts]

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the empty prompt for as many items."""
        return self.blank.expand(len(like))


@dataclass
class Clock:
    """What is left of a budget of seconds."""

    seconds: float
    started_at: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.started_at)


class TimeIsUp(Exception):
    """The arm's time is over; its last checkpoint stands."""


def needs_bank(arm: str) -> bool:
    """Return whether an arm learns from the teacher's landings, and not from the drawings alone."""
    return ARMS[arm][1].get("real") != "data"


def make_stage(arm: str, steps: int, seed: int, options: argparse.Namespace) -> Stage:
    """Return the stage of an arm."""
    rate, method = ARMS[arm]
    method = dict(method)
    if "discriminator_warmup" in method:
        method["discriminator_warmup"] = min(
            method["discriminator_warmup"], options.iterations // 10
        )
    if needs_bank(arm):
        by = f"-by-{options.taught_by}" if options.taught_by else ""
        method |= {"bank": options.out / f"bank-{steps}step{by}", "bank_size": options.bank}
    return Stage.model_validate(
        {
            "student_steps": steps,
            "teacher_steps": options.taught_by or TEACHER_STEPS,
            "teacher": "first",
            "guidance": 1.0 if options.taught_by else GUIDANCE,
            "iterations": options.iterations,
            "batch_size": options.batch,
            "learning_rate": rate,
            "warmup_iterations": min(options.warmup, options.iterations),
            "ema_decay": 0.995,
            "precision": options.precision,
            "checkpoint_every": options.checkpoint_every,
            "log_every": 25,
            "seed": seed,
            "method": method,
        }
    )


def prepare(options: argparse.Namespace) -> tuple[Bundle, DeviceSource]:
    """Return the teacher on the device, and the examples."""
    device = find_device(options.device)
    teacher = load_bundle("nano").to(device)
    options.out.mkdir(parents=True, exist_ok=True)
    made = builtin(teacher, options.out, lambda *_: None, variants=options.variants)
    assert isinstance(made, LatentSource)
    captions = replace(CAPTIONS, background=options.open)
    cache = replace(made.latents, omission=captions)
    return teacher, DeviceSource.of(cache, teacher, options.captions)


def teaches(teacher: Bundle, options: argparse.Namespace) -> Denoiser:
    """Return who teaches: the first teacher, or its shipped student of so many steps."""
    if not options.taught_by:
        return teacher.denoiser
    student = load_bundle("nano", steps=options.taught_by)
    return student.to(teacher.denoiser.device).denoiser


def fill_bank(steps: int, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Compute the landings that are missing, as long as there is time; return what was done."""
    teacher, source = prepare(options)
    stage = make_stage("mse", steps, 0, options)
    settings = stage.method
    assert isinstance(settings, LandingSettings)
    landings = Landings(stage, settings, steps, options.taught_by or TEACHER_STEPS)
    batches = Batches(source, stage.batch_size, teacher.denoiser.device)
    begun = time.monotonic()
    number = 0
    taught_by = teaches(teacher, options)
    with stage.autocast(teacher.denoiser.device.type):
        for number in range(landings.num_batches):
            landings.draw(number, batches, taught_by, Randomness.at(0, number))
            if clock.left < 0:
                break
    return {
        "part": f"bank-{steps}step",
        "examples": (number + 1) * stage.batch_size,
        "seconds": round(time.monotonic() - begun, 1),
    }


@torch.no_grad()
def look(student: Denoiser, teacher: Bundle, steps: int) -> tuple[dict[str, float], Tensor]:
    """Return quick figures of a student, and its pictures in levels of 0..255.

    The prompts leave the background open. `background_to_uniform` is the total variation between
    the nearest backgrounds and all twelve in equal parts, as the drawings have them: what a student
    loses that prefers some.
    """
    some = open_tasks(built_in_concepts(), 2 * NUM_LOOKED_AT)
    tasks = [task for task in some if task.attributes.background is None][:NUM_LOOKED_AT]
    size = teacher.contract.sizes[0]
    seeds = [task.seed for task in tasks]
    guided = encode_prompts(teacher, [task.prompt for task in tasks], size, scale=1.0)
    noise = draw_noise(seeds, teacher.latent_shape(*size), student.device)
    latents = sample_latents(student, guided, noise, steps, seeds, sampler="euler")
    pixels = decode(teacher, latents, at_once=16).float()
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255)
    distances = palette_distance(pixels)
    nearest = nearest_background(pixels).cpu()
    uniform = torch.full((len(BACKGROUNDS),), 1 / len(BACKGROUNDS), dtype=torch.float64)
    figures = {
        "off_palette": (distances > OFF_PALETTE).float().mean().item(),
        "palette_distance": distances.mean().item(),
        "high_pass": high_pass_energy(pixels).mean().item(),
        "background_to_uniform": total_variation(
            histogram(nearest, len(BACKGROUNDS)), uniform
        ).item(),
    }
    return figures, levels.to(torch.uint8).cpu()


def save_grid(pictures: Tensor, path: Path, columns: int = 12) -> None:
    """Write pictures as one PNG."""
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    whole = torch.cat([row for row in rows if row.shape == rows[0].shape], dim=1)
    with write_atomically(path) as file:
        Image.fromarray(whole.permute(1, 2, 0).numpy()).save(file, format="PNG")


def run_arm(arm: str, steps: int, seed: int, options: argparse.Namespace, clock: Clock) -> None:
    """Train an arm, look at it, and measure it."""
    teacher, source = prepare(options)
    folder = options.out / f"{arm}-{steps}step-{seed}"
    stage = make_stage(arm, steps, seed, options)
    start = load_bundle("nano", steps=steps).to(teacher.denoiser.device).denoiser
    student = start.standalone()
    student.network.requires_grad_(True)
    begun = time.monotonic()
    done = 0

    def note(**values: Any) -> None:
        with (options.out / "figures.jsonl").open("a") as file:
            line = {"arm": arm, "steps": steps, "seed": seed, "iteration": done, **values}
            file.write(json.dumps(line) + "\n")

    def on_iteration(iteration: int, figures: Mapping[str, float]) -> None:
        nonlocal done
        done = iteration
        if clock.left < 0:
            raise TimeIsUp

    def note_looks(grid: Path) -> dict[str, float]:
        figures, pictures = look(student, teacher, steps)
        save_grid(pictures, grid)
        note(seconds=round(time.monotonic() - begun, 1), **figures)
        return figures

    start_grid = folder / "grid-start.png"
    if not start_grid.exists():
        note_looks(start_grid)

    def on_checkpoint(iteration: int) -> dict[str, float]:
        with write_atomically(folder / "student.safetensors") as file:
            file.write(save(halved(student.network.state_dict())))
        return note_looks(folder / "grid.png")

    run_folder = RunFolder(folder, stage)
    try:
        train_stage(
            stage,
            source,
            teacher=teaches(teacher, options),
            student=student,
            folder=run_folder,
            on_iteration=on_iteration,
            on_checkpoint=on_checkpoint,
        )
    except TimeIsUp:
        note(cut_short=True)
        checkpoint = run_folder.load(stage.name)
        if checkpoint is None:
            return
        student.network.load_state_dict(checkpoint["average"]["weights"])
    if options.pictures:
        measure(student, teacher, arm, steps, seed, options)


def measure(
    student: Denoiser, teacher: Bundle, arm: str, steps: int, seed: int, options: Any
) -> None:
    """Measure a student on the bench that all arms share, and write its figures."""
    bench = Bench.of(
        teacher,
        num_pictures=options.pictures,
        batch_size=options.drawn_at_once,
        cache=options.out / "teacher-pictures",
    )
    reports = evaluate_student(student, bench, steps=steps)
    path = options.out / "reports" / f"{arm}-{steps}step-{seed}.json"
    with write_atomically(path) as file:
        values = {name: flatten(report) for name, report in reports.items()}
        file.write(json.dumps(values, indent=2).encode())


def flatten(report: Any, prefix: str = "") -> dict[str, Any]:
    """Return a report's numbers by their dotted names."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(report):
        value = getattr(report, each.name)
        name = f"{prefix}{each.name}"
        if dataclasses.is_dataclass(value):
            found |= flatten(value, f"{name}.")
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def write_table(out: Path) -> None:
    """Write all reports as one table, a row for every arm, steps and set of prompts."""
    rows = []
    for path in sorted((out / "reports").glob("*.json")):
        for name, values in json.loads(path.read_text()).items():
            rows.append({"arm": path.stem, "prompts": name, **values})
    if not rows:
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    for row in rows:
        cells = [
            f"{row[key]:.4f}" if isinstance(row.get(key), float) else str(row.get(key, ""))
            for key in keys
        ]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def in_processes(
    jobs: list[list[str]], num_at_once: int, clock: Clock, on_done: Callable[[], None]
) -> None:
    """Run workers, so many at once, until all are done or the time is up."""
    waiting = list(jobs)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < num_at_once and clock.left > 0:
            command = [sys.executable, __file__, *waiting.pop(0), "--seconds", f"{clock.left:.0f}"]
            running.append(subprocess.Popen(command))
        if clock.left < 0:
            waiting = []
        for process in [each for each in running if each.poll() is not None]:
            running.remove(process)
            on_done()
        time.sleep(0.2)


def main() -> None:
    """Do all parts, or one of them as a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=440, help="the whole budget")
    parser.add_argument("--arms", default="mse,lightning,adversarial,matching")
    parser.add_argument("--steps", default="1,2")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bank", type=int, default=65_536, help="landings of each grid")
    parser.add_argument(
        "--bank-share", type=float, default=0.3, help="of the budget that the bank may take"
    )
    parser.add_argument(
        "--taught-by",
        type=int,
        default=0,
        help="learn from the landings of the shipped student of so many steps, an eighth of the "
        "cost at 8; not with distribution matching, which asks the first teacher",
    )
    parser.add_argument("--variants", type=int, default=16, help="pictures of every drawing")
    parser.add_argument("--captions", type=int, default=4, help="captions of every picture")
    parser.add_argument(
        "--open", type=float, default=0.5, help="share of captions without a background"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=0,
        help="iterations over which all rates rise, the discriminator's too",
    )
    parser.add_argument(
        "--precision",
        default="bf16",
        help="fp32 where bf16 is slower: on a processor with AVX-512 and no AMX it took 1.8 times "
        "as long",
    )
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=2048, help="0 to leave measuring out")
    parser.add_argument("--drawn-at-once", type=int, default=256)
    parser.add_argument("--processes", type=int, default=8, help="arms that train at once")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = Clock(options.seconds)
    torch.set_float32_matmul_precision("high")
    if options.worker:
        kind, steps, seed = options.worker.split(":")
        if kind == "bank":
            print(json.dumps(fill_bank(int(steps), options, clock)), flush=True)
        else:
            # What is measured at the end needs time too.
            share = Clock(clock.seconds * (0.85 if options.pictures else 1.0))
            run_arm(kind, int(steps), int(seed), options, share)
        return
    shared = sys.argv[1:]
    steps = options.steps.split(",")
    prepare(options)
    if any(needs_bank(arm) for arm in options.arms.split(",")):
        in_processes(
            [[*shared, "--worker", f"bank:{each}:0"] for each in steps],
            options.processes,
            Clock(options.seconds * options.bank_share),
            lambda: None,
        )
    jobs = [
        [*shared, "--worker", f"{arm}:{each}:{seed}"]
        for seed in options.seeds.split(",")
        for each in steps
        for arm in options.arms.split(",")
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    in_processes(jobs, options.processes, clock, lambda: write_table(options.out))
    write_table(options.out)


if __name__ == "__main__":
    main()
