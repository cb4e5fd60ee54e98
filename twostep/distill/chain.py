"""The chain of phases: hands students on as teachers, writes them down, shows them beside the first
teacher.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from twostep.contract import Contract, student_name
from twostep.diffusion import PredictionType, trained_times
from twostep.distill.methods.discriminator import Discriminator, LoraDiscriminator
from twostep.distill.recipe import DistillRecipe, Phase
from twostep.distill.samples import Examples
from twostep.distill.trainer import Judging, Lesson, Source, train_phase
from twostep.files import write_atomically
from twostep.formats.checkpoint import student_path
from twostep.models.bundle import Bundle
from twostep.models.saving import save_bundle, save_student
from twostep.networks.adapters import (
    Lora,
    add_lora,
    has_lora,
    load_lora,
    remove_lora,
    remove_loras,
)
from twostep.networks.denoiser import Denoiser
from twostep.networks.probe import check_prediction_type
from twostep.training.device import find_device
from twostep.training.loop import Randomness
from twostep.training.processes import wait, world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder
from twostep.training.shards import gathered, shard
from twostep.training.trackers import track

_RUNNING = "student"
"""The name of the LoRA that is trained; those of finished students, which teach, are called
"8-step".
"""

OnPhase = Callable[[Phase, int, dict[str, float]], None]


def distil(
    recipe: DistillRecipe,
    teacher: Bundle,
    source: Source,
    folder: RunFolder,
    *,
    version: str,
    recipe_name: str,
    start: Denoiser | None = None,
    on_iteration: OnPhase = lambda phase, iteration, figures: None,
) -> dict[int, Path]:
    """Run every phase in order and return the released students' files by their steps; the same
    call resumes.

    The teacher is moved to the recipe's device and its UNet to base_precision, and so is `start`,
    the student that is trained on; None is the teacher itself. With `data` its text encoders go
    back to the CPU. A style is merged into the teacher by the caller. `folder/model` becomes a
    whole model: the teacher, if that is where the chain starts and there is no style, and the
    released students.

    Raises TrainingError or RunError; what was finished before stays in the folder. ModelError where
    the teacher surely predicts something else than its contract, or the recipe, says.
    """
    teacher = _prepare(recipe, teacher.as_teacher(), source, folder, version)
    examples = Examples.of(teacher, recipe.sample_prompts)
    if recipe.cache is not None:  # whose texts are encoded
        for encoder in teacher.text.networks.values():
            encoder.to("cpu")
    written: dict[int, Path] = {}
    with ExitStack() as leaving:
        leaving.callback(remove_loras, teacher.denoiser.network)
        if start is not None:
            leaving.callback(remove_loras, start.network)
            # Where the teacher is, with the style, if there is one, as its running LoRA.
            nn.Module.to(start.network, teacher.denoiser.device, teacher.denoiser.dtype)
            if recipe.style_lora is not None:
                start = replace(
                    start, lora=load_lora(start.network, _RUNNING, recipe.style_lora).name
                )
        for phase, lesson, is_last in lessons(recipe, teacher, source, start=start):
            _train_or_load(phase, lesson, folder, examples, recipe, on_iteration)
            if is_last and phase.student_steps in recipe.release:
                predicts = lesson.student.prediction_type
                contract = student_contract(recipe, phase, teacher.contract, predicts)
                contract = replace(contract, recipe=recipe_name, version=version)
                weights = gathered(lesson.trained.state_dict())
                written[phase.student_steps] = student_path(contract, folder.path / "model")
                if world().is_first:
                    save_student(weights, contract, folder.path / "model")
    return written


def lessons(
    recipe: DistillRecipe, teacher: Bundle, source: Source, *, start: Denoiser | None = None
) -> Iterator[tuple[Phase, Lesson, bool]]:
    """Yield every phase with its lesson, and whether no later one trains a student of so many
    steps.

    Whoever asks for the next phase has trained that student: it goes on, and teaches what learns
    from it.
    """
    finished: dict[int, Denoiser] = {}
    student = start or teacher.denoiser
    for position, phase in enumerate(recipe.phases):
        # What no phase has made yet is taught by the bundle's own denoiser, on a finer grid.
        lesson = Lesson(
            source=source,
            teacher=_frozen(finished.get(phase.teacher_steps, teacher.denoiser)),
            student=_learner(student, phase),
            discriminator=_discriminator(phase, recipe.shard),
        )
        if phase.objective == "convert":
            lesson = replace(lesson, teacher=_frozen(student))
        rest = recipe.phases[position + 1 :]
        yield phase, lesson, all(later.student_steps != phase.student_steps for later in rest)
        student = lesson.student
        if recipe.shard and student.lora is None and any(later.lora_rank for later in rest):
            # A LoRA is put on what is whole.
            student = student.standalone()
        needed = {later.teacher_steps for later in rest}
        if phase.student_steps in needed:
            finished[phase.student_steps] = _kept(student, phase)
        for retired in [finished.pop(steps) for steps in finished.keys() - needed]:
            if retired.lora is not None:
                remove_lora(retired.network, retired.lora)


def _prepare(
    recipe: DistillRecipe, teacher: Bundle, source: Source, folder: RunFolder, version: str
) -> Bundle:
    """Check that the teacher can teach what is asked, put it where it runs, and begin the model
    that is to be made.
    """
    if teacher.contract.role == "student":
        _check_teaching_student(recipe, teacher.contract)
    device = find_device(recipe.device)
    track(folder, recipe.trackers)
    _check_shares(recipe, device)
    # To read beside times and figures.
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {
        name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")
    }
    versions |= {"python": platform.python_version(), "twostep": version}
    folder.log(
        part="environment", machine=card, device=device.type, processes=world().size, **versions
    )
    if (kind := recipe.prediction_type) is not None:
        denoiser, contract = replace(teacher.denoiser, prediction_type=kind), teacher.contract
        teacher = replace(
            teacher, denoiser=denoiser, contract=replace(contract, prediction_type=kind)
        )
    if teacher.contract.role == "teacher" and recipe.style_lora is None and world().is_first:
        save_bundle(teacher, folder.path / "model")  # before it moves, for this makes copies
    teacher = teacher.to(device)
    if teacher.contract.role == "teacher":
        draw = Randomness.at(0, 0)
        x0, conditioning = source.draw(4, draw.tensors, draw.words)
        probe = check_prediction_type(teacher.denoiser, x0.to(device), conditioning.to(device))
        folder.log(part="probe", found=probe.found, sureness=probe.sureness, is_sure=probe.is_sure)
    if recipe.base_precision == "bf16":
        # diffusers' own would warn of nothing
        nn.Module.to(teacher.denoiser.network, torch.bfloat16)
    return teacher


def _check_shares(recipe: DistillRecipe, device: torch.device) -> None:
    """Refuse what several processes cannot do alike: RecipeError."""
    count = world().size
    if count > 1 and device.index is not None:
        raise RecipeError(
            f'device "{device}" is one for {count} processes; "{device.type}" gives each its own.'
        )
    if recipe.shard and count == 1:
        raise RecipeError(
            "shard spreads networks over processes, and this is one: start several, or -o shard=false."
        )
    for phase in recipe.phases:
        if phase.batch_size % count:
            raise RecipeError(
                f"phase {phase.name} has batch_size {phase.batch_size}, which {count} processes cannot share alike. "
                f"batch_size counts the examples of all of them: give a multiple of {count}, or start fewer processes."
            )


def _check_teaching_student(recipe: DistillRecipe, contract: Contract) -> None:
    """Refuse what only a teacher of many steps could do: RecipeError."""
    made = {contract.steps}
    for phase in recipe.phases:
        if phase.teacher_steps not in made and phase.objective != "convert":
            raise RecipeError(
                f"phase {phase.name} wants {phase.teacher_steps} steps of {contract.name}, which draws in exactly "
                f"{contract.steps}. Start from its teacher, or let the phase learn from {max(made)} steps."
            )
        if phase.guidance > 1:
            raise RecipeError(
                f"phase {phase.name} asks for guidance {phase.guidance:g} of {contract.name}, a student: guidance was "
                "distilled into it already; leave it out."
            )
        made.add(phase.student_steps)


def student_contract(
    recipe: DistillRecipe, phase: Phase, teacher: Contract, prediction_type: PredictionType
) -> Contract:
    """Return what the student of this phase says of itself, which is called by its style if it has
    one.

    The base of a LoRA that was trained on a student is that student.
    """
    base = teacher.base
    if recipe.start_steps is not None and phase.lora_rank is not None:
        base = student_name(base, recipe.start_steps)
    return replace(
        teacher,
        name=student_name(
            recipe.style_lora.stem if recipe.style_lora else teacher.base, phase.student_steps
        ),
        role="student",
        steps=phase.student_steps,
        trained_times=trained_times(phase.student_steps),
        prediction_type=prediction_type,
        guidance=1.0,
        base=base,
        lora_rank=phase.lora_rank,
        lora_alpha=None if phase.lora_rank is None else float(phase.lora_rank),
    )


def _train_or_load(
    phase: Phase,
    lesson: Lesson,
    folder: RunFolder,
    examples: Examples,
    recipe: DistillRecipe,
    on_iteration: OnPhase,
) -> None:
    """Train the phase, or take over its weights where the run has finished it before."""
    finished = folder.load(f"{phase.name}-finished")
    wait()  # so that nobody finds what another has just finished
    if finished is not None:
        lesson.trained.load_state_dict(finished["weights"])
    if recipe.shard and phase.lora_rank is None:
        shard(lesson.student.network)
    if finished is not None:
        return

    def show(iteration: int) -> dict[str, float]:
        sheet, looks = examples.show(lesson.student, phase.student_steps)
        if world().is_first:
            path = folder.path / "samples" / f"{phase.name}-{iteration:06d}.png"
            with write_atomically(path) as file:
                sheet.save(file, format="PNG")
        return looks

    train_phase(
        phase,
        lesson,
        folder,
        health=recipe.health,
        on_iteration=lambda iteration, figures: on_iteration(phase, iteration, figures),
        on_checkpoint=show,
    )
    folder.save(f"{phase.name}-finished", {"weights": gathered(lesson.trained.state_dict())})


def _frozen(denoiser: Denoiser) -> Denoiser:
    denoiser.network.requires_grad_(False).eval()
    return denoiser


def _learner(student: Denoiser, phase: Phase) -> Denoiser:
    """Prepare the last student to be trained on: by its running LoRA, or as a whole copy with that
    merged in.
    """
    if phase.lora_rank is None:
        kind = phase.predicts(student.prediction_type)
        student = replace(student.standalone(), prediction_type=kind)
        student.network.requires_grad_(True)
    else:
        if student.lora is None:
            targets = student.backbone.spec.lora_targets
            add_lora(student.network, _RUNNING, rank=phase.lora_rank, targets=targets)
        rank = Lora(student.network, _RUNNING).rank
        if rank != phase.lora_rank:
            raise RecipeError(
                f"phase {phase.name} has lora_rank {phase.lora_rank}; the LoRA that it trains on has {rank}."
            )
        student.network.requires_grad_(False)
        Lora(student.network, _RUNNING).requires_grad_(True)
        student = replace(student, lora=_RUNNING)
    student.checkpoint_gradients(phase.gradient_checkpointing)
    return student


def _discriminator(phase: Phase, sharded: bool) -> Callable[..., Judging]:
    """Return what makes the phase's discriminator of its teacher."""
    if phase.discriminator_lora and phase.lora_rank is not None:
        return partial(LoraDiscriminator, rank=phase.lora_rank)
    return partial(Discriminator, sharded=sharded and phase.lora_rank is None)


def _kept(student: Denoiser, phase: Phase) -> Denoiser:
    """Return the student as it is now, to teach later: a LoRA that runs on is copied to a frozen
    one beside it.
    """
    if student.lora is None or phase.lora_rank is None:
        return student
    name = f"{phase.student_steps}-step"
    kept = Lora(student.network, name)
    if not has_lora(student.network, name):
        targets = Lora(student.network, student.lora).targets
        kept = add_lora(student.network, name, rank=phase.lora_rank, targets=targets)
    kept.load_state_dict(Lora(student.network, student.lora).state_dict())
    return replace(student, lora=name)
