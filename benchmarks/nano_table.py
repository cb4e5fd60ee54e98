"""The table of the nano models: teacher, students, and what the teacher alone does with as few
evaluations.

    python benchmarks/nano_table.py --out runs/table [--mse DIR]

Draws every evaluation picture in float32 with the same noise for all, judges it, and writes
table.md, table.json and sheet.png. Pictures are cached by a hash of weights, sampler, prompts and
seeds: the same command goes on where it was stopped, and after a new training draws only what has
changed. Guidance counts as two evaluations a step.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from nano_table_text import checks, to_markdown
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.diffusion import Denoise, VariancePreserving
from twostep.diffusion.flow import Keep, OnStep
from twostep.diffusion.samplers import DrawNoise
from twostep.evaluate.judge import Judge, load_judge
from twostep.evaluate.measurements import measure
from twostep.evaluate.metrics import Report, evaluate
from twostep.formats import resolve
from twostep.formats.locate import find_model
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import DrawingSet, load_drawings
from twostep.pretrain.prompt_sets import (
    FIRST_SEED,
    Task,
    complete_tasks,
    incomplete_tasks,
    real_pictures,
    repeated_tasks,
)

CHUNK = 128
DECODE_CHUNK = 16
SHEET_COLUMNS = 16
NUM_REAL_PER_PROMPT = 4
TEACHER_STEPS = 32


@dataclass(frozen=True)
class Sampler:
    """How one row of the table is drawn: solver ("euler" or "dpm"), steps, guidance (1 is none)."""

    solver: str
    steps: int
    guidance: float

    @property
    def num_evaluations(self) -> int:
        """Network evaluations per picture."""
        return self.steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True)
class Row:
    """One row: what it is called, how it is drawn, and how to load what draws it."""

    key: str
    label: str
    sampler: Sampler
    load: Callable[[], Bundle]
    with_diversity: bool = True


@dataclass(frozen=True)
class Figures:
    """What the table says of one row, as plain values; `distance` is Frechet in the judge's
    features.
    """

    key: str
    label: str
    steps: int
    evaluations: int
    complete: dict[str, Any]
    incomplete: dict[str, Any]
    diversity: dict[str, Any] | None


def main(
    out: Annotated[Path, typer.Option(help="Folder for table, sheet and cache.")] = Path(
        "runs/table"
    ),
    model: Annotated[str, typer.Option(help="A built-in name or a model folder.")] = "nano",
    mse: Annotated[
        Path | None,
        typer.Option(help="Folder of *_{2,1}step_unet.safetensors trained by MSE only."),
    ] = None,
    drawings_path: Annotated[
        Path, typer.Option("--drawings", help="Folder of the drawings.")
    ] = DRAWINGS,
    judge_path: Annotated[Path | None, typer.Option("--judge", help="Another judge.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first prompts of each set, to try it out.")
    ] = None,
) -> None:
    """Draw, judge, and write the table."""
    began = time.monotonic()
    drawings = load_drawings(drawings_path)
    judge = load_judge(judge_path) if judge_path else load_judge()
    tasks = {
        "complete": complete_tasks(drawings.concepts)[:limit],
        "incomplete": incomplete_tasks(drawings.concepts)[:limit],
        "diversity": repeated_tasks(drawings.concepts)[:limit],
    }
    pictures: dict[str, dict[str, Tensor]] = {}
    rows = [*model_rows(model), *lora_rows(model), *mse_rows(mse)]
    for row in rows:
        pictures[row.key] = draw_row(row, tasks, out / "cache")
    figures = judge_rows(rows, pictures, tasks, judge=judge, drawings=drawings)
    figures.append(judge_real(pictures, tasks, judge, drawings))
    write_sheet(rows, pictures, tasks["complete"], out / "sheet.png")
    claims = checks([asdict(figure) for figure in figures])
    text = to_markdown(
        [asdict(figure) for figure in figures],
        claims,
        judge.origin.accuracy if judge.origin else {},
    )
    (out / "table.md").write_text(text)
    record = {"rows": [asdict(figure) for figure in figures], "checks": claims}
    (out / "table.json").write_text(json.dumps(record, indent=2))
    typer.echo(text)
    typer.echo(
        f"{time.monotonic() - began:.0f} s in all; {out / 'table.md'}, table.json, sheet.png"
    )


def model_rows(model: str) -> list[Row]:
    """Teacher, its students, and the teacher at few steps with two solvers."""
    teacher = load_bundle(model, steps=TEACHER_STEPS)
    scale = teacher.contract.guidance

    def load_teacher() -> Bundle:
        return teacher

    rows = [
        Row(
            key="teacher",
            label=f"teacher, {TEACHER_STEPS} steps",
            sampler=Sampler("euler", TEACHER_STEPS, scale),
            load=load_teacher,
        )
    ]
    for steps in sorted(teacher.students, reverse=True):
        rows.append(
            Row(
                key=f"student-{steps}",
                label=f"student, {_steps(steps)}",
                sampler=Sampler("euler", steps, 1.0),
                load=lambda n=steps: load_bundle(model, steps=n),
            )
        )
    for solver, name in (("euler", "Euler"), ("dpm", "DPM-Solver++ 2M")):
        # First and last step of this second-order solver are of first order: below three steps it
        # is Euler.
        for steps in (4, 2, 1) if solver == "euler" else (4,):
            rows.append(
                Row(
                    key=f"{solver}-{steps}-guided",
                    label=f"teacher, {_steps(steps)}, guidance, {name}",
                    sampler=Sampler(solver, steps, scale),
                    load=load_teacher,
                    with_diversity=False,
                )
            )
    rows.append(
        Row(
            key="euler-1",
            label="teacher, 1 step, no guidance, Euler",
            sampler=Sampler("euler", 1, 1.0),
            load=load_teacher,
            with_diversity=False,
        )
    )
    return rows


def lora_rows(model: str) -> list[Row]:
    """The students that the model also has as LoRAs."""
    contracts = {
        path: resolve(path).contract
        for path in (find_model(model) / "students").glob("*_lora.safetensors")
    }
    return [
        Row(
            key=f"lora-{contract.steps}",
            label=f"LoRA of rank {contract.lora_rank}, {_steps(contract.steps)}",
            sampler=Sampler("euler", contract.steps, 1.0),
            load=lambda p=path: load_bundle(p),
        )
        for path, contract in sorted(contracts.items(), key=lambda item: -item[1].steps)
    ]


def mse_rows(folder: Path | None) -> list[Row]:
    """Students that were distilled by MSE alone, if there are any."""
    rows = []
    for steps in (2, 1) if folder else ():
        for path in sorted(folder.glob(f"*_{steps}step_unet.safetensors")) if folder else ():
            sampler = Sampler("euler", steps, 1.0)
            label = f"student by MSE alone, {_steps(steps)}"
            rows.append(Row(f"mse-{steps}", label, sampler, lambda p=path: load_bundle(p)))
    return rows


def draw_row(row: Row, tasks: dict[str, list[Task]], cache: Path) -> dict[str, Tensor]:
    """Draw all sets of a row, or read them from the cache; pictures are uint8 as a PNG would hold
    them.
    """
    cache.mkdir(parents=True, exist_ok=True)
    bundle = row.load()
    weights = _weights_digest(bundle)
    names = [name for name in tasks if row.with_diversity or name != "diversity"]
    began = time.monotonic()
    drawn = {
        name: _draw_set(bundle, row.sampler, tasks[name], weights=weights, cache=cache)
        for name in names
    }
    typer.echo(
        f"{row.label}: {sum(map(len, drawn.values()))} pictures, {time.monotonic() - began:.0f} s"
    )
    return drawn


def _draw_set(
    bundle: Bundle, sampler: Sampler, tasks: Sequence[Task], *, weights: str, cache: Path
) -> Tensor:
    """Draw tasks in chunks, each of which is cached; `weights` is the digest of the model's."""
    chunks = []
    for start in range(0, len(tasks), CHUNK):
        chunk = tasks[start : start + CHUNK]
        cache_key = json.dumps(
            [weights, asdict(sampler), [(task.prompt, task.seed) for task in chunk]]
        )
        path = cache / f"{hashlib.sha256(cache_key.encode()).hexdigest()[:32]}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file({"pictures": draw(bundle, sampler, chunk)}, partial)
            partial.replace(path)
        chunks.append(load_file(path)["pictures"])
    return torch.cat(chunks)


@torch.inference_mode()
def draw(bundle: Bundle, sampler: Sampler, tasks: Sequence[Task]) -> Tensor:
    """Draw one picture per task in one batch, each from the noise of its own seed."""
    size = bundle.contract.sizes[0]
    scale = max(1.0, sampler.guidance)
    guided = encode_prompts(bundle, [task.prompt for task in tasks], size, scale=scale)
    latents = sample_prompts(
        bundle,
        guided,
        [task.seed for task in tasks],
        size,
        steps=sampler.steps,
        sampler=solve_dpm if sampler.solver == "dpm" else None,
    )
    # Small batches stay in the processor's cache: decoding is three times as fast so.
    pixels = decode(bundle, latents, at_once=DECODE_CHUNK)
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def solve_dpm(
    denoise: Denoise,
    noise: Tensor,
    times: Tensor,
    schedule: VariancePreserving,
    draw_noise: DrawNoise,
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Follow the flow with diffusers' DPM-Solver++ 2M on the same grid (arXiv 2211.01095)."""
    betas = 1 - (schedule.alphas[1:] / schedule.alphas[:-1]).square()
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_times,
        trained_betas=betas.tolist(),
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(len(times) - 1)
    x = noise
    for index in scheduler.timesteps:
        eps = denoise(x, torch.full((len(x),), int(index) + 1)).eps
        x = scheduler.step(eps, index, x).prev_sample
    return x


def judge_rows(
    rows: Sequence[Row],
    pictures: dict[str, dict[str, Tensor]],
    tasks: dict[str, list[Task]],
    *,
    judge: Judge,
    drawings: DrawingSet,
) -> list[Figures]:
    """Judge every row against its prompts, the teacher's pictures and real ones."""
    statistics = {
        name: (
            measure(
                to_float(pictures["teacher"][name]),
                [task.attributes for task in tasks[name]],
                judge,
            ),
            judge.statistics(_real(tasks[name], drawings)),
        )
        for name in ("complete", "incomplete")
    }

    def report(row: Row, name: str) -> Report:
        reference, real = statistics.get(name, (None, None))
        attributes = [task.attributes for task in tasks[name]]
        return evaluate(
            to_float(pictures[row.key][name]), attributes, judge, reference=reference, real=real
        )

    return [
        Figures(
            key=row.key,
            label=row.label,
            steps=row.sampler.steps,
            evaluations=row.sampler.num_evaluations,
            complete=_plain(report(row, "complete")),
            incomplete=_plain(report(row, "incomplete")),
            diversity=_plain(report(row, "diversity")) if row.with_diversity else None,
        )
        for row in rows
    ]


def judge_real(
    pictures: dict[str, dict[str, Tensor]],
    tasks: dict[str, list[Task]],
    judge: Judge,
    drawings: DrawingSet,
) -> Figures:
    """Judge real pictures for the same prompts: what a perfect model would get, the judge's own
    errors included.
    """
    reports = {}
    for name, wanted in tasks.items():
        attributes = [task.attributes for task in wanted]
        reference = measure(to_float(pictures["teacher"][name]), attributes, judge)
        real = judge.statistics(_real(wanted, drawings))
        composed = real_pictures(attributes, drawings, seed=FIRST_SEED - 1)
        reports[name] = _plain(
            evaluate(composed, attributes, judge, reference=reference, real=real)
        )
    return Figures(
        key="real",
        label="real drawings",
        steps=0,
        evaluations=0,
        complete=reports["complete"],
        incomplete=reports["incomplete"],
        diversity=reports["diversity"],
    )


def _plain(report: Report) -> dict[str, Any]:
    """Return the figures of a report without the interval of the distance."""
    figures = report.to_dict()
    distance = report.frechet_to_reference
    figures["frechet_to_reference"] = None if distance is None else distance.value
    return figures


def _real(tasks: Sequence[Task], drawings: DrawingSet) -> Tensor:
    """Compose several real pictures for every prompt."""
    attributes = [task.attributes for task in tasks]
    seeds = range(FIRST_SEED, FIRST_SEED + NUM_REAL_PER_PROMPT)
    return torch.cat([real_pictures(attributes, drawings, seed=seed) for seed in seeds])


def to_float(pictures: Tensor) -> Tensor:
    """Bring 8-bit pictures to -1..1."""
    return pictures.float() / 127.5 - 1


def write_sheet(
    rows: Sequence[Row], pictures: dict[str, dict[str, Tensor]], tasks: Sequence[Task], path: Path
) -> None:
    """Lay the same prompts of every row out, from the same noise."""
    chosen = list(range(0, len(tasks), max(1, len(tasks) // SHEET_COLUMNS)))[:SHEET_COLUMNS]
    lines = []
    for row in rows:
        shown = pictures[row.key]["complete"][chosen]
        lines.append((row.label, [Image.fromarray(each) for each in _as_arrays(shown)]))
    contact_sheet(lines, [tasks[i].prompt for i in chosen], scale=2).save(path)


def _as_arrays(pictures: Tensor) -> list[Any]:
    return [picture.permute(1, 2, 0).numpy() for picture in pictures]


def _weights_digest(bundle: Bundle) -> str:
    digest = hashlib.sha256(bundle.denoiser.prediction_type.encode())
    for part in (bundle.denoiser.network, bundle.codec.vae, *bundle.text.encoders):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


if __name__ == "__main__":
    typer.run(main)
