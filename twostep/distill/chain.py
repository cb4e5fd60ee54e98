"""The chain of stages: each student teaches the next, and what is released is written down.

Every checkpoint is shown beside the first teacher, in `samples/` of the run folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from twostep.contract import Contract, student_name
from twostep.data.cache import fingerprint_of
from twostep.distill.beginning import begin_run
from twostep.distill.methods.registry import find_method
from twostep.distill.pairs import Fingerprinted, Source
from twostep.distill.recipe import DistillRecipe, Stage
from twostep.distill.roles import file_weights, frozen_lora_copy, weights_of
from twostep.distill.samples import Examples, SampleSheets, sheets_in
from twostep.distill.snapshots import has_snapshot, save_snapshot
from twostep.distill.trainer import train_stage
from twostep.formats.checkpoint import resolve, student_path
from twostep.models.bundle import Bundle, modules_of
from twostep.models.saving import save_bundle, save_student
from twostep.networks.adapters import (
    Lora,
    add_lora,
    choose_layers,
    load_lora,
    remove_lora,
    remove_loras,
)
from twostep.networks.denoiser import Denoiser
from twostep.networks.probe import check_prediction_type
from twostep.training.checkpoints import digest_files
from twostep.training.loop import Periodic, Randomness
from twostep.training.processes import wait, world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import FINISHED, RunFolder
from twostep.training.shards import gathered, shard

_RUNNING = "student"
"""The name of the LoRA in training; those of finished students that teach are called "8-step"."""

OnStage = Callable[[Stage, int, dict[str, float]], None]
"""Called after every iteration with its stage, the number of iterations done, and its figures."""


@dataclass(frozen=True, eq=False)
class PreparedStage:
    """A stage with the models that take part.

    Args:
        stage: what to do.
        teacher: frozen.
        student: ready to be trained.
        is_last: whether no later stage trains a student of so many steps.
        continues: the stage before, if it trains the same student by the same method.
        is_continued: whether the stage after does.
    """

    stage: Stage
    teacher: Denoiser
    student: Denoiser
    is_last: bool
    continues: Stage | None = None
    is_continued: bool = False


def distil(
    recipe: DistillRecipe,
    teacher: Bundle,
    source: Source,
    folder: RunFolder,
    *,
    version: str,
    recipe_name: str,
    start: Denoiser | None = None,
    accept_replaced: bool = False,
    on_iteration: OnStage = lambda stage, iteration, figures: None,
) -> dict[int, Path]:
    """Run every stage in order and return the files of the released students by their steps.

    The same call with the same folder resumes. `folder/model` becomes a whole model: the teacher,
    if that is where the chain starts and there is no style, and the released students.

    Args:
        recipe: what to do.
        teacher: the first teacher, a style merged into it. It is moved to the recipe's device, its
            network to base_precision; with a cache as data its text encoders go back to the CPU.
        source: of the examples.
        folder: takes checkpoints, log, samples and the model.
        version: of this package, for contracts and the log.
        recipe_name: for contracts.
        start: the student that is trained on; None to start from the teacher. It is moved alike.
        accept_replaced: whether to go on where teacher or data were replaced since the run began.
        on_iteration: called after every iteration.

    Raises:
        TrainingError: a loss is no finite number, or health asks for a pause.
        StoppedError: training was asked to stop.
        RunError: the folder cannot be written or holds something else, or teacher or data were
            replaced. What was finished before stays there in either case.
        ModelError: the teacher surely predicts something else than its contract, or the recipe,
            says.
    """
    contents = fingerprints(recipe, teacher, source, start)
    folder.compare_contents(contents, accept=accept_replaced)
    teacher = _prepare(recipe, teacher.as_teacher(), source, folder, version=version)
    examples = sample_examples(recipe, teacher)
    if recipe.cache is not None:
        # The texts of a cache are encoded already.
        for encoder in teacher.text.networks.values():
            encoder.to("cpu")
    written: dict[int, Path] = {}
    with ExitStack() as stack:
        stack.callback(remove_loras, teacher.denoiser.network)
        if start is not None:
            stack.callback(remove_loras, start.network)
            start = _prepare_start(recipe, start, teacher.denoiser)
        for prepared in prepared_stages(recipe, teacher, start=start):
            contract = student_contract(recipe, prepared, teacher.contract)
            contract = replace(contract, recipe=recipe_name, version=version)
            _train_or_load(
                prepared,
                source,
                folder,
                contract=contract,
                examples=examples,
                recipe=recipe,
                on_iteration=on_iteration,
            )
            stage = prepared.stage
            if prepared.is_last and stage.student_steps in recipe.release:
                path = _release(prepared.student, contract, folder)
                written[stage.student_steps] = path
    return written


def fingerprints(
    recipe: DistillRecipe, teacher: Bundle, source: Source, start: Denoiser | None
) -> dict[str, str]:
    """Return what tells a run's teacher and data from others, by the keys that name them.

    Data that a function makes has a fingerprint only if its source says one.
    """
    networks = [*teacher.denoiser.networks, *modules_of(teacher.codec)]
    networks += teacher.text.networks.values()
    if start is not None:
        networks += start.networks
    key = "model" if recipe.style_lora is None else "model or style_lora"
    contents = {key: fingerprint_of(networks)}
    for position, stage in enumerate(recipe.stages):
        if stage.lora_start is not None:
            path = resolve(stage.lora_start).path
            contents[f"stages.{position}.lora_start"] = digest_files([path])[path.name]
    if isinstance(source, Fingerprinted):
        contents["data"] = source.fingerprint()
    return contents


def sample_examples(recipe: DistillRecipe, teacher: Bundle) -> tuple[Examples, ...]:
    """Return the sample prompts of a recipe, encoded at each of its sizes.

    Raises:
        ContractError: the teacher does not draw one of the sizes.
    """
    sizes = recipe.sample_sizes or teacher.contract.sizes[:1]
    for width, height in sizes:
        for warning in teacher.contract.check(None, None, width, height):
            warnings.warn(warning, stacklevel=2)
    return tuple(
        Examples.of(teacher, recipe.sample_prompts, size=size, seeds=recipe.sample_seeds)
        for size in sizes
    )


def prepared_stages(
    recipe: DistillRecipe, teacher: Bundle, *, start: Denoiser | None = None
) -> Iterator[PreparedStage]:
    """Yield every stage with its teacher and its student.

    Whoever asks for the next one has trained that student: it is trained on, and teaches the
    stages that learn from it.
    """
    finished: dict[int, Denoiser] = {}
    student = start or teacher.denoiser
    for position, stage in enumerate(recipe.stages):
        rest = recipe.stages[position + 1 :]
        prepared = _prepare_stage(
            stage,
            rest,
            finished=finished,
            last_student=student,
            first_teacher=teacher.denoiser,
        )
        before = recipe.stages[position - 1] if position else None
        prepared = replace(
            prepared,
            continues=before if before is not None and _goes_on(before, stage) else None,
            is_continued=bool(rest) and _goes_on(stage, rest[0]),
        )
        yield prepared
        student = prepared.student
        if recipe.shard and student.lora is None and any(later.lora_rank for later in rest):
            # A LoRA can only be put on whole weights.
            student = student.standalone()
        needed = {later.teacher_steps for later in rest}
        if stage.student_steps in needed:
            finished[stage.student_steps] = _finished(student, stage)
        for steps in finished.keys() - needed:
            retired = finished.pop(steps)
            if retired.lora is not None:
                remove_lora(retired.network, retired.lora)


def _goes_on(stage: Stage, after: Stage) -> bool:
    """Tell whether a stage goes on with the student and the method of the one before it."""
    return (stage.student_steps, stage.method.name) == (after.student_steps, after.method.name)


def _prepare_stage(
    stage: Stage,
    rest: tuple[Stage, ...],
    *,
    finished: dict[int, Denoiser],
    last_student: Denoiser,
    first_teacher: Denoiser,
) -> PreparedStage:
    """Choose a stage's teacher and make its student.

    Args:
        stage: that is prepared.
        rest: the stages after it.
        finished: students that teach, by their steps.
        last_student: the student of the stage before, or where the chain starts.
        first_teacher: teaches on any grid for which there is no finished student.
    """
    if find_method(stage.method.name).learns_from_itself:
        teacher = last_student
    elif stage.teacher == "first":
        teacher = first_teacher
    elif stage.teacher_steps is not None:
        teacher = finished.get(stage.teacher_steps, first_teacher)
    else:
        teacher = first_teacher
    teacher.network.requires_grad_(False).eval()
    student = _learner(last_student, stage)
    is_last = all(later.student_steps != stage.student_steps for later in rest)
    return PreparedStage(stage, teacher, student, is_last)


def _learner(last_student: Denoiser, stage: Stage) -> Denoiser:
    """Return the student that a stage trains: the running LoRA, or a whole copy, LoRA merged in."""
    prediction_type = stage.make_method().describe(last_student).prediction_type
    if stage.lora_rank is None:
        student = replace(last_student.standalone(), prediction_type=prediction_type)
        student.network.requires_grad_(True)
    else:
        student = _lora_learner(last_student, stage, stage.lora_rank)
    student.checkpoint_gradients(stage.gradient_checkpointing)
    return student


def _lora_learner(last_student: Denoiser, stage: Stage, rank: int) -> Denoiser:
    """Return the last student with its running LoRA ready to be trained, put on if need be."""
    network = last_student.network
    possible = last_student.backbone.spec.lora_targets
    layers = None
    if stage.lora_targets is not None:
        layers = choose_layers(network, stage.lora_targets, possible)
    if last_student.lora is None and stage.lora_start is not None:
        lora = load_lora(network, _RUNNING, stage.lora_start, alpha=stage.lora_alpha, only=layers)
    elif last_student.lora is None:
        lora = add_lora(
            network, _RUNNING, rank=rank, alpha=stage.lora_alpha, targets=layers or possible
        )
    else:
        lora = Lora(network, _RUNNING)
    _check_lora(lora, stage, layers)
    network.requires_grad_(False)
    lora.requires_grad_(True)
    return replace(last_student, lora=_RUNNING)


def _check_lora(lora: Lora, stage: Stage, layers: list[str] | None) -> None:
    """Refuse to train a LoRA on that is not the one which a stage describes: RecipeError."""
    name = f"stage {stage.name}"
    if lora.rank != stage.lora_rank:
        raise RecipeError(
            f"{name} has lora_rank {stage.lora_rank}; the LoRA that it trains on has {lora.rank}."
        )
    if stage.lora_alpha not in (None, lora.alpha):
        raise RecipeError(
            f"{name} has lora_alpha {stage.lora_alpha:g}; the LoRA that it trains on has "
            f"{lora.alpha:g}. One LoRA runs through all stages."
        )
    if layers is not None and set(layers) != lora.layers:
        raise RecipeError(
            f"{name} has other lora_targets ({len(layers)} layers) than the LoRA that it trains on "
            f"({len(lora.layers)} layers). One LoRA runs through all stages."
        )


def _finished(student: Denoiser, stage: Stage) -> Denoiser:
    """Return a student as it is now, to teach later: a LoRA that is trained on is copied."""
    if student.lora is None or stage.lora_rank is None:
        return student
    return frozen_lora_copy(student, f"{stage.student_steps}-step")


def _prepare(
    recipe: DistillRecipe, teacher: Bundle, source: Source, folder: RunFolder, *, version: str
) -> Bundle:
    """Check that the teacher can teach what is asked, move it, and begin the run's model."""
    is_student = teacher.contract.role == "student"
    if is_student:
        _check_teaching_student(recipe, teacher.contract)
    device = begin_run(recipe, folder, version=version, shard=recipe.shard)
    if recipe.prediction_type is not None:
        teacher = replace(
            teacher,
            denoiser=replace(teacher.denoiser, prediction_type=recipe.prediction_type),
            contract=replace(teacher.contract, prediction_type=recipe.prediction_type),
        )
    if not is_student and recipe.style_lora is None and world().is_first:
        # Before it moves, because saving makes copies.
        save_bundle(teacher, folder.path / "model")
    teacher = teacher.to(device)
    if not is_student:
        _check_prediction(teacher, source, folder, device)
    if recipe.base_precision == "bf16":
        # As a plain module: diffusers' own `to` warns of layers that should stay in float32.
        for network in teacher.denoiser.networks:
            nn.Module.to(network, torch.bfloat16)
    return teacher


def _prepare_start(recipe: DistillRecipe, start: Denoiser, teacher: Denoiser) -> Denoiser:
    """Move the student that is trained on to where the teacher is; a style is its running LoRA."""
    for network in start.networks:
        nn.Module.to(network, teacher.device, teacher.dtype)
    if recipe.style_lora is None:
        return start
    lora = load_lora(start.network, _RUNNING, recipe.style_lora)
    return replace(start, lora=lora.name)


def _check_teaching_student(recipe: DistillRecipe, contract: Contract) -> None:
    """Refuse what only a teacher of many steps could do: RecipeError."""
    known = {contract.steps}
    for stage in recipe.stages:
        known_to_teacher = {contract.steps} if stage.teacher == "first" else known
        if stage.teacher_steps is not None and stage.teacher_steps not in known_to_teacher:
            raise RecipeError(
                f"stage {stage.name} wants {stage.teacher_steps} steps of {contract.name}, which "
                f"draws in exactly {contract.steps}. Start from its teacher, or let the stage "
                f"learn from {max(known_to_teacher)} steps."
            )
        if stage.guidance > 1:
            raise RecipeError(
                f"stage {stage.name} asks for guidance {stage.guidance:g} of {contract.name}, a "
                "student: guidance was distilled into it already; leave it out."
            )
        known.add(stage.student_steps)


def _check_prediction(
    teacher: Bundle, source: Source, folder: RunFolder, device: torch.device
) -> None:
    """Log what a teacher seems to predict; ModelError if that surely is not what it declares."""
    random = Randomness.at(0, 0)
    x0, conditioning = source.draw(4, random.tensors, random.words)
    probe = check_prediction_type(teacher.denoiser, x0.to(device), conditioning.to(device))
    folder.log(
        part="probe", found=probe.prediction_type, sureness=probe.sureness, is_sure=probe.is_sure
    )


def _train_or_load(
    prepared: PreparedStage,
    source: Source,
    folder: RunFolder,
    *,
    contract: Contract,
    examples: Sequence[Examples],
    recipe: DistillRecipe,
    on_iteration: OnStage,
) -> None:
    """Train a stage's student, or take over its weights if the run has finished it before."""
    stage = prepared.stage
    student = prepared.student
    weights = weights_of(student)
    finished = folder.load(f"{stage.name}{FINISHED}")
    # So that no process finds what another one has just finished.
    wait()
    if finished is not None:
        weights.load_state_dict(finished["weights"])
    sharded = recipe.shard and stage.lora_rank is None
    if sharded:
        shard(student.network)
    if finished is not None:
        # Whoever finished it may have been killed before it deleted what is of no use any more.
        folder.delete(stage.name)
        return

    sheets, samples = _samples_of(stage, student, examples, folder)
    snapshots = Periodic(
        "snapshot",
        stage.snapshot_every,
        act=lambda iteration: save_snapshot(student, contract, folder, stage.name, iteration),
        is_done=lambda iteration: has_snapshot(folder, stage.name, iteration),
    )
    train_stage(
        stage,
        source,
        teacher=prepared.teacher,
        student=student,
        folder=folder,
        sharded=sharded,
        codec=examples[0].teacher.codec,
        health=recipe.health,
        continues=prepared.continues,
        is_continued=prepared.is_continued,
        periodic=(snapshots, samples),
        on_iteration=lambda iteration, figures: on_iteration(stage, iteration, figures),
        on_checkpoint=sheets.examine,
    )
    folder.save(f"{stage.name}{FINISHED}", {"weights": gathered(weights.state_dict())})
    # Moments and averages are of no use any more, and weigh many times as much as the student.
    wait()
    folder.delete(stage.name)


def _samples_of(
    stage: Stage, student: Denoiser, examples: Sequence[Examples], folder: RunFolder
) -> tuple[SampleSheets[Examples], Periodic]:
    """Return the sheets of a stage's student, and when they are drawn beside its checkpoints."""
    changes = stage.make_method().describe(student)
    times = changes.times_from_noise(stage.student_steps, student.schedule)
    return sheets_in(
        folder, stage, examples, draw=lambda each: each.show(student, times, changes.sampler)
    )


def _release(student: Denoiser, contract: Contract, folder: RunFolder) -> Path:
    """Write a student into the run's model and return its file; all processes must call it."""
    weights = gathered(file_weights(student))
    if world().is_first:
        save_student(weights, contract, folder.path / "model")
    return student_path(contract, folder.path / "model")


def student_contract(recipe: DistillRecipe, prepared: PreparedStage, teacher: Contract) -> Contract:
    """Return the contract of a stage's student.

    It is named after its style, if it has one. The base of a LoRA that was trained on a student is
    that student.

    Args:
        recipe: of the chain.
        prepared: the stage.
        teacher: the contract of the first teacher.
    """
    stage = prepared.stage
    changes = stage.make_method().describe(prepared.student)
    base = teacher.base
    if recipe.start_steps is not None and stage.lora_rank is not None:
        base = student_name(base, recipe.start_steps)
    family = teacher.base if recipe.style_lora is None else recipe.style_lora.stem
    lora_alpha = None if stage.lora_rank is None else float(stage.lora_rank)
    return replace(
        teacher,
        name=student_name(family, stage.student_steps),
        role="student",
        steps=stage.student_steps,
        trained_times=changes.trained_times,
        sampler=changes.sampler,
        sampling_times=changes.sampling_times,
        prediction_type=prepared.student.prediction_type,
        guidance=1.0,
        base=base,
        lora_rank=stage.lora_rank,
        lora_alpha=lora_alpha,
    )
