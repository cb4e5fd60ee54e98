"""A student against its teacher on fixed prompts: everything that is drawn and measured for it.

A `Bench` draws the teacher's pictures once: of the noise that students start from, and of fresh
noise. `evaluate_student` then draws a student's and returns its figures. Nothing of it needs files,
and everything is computed where the teacher's networks are:

    bench = Bench.of(teacher, num_pictures=2048)
    reports = evaluate_student(student, bench, steps=2)
    reports["open"].off_palette.share

The same teacher, numbers and seeds give the same pictures on every run and with every batch size,
up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from twostep.diffusion.samplers import Sampler
from twostep.diffusion.shapes import Time
from twostep.errors import TwostepError
from twostep.evaluate.judge import Judge, check_pictures, load_judge
from twostep.evaluate.measurements import Measurements, SecondJudge, measure
from twostep.evaluate.metrics import Report, summarise
from twostep.files import write_atomically
from twostep.media.image import from_levels, to_levels
from twostep.models.bundle import Bundle, modules_of
from twostep.models.sampling import decode, draw_noise, encode_prompts, sample_latents
from twostep.networks.denoiser import Denoiser
from twostep.networks.digest import digest_of_tensors
from twostep.pretrain.drawings import built_in_concepts
from twostep.pretrain.prompt_sets import Task, complete_tasks, open_tasks, with_fresh_noise

NUM_PICTURES = 256
"""Pictures of each set of prompts on a laptop; tables take 2,048."""

SETS = ("open", "complete")
"""The sets of prompts: those that leave background or style out, and those that do not."""

_BATCH = 64
_DECODED_AT_ONCE_ON_CPU = 16
"""Small batches stay in the processor's cache: decoding is three times as fast so."""

Pictures = UInt8[Tensor, "items 3 height width"]

OnBatch = Callable[[int], None]
"""Called with the number of pictures of every batch that is drawn, or read from the cache."""


class BenchError(TwostepError):
    """A model that cannot be measured on this bench."""


@dataclass(frozen=True, eq=False)
class Bench:
    """The prompts, the judges, and the teacher's pictures that students are measured against.

    Attributes:
        teacher: draws, encodes and decodes.
        tasks: prompts and seeds, by the name of their set.
        judge: says what pictures show.
        second: gives the features of a network that nobody here trained; None if there is none.
        own: the teacher's pictures of the tasks, by set.
        own_pictures: these pictures, in levels of 0..255.
        fresh: measurements of the teacher's pictures of the same prompts from fresh noise.
        cache: folder of what has been drawn; None to keep nothing.
        batch_size: pictures that are drawn at once.
        on_batch: told of every batch.
    """

    teacher: Bundle
    tasks: Mapping[str, tuple[Task, ...]]
    judge: Judge
    second: SecondJudge | None
    own: Mapping[str, Measurements]
    own_pictures: Mapping[str, Pictures]
    fresh: Mapping[str, Measurements]
    cache: Path | None = None
    batch_size: int = _BATCH
    on_batch: OnBatch = lambda count: None

    @staticmethod
    def of(
        teacher: Bundle,
        *,
        num_pictures: int = NUM_PICTURES,
        steps: int | None = None,
        judge: Judge | None = None,
        second: SecondJudge | None = None,
        batch_size: int = _BATCH,
        cache: Path | None = None,
        on_batch: OnBatch = lambda count: None,
    ) -> Bench:
        """Draw the teacher's pictures, 4 x `num_pictures` of them, and measure them.

        Args:
            teacher: of the students, on the device that everything is to be computed on.
            num_pictures: of each set of prompts.
            steps: of the teacher; None for its contract's number.
            judge: a judge; None for the built-in one. It is moved to the teacher's device.
            second: a second judge, such as `evaluate.efficientnet.EfficientNet`.
            batch_size: pictures that are drawn at once; memory depends on it, figures do not.
            cache: a folder that keeps what was drawn, by weights, prompts and seeds, so that the
                same call goes on after a break, and other processes need not draw it again.
            on_batch: told of every batch.

        Raises:
            BenchError: the model is no teacher, or a file in the cache is damaged.
            JudgeError: its pictures are not of the judge's size.
        """
        if teacher.contract.role != "teacher":
            raise BenchError(
                f"{teacher.contract.name} is a student; a bench needs the teacher of the students."
            )
        concepts = built_in_concepts()
        tasks = {
            "open": tuple(open_tasks(concepts, num_pictures)),
            "complete": tuple(complete_tasks(concepts, num_pictures)),
        }
        blank = Bench(
            teacher,
            tasks,
            (judge or load_judge()).to(teacher.denoiser.device),
            second,
            own={},
            own_pictures={},
            fresh={},
            cache=cache,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        check_pictures(torch.zeros(1, 3, *reversed(teacher.contract.sizes[0])), blank.judge.pixels)
        own_pictures = {name: blank.draw_teacher(tasks[name], steps=steps) for name in SETS}
        fresh = {
            name: blank.measure(
                blank.draw_teacher(with_fresh_noise(tasks[name]), steps=steps), name
            )
            for name in SETS
        }
        own = {name: blank.measure(own_pictures[name], name) for name in SETS}
        return replace(blank, own=own, own_pictures=own_pictures, fresh=fresh)

    def draw_teacher(
        self,
        tasks: Sequence[Task],
        *,
        steps: int | None = None,
        scale: float | None = None,
        sampler: str | Sampler = "euler",
    ) -> Pictures:
        """Draw the teacher's pictures of tasks.

        Args:
            tasks: prompts and seeds.
            steps: None for its contract's number.
            scale: of the guidance; None for its contract's, 1 for none.
            sampler: its name, or one itself.
        """
        contract = self.teacher.contract
        return self.draw(
            self.teacher.denoiser,
            tasks,
            steps=steps or contract.steps,
            scale=contract.guidance if scale is None else scale,
            sampler=sampler,
        )

    def draw(
        self,
        denoiser: Denoiser,
        tasks: Sequence[Task],
        *,
        steps: int,
        times: Sequence[Time] | None = None,
        scale: float = 1.0,
        sampler: str | Sampler = "euler",
    ) -> Pictures:
        """Draw pictures of tasks by a denoiser, with the teacher's text encoders and codec."""
        return draw_tasks(
            self.teacher,
            tasks,
            denoiser=denoiser,
            steps=steps,
            times=times,
            scale=scale,
            sampler=sampler,
            batch_size=self.batch_size,
            cache=self.cache,
            on_batch=self.on_batch,
        )

    def measure(self, pictures: Pictures, name: str) -> Measurements:
        """Measure pictures of the tasks of a set, batch by batch."""
        attributes = [task.attributes for task in self.tasks[name]]
        parts = []
        for start in range(0, len(pictures), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            images = from_levels(pictures[chosen])
            parts.append(measure(images, attributes[chosen], self.judge, second=self.second))
        return Measurements.cat(parts)

    def report(self, pictures: Pictures, name: str) -> Report:
        """Return the figures of pictures of the tasks of a set."""
        return summarise(
            self.measure(pictures, name),
            from_levels(pictures),
            reference=self.fresh[name],
            same_noise=self.own[name],
        )

    def report_teacher(self) -> dict[str, Report]:
        """Return the figures of the teacher itself, by set.

        They are the floor: its distances are those between two sets of its own pictures of the same
        prompts, as far apart as chance puts them.
        """
        return {
            name: summarise(
                self.own[name],
                from_levels(self.own_pictures[name]),
                reference=self.fresh[name],
                same_noise=self.own[name],
            )
            for name in SETS
        }


def evaluate_student(
    student: Denoiser,
    bench: Bench,
    *,
    steps: int,
    times: Sequence[Time] | None = None,
    scale: float = 1.0,
    sampler: str | Sampler = "euler",
) -> dict[str, Report]:
    """Draw and measure a student's pictures of both sets of prompts.

    Args:
        student: a denoiser on the teacher's device, in memory or loaded; trained or being trained.
            It is put in evaluation mode while it draws.
        bench: what it is measured on.
        steps: that the student was trained for, along the trailing grid.
        times: falling, that it visits in place of that grid, the landing 0 included; such as
            `models.sampling.sampling_times` reads from a contract.
        scale: of the guidance, which is distilled into students: 1.
        sampler: by name, as contracts have it ("euler", "renoise"), or one itself.

    Returns:
        The figures by the name of the set, "open" and "complete".
    """
    return {
        name: bench.report(pictures, name)
        for name, pictures in draw_student(
            student, bench, steps=steps, times=times, scale=scale, sampler=sampler
        ).items()
    }


def draw_student(
    student: Denoiser,
    bench: Bench,
    *,
    steps: int,
    times: Sequence[Time] | None = None,
    scale: float = 1.0,
    sampler: str | Sampler = "euler",
) -> dict[str, Pictures]:
    """Draw a student's pictures of both sets; arguments as of `evaluate_student`."""
    was_training = student.network.training
    student.network.eval()
    try:
        return {
            name: bench.draw(
                student, bench.tasks[name], steps=steps, times=times, scale=scale, sampler=sampler
            )
            for name in SETS
        }
    finally:
        student.network.train(was_training)


@torch.no_grad()
def draw_tasks(
    bundle: Bundle,
    tasks: Sequence[Task],
    *,
    denoiser: Denoiser | None = None,
    steps: int | None = None,
    times: Sequence[Time] | None = None,
    scale: float | None = None,
    sampler: str | Sampler = "euler",
    batch_size: int = _BATCH,
    cache: Path | None = None,
    on_batch: OnBatch = lambda count: None,
) -> Pictures:
    """Draw pictures of tasks, each from the noise of its seed, batch by batch.

    Args:
        bundle: encodes prompts and decodes latents.
        tasks: prompts and seeds.
        denoiser: draws; None for the bundle's own.
        steps: along the trailing grid; None for the contract's number.
        times: falling, visited in place of that grid, the landing 0 included.
        scale: of the guidance; None for the contract's, 1 for none.
        sampler: its name, or one itself.
        batch_size: pictures that are drawn at once.
        cache: a folder that keeps what is drawn with a sampler that has a name; None for none.
        on_batch: told of every batch.

    Returns:
        Levels of 0..255 on the CPU, as a PNG would hold them.
    """
    denoiser = denoiser or bundle.denoiser
    steps = steps or bundle.contract.steps
    scale = bundle.contract.guidance if scale is None else scale
    origin = None
    if cache is not None and isinstance(sampler, str):
        grid = steps if times is None else list(times)
        origin = [weights_digest(bundle, denoiser), grid, scale, sampler]
    parts = []
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        path = None
        if cache is not None and origin is not None:
            words = json.dumps([*origin, [(task.prompt, task.seed) for task in batch]])
            path = cache / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"
        if path is not None and path.exists():
            pictures = _read(path)
        else:
            pictures = _draw_batch(
                bundle,
                denoiser,
                batch,
                times=steps if times is None else times,
                scale=scale,
                sampler=sampler,
            )
            if path is not None:
                with write_atomically(path) as file:
                    file.write(save({"pictures": pictures.contiguous()}))
        parts.append(pictures)
        on_batch(len(batch))
    return torch.cat(parts)


def _read(path: Path) -> Pictures:
    """Return the pictures of a file in the cache; BenchError if it is damaged."""
    try:
        return load(path.read_bytes())["pictures"]
    except (SafetensorError, KeyError, OSError) as error:
        raise BenchError(
            f"{path} is damaged ({error}). Delete it; its pictures are drawn again."
        ) from error


def _draw_batch(
    bundle: Bundle,
    denoiser: Denoiser,
    batch: Sequence[Task],
    *,
    times: Sequence[Time] | int,
    scale: float,
    sampler: str | Sampler,
) -> Pictures:
    size = bundle.contract.sizes[0]
    seeds = [task.seed for task in batch]
    guided = encode_prompts(bundle, [task.prompt for task in batch], size, scale=scale)
    noise = draw_noise(seeds, bundle.latent_shape(*size), denoiser.device)
    latents = sample_latents(denoiser, guided, noise, times, seeds, sampler=sampler)
    on_cpu = denoiser.device.type == "cpu"
    pixels = decode(bundle, latents, at_once=_DECODED_AT_ONCE_ON_CPU if on_cpu else None)
    return to_levels(pixels).cpu()


def weights_digest(teacher: Bundle, denoiser: Denoiser) -> str:
    """Return a digest of all weights that pictures by a denoiser of a teacher depend on."""
    networks = (denoiser.network, *teacher.text.networks.values(), *modules_of(teacher.codec))
    weights = digest_of_tensors(
        entry for network in networks for entry in sorted(network.state_dict().items())
    )
    return f"{denoiser.prediction_type}/{denoiser.lora}/{weights}"
