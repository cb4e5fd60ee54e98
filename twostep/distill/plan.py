"""The plan of a run: what its stages will take, found out before it starts.

The trainer takes one iteration of every kind of stage on tensors without memory, and the storages
that live at its peak are added up (`training.memory`). What torch's kernels take inside themselves
and what the process itself takes (half a GiB) are not seen.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twostep.data.cache import read_shard
from twostep.distill.beginning import check_shares
from twostep.distill.chain import PreparedStage, prepared_stages, sample_examples
from twostep.distill.landings import without_kept
from twostep.distill.pairs import Source
from twostep.distill.recipe import DistillRecipe, RunRecipe, Stage, TrainedStage
from twostep.distill.roles import Weights
from twostep.distill.samples import Examples
from twostep.distill.trainer import STUDENT, StageTrainer
from twostep.media.codec import Codec
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.device import find_device
from twostep.training.loop import Randomness
from twostep.training.memory import Meter, computing_off_cpu
from twostep.training.offload import bytes_at_once
from twostep.training.optimiser import OptimiserName, state_bytes
from twostep.training.recipe import RecipeError

BYTES_OF_WEIGHT = 4
"""Everything that is trained is float32, and so are its gradients."""

_MEASURED_WITH: OptimiserName = "adamw"
"""The optimiser of the iteration that is measured; what others keep is computed instead."""

_BYTES_IN_SNAPSHOT = 2
"""Of a weight; they are in fp16."""

OnPlanned = Callable[[int, int, str], None]
"""Called with how much of a plan is done, of how much, and what comes next."""

Advice = tuple[Mapping[str, Any], int]
"""Changes of a recipe's settings, and the peak after them in bytes."""

_KIND = {
    "batch_size",
    "accumulate",
    "precision",
    "lora_rank",
    "lora_dropout",
    "lora_targets",
    "gradient_checkpointing",
    "method",
}
"""The settings on which memory depends; stages that share them are measured once."""


def unheard(done: int, total: int, text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Args:
        stage: that is planned.
        evaluations: calls of the teacher per example and iteration.
        trained: parameters by role.
        moments: bytes of the optimisers' states by role, wherever they are.
        memory: bytes by what they are for; they add up to `peak`.
        peak: the most bytes at once in an iteration.
        pictures: the most bytes at once while a checkpoint's pictures are drawn.
    """

    stage: TrainedStage
    evaluations: int | float
    trained: dict[str, int]
    moments: dict[str, int]
    memory: dict[str, int]
    peak: int
    pictures: int

    @property
    def highest(self) -> int:
        """The larger of the two peaks."""
        return max(self.peak, self.pictures)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights and moments of all that is trained, and the average."""
        weights = BYTES_OF_WEIGHT * sum(self.trained.values())
        return weights + sum(self.moments.values()) + self.finished

    @property
    def snapshots(self) -> int:
        """Bytes of the stage's snapshots, which are in fp16 and stay."""
        return self.stage.num_snapshots * _BYTES_IN_SNAPSHOT * self.trained[STUDENT]

    @property
    def finished(self) -> int:
        """Bytes that stay of it once it is finished: the student's weights."""
        return BYTES_OF_WEIGHT * self.trained[STUDENT]


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        stages: the planned stages, in order.
        item_bytes: of one example of the data.
        num_items: of the data; 0 if that is not known.
        device: the type of device it is planned for, as in "cpu" or "cuda".
    """

    stages: tuple[StagePlan, ...]
    item_bytes: int
    num_items: int
    device: str

    @property
    def disk(self) -> int:
        """The most bytes that checkpoints take at once, one being written beside those kept."""
        finished = 0
        most = 0
        for planned in self.stages:
            num_at_once = planned.stage.keep_checkpoints + 1
            most = max(most, finished + num_at_once * planned.checkpoint)
            finished += planned.finished
        return most


@dataclass(frozen=True)
class Measured:
    """What was measured of a kind of stage.

    Args:
        shapes: of every role's parameters.
        added: bytes that an iteration after the first adds at its peak.
        batch: bytes that it leaves behind.
    """

    shapes: dict[str, list[torch.Size]]
    added: int
    batch: int

    @property
    def trained(self) -> dict[str, int]:
        """Parameters by role."""
        return {role: sum(map(math.prod, shapes)) for role, shapes in self.shapes.items()}

    def moments(self, optimiser: OptimiserName) -> dict[str, int]:
        """Return the bytes that an optimiser keeps of each role."""
        return {role: state_bytes(optimiser, shapes) for role, shapes in self.shapes.items()}

    def moments_at_once(self, optimiser: OptimiserName) -> int:
        """Return the most bytes of them on an accelerator at once where they are offloaded."""
        return max(bytes_at_once(optimiser, shapes) for shapes in self.shapes.values())


def plan(
    recipe: DistillRecipe,
    *,
    only: int | None = None,
    processes: int = 1,
    advance: OnPlanned = unheard,
) -> Plan:
    """Return the plan of a recipe, of all its stages or of one.

    Args:
        recipe: what would be run; only the configs of its model are read.
        only: the position of the only stage that is planned; None for all.
        processes: how many train together, of which one is planned.
        advance: called before each stage with how many are planned, of how many, and its name; at
            SDXL's size one that is measured takes half a minute.

    Raises:
        ModelError: not even the model's configs can be found.
        RecipeError: so many processes cannot share a batch alike, or networks are spread over them.
    """
    check_shares(recipe.stages, processes)
    if processes > 1 and recipe.shard and any(stage.lora_rank is None for stage in recipe.stages):
        raise RecipeError(
            "what one of several processes holds of a network that is spread over them is not "
            "planned: give -o shard=false, or plan for one process, which is the most."
        )
    sizes, num_items = read_cache(recipe)
    device = device_type(recipe)
    on_cpu = device == "cpu"
    planned: list[StagePlan] = []
    measured: dict[str, Measured] = {}
    with metering(on_cpu=on_cpu) as meter:
        teacher, start = _outline(recipe)
        recipe = _without_files(recipe)
        source = blank_source(teacher, sizes)
        drawing = max(_measure_drawing(each, meter) for each in sample_examples(recipe, teacher))
        if recipe.cache is not None and not on_cpu:
            _drop_text_encoders(teacher)
        for position, prepared in enumerate(prepared_stages(recipe, teacher, start=start)):
            if only not in (None, position):
                continue
            advance(len(planned), len(recipe.stages) if only is None else 1, prepared.stage.name)
            gc.collect()
            standing = meter.living
            kind = _kind(prepared.stage)
            if kind not in measured:
                measured[kind] = _measure(prepared, source, meter, teacher.codec, processes)
            planned.append(
                plan_stage(
                    prepared.stage,
                    standing,
                    measured[kind],
                    drawing,
                    on_cpu=on_cpu,
                    processes=processes,
                )
            )
    item_bytes = item_size(source, with_texts=recipe.cache is not None)
    return Plan(tuple(planned), item_bytes, num_items, device)


def device_type(recipe: RunRecipe) -> str:
    """Return the type of device that a recipe is planned for."""
    return find_device("auto").type if recipe.device == "auto" else recipe.device.split(":")[0]


@contextmanager
def metering(*, on_cpu: bool) -> Iterator[Meter]:
    """Give tensors no memory in the block, and meter what they would take."""
    with (
        warnings.catch_warnings(),
        Meter() as meter,
        nullcontext() if on_cpu else computing_off_cpu(),
    ):
        # Copying a network asks where its weights are, which is nowhere here.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # A CPU without it is counted as it computes, and says so when it trains.
        warnings.filterwarnings("ignore", message="this CPU has no bfloat16 instructions")
        yield meter


def advise(
    recipe: DistillRecipe, position: int, processes: int = 1, advance: OnPlanned = unheard
) -> list[Advice]:
    """Return changes that make a stage smaller, with its peak after each.

    The best comes first, and all together last. What begins with "method." is a setting of the
    stage's method. `advance` is called before each change is tried, as `plan` calls it.
    """
    changes = _possible_changes(recipe, recipe.stages[position], processes)
    return try_changes(
        changes, lambda change: _changed_peak(recipe, position, change, processes), advance
    )


def try_changes(
    changes: Sequence[Mapping[str, Any]],
    peak_with: Callable[[Mapping[str, Any]], int],
    advance: OnPlanned,
) -> list[Advice]:
    """Return changes with the peak after each: the best first, and all of them together last."""
    together: dict[str, Any] = {}
    for change in changes:
        together |= change
    peaks: list[Advice] = []
    for change in (*changes, together):
        advance(len(peaks), len(changes) + 1, ", ".join(change))
        peaks.append((change, peak_with(change)))
    return [*sorted(peaks[:-1], key=lambda entry: entry[1]), peaks[-1]]


def _possible_changes(recipe: DistillRecipe, stage: Stage, processes: int) -> list[dict[str, Any]]:
    """Return changes of a stage that save memory."""
    changes: list[dict[str, Any]] = []
    if stage.batch_size > 1 and stage.batch_size % (2 * processes) == 0:
        changes.append({"batch_size": stage.batch_size // 2})
    if not stage.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if stage.precision == "fp32":
        changes.append({"precision": "bf16"})
    if stage.lora_rank is not None and recipe.base_precision == "fp32":
        changes.append({"base_precision": "bf16"})
    if stage.optimiser == "adamw" and not (recipe.shard and stage.lora_rank is None):
        changes.append({"optimiser": "adamw8bit"})
    elif stage.optimiser != "adamw8bit" and not stage.offload and not recipe.shard:
        changes.append({"offload": True})
    if stage.student_steps > 1 and stage.lora_rank != 1:
        changes.append({"lora_rank": stage.lora_rank // 2 if stage.lora_rank else 64})
    for saving in stage.make_method().cost().savings:
        changes.append({f"method.{key}": value for key, value in saving.items()})
    return changes


def _changed_peak(
    recipe: DistillRecipe, position: int, change: Mapping[str, Any], processes: int
) -> int:
    """Return a stage's peak after a change, of the recipe or of its stages.

    All stages change that train a LoRA, or a whole network, as this one does: a running LoRA has
    one rank.
    """
    chosen = recipe.stages[position]
    of_recipe = {key: value for key, value in change.items() if key in type(recipe).model_fields}
    of_stages = {key: value for key, value in change.items() if key not in of_recipe}
    stages = list(recipe.stages)
    for i, stage in enumerate(stages):
        is_alike = (stage.lora_rank is None) == (chosen.lora_rank is None)
        if i == position or (stage.student_steps > 1 and is_alike):
            stages[i] = _changed(stage, of_stages)
    changed = recipe.model_copy(update={**of_recipe, "stages": tuple(stages)})
    return plan(changed, only=position, processes=processes).stages[0].highest


def _changed(stage: Stage, change: Mapping[str, Any]) -> Stage:
    """Return a stage with other settings, and its method with those that it has."""
    of_stage: dict[str, Any] = {}
    of_method: dict[str, Any] = {}
    for key, value in change.items():
        setting = key.removeprefix("method.")
        if setting == key:
            of_stage[key] = value
        elif setting in type(stage.method).model_fields:
            of_method[setting] = value
    method = stage.method.model_copy(update=of_method)
    return stage.model_copy(update={**of_stage, "method": method})


def plan_stage(
    stage: TrainedStage,
    standing: int,
    measured: Measured,
    drawing: int,
    *,
    on_cpu: bool,
    processes: int = 1,
) -> StagePlan:
    """Divide a stage's bytes by what they are for.

    Args:
        stage: that is planned.
        standing: bytes before the stage's own networks are made.
        measured: of a stage of this kind, whose optimiser was `_MEASURED_WITH`.
        drawing: bytes that drawing pictures adds.
        on_cpu: whether there is no memory but the main memory.
        processes: for how many it was measured.
    """
    cost = stage.make_method().cost()
    trained = measured.trained
    # The iteration that was measured holds one of the kept batches already.
    kept = measured.batch * max(0, cost.num_kept_batches - 1)
    student = BYTES_OF_WEIGHT * trained[STUDENT]
    moments = measured.moments(stage.optimiser)
    is_offloaded = stage.offload and not on_cpu
    memory = {
        "frozen weights": standing - student,
        "kept batches": kept,
        "student average": student,
    }
    for role, count in trained.items():
        memory[f"{role} weights"] = BYTES_OF_WEIGHT * count
        memory[f"{role} moments"] = 0 if is_offloaded else moments[role]
    if processes > 1:
        memory["gradients"] = BYTES_OF_WEIGHT * sum(trained.values())
    # While the student has its averaged weights, its own are put aside.
    pictures = sum(memory.values()) + student + drawing
    if processes == 1:
        memory["gradients, of one at a time"] = BYTES_OF_WEIGHT * max(trained.values())
    measured_moments = measured.moments(_MEASURED_WITH)
    peak = standing + measured.added + kept - sum(measured_moments.values())
    if is_offloaded:
        # Others' activations may be there while a role takes its step.
        memory["moments, of one portion"] = measured.moments_at_once(stage.optimiser)
        peak += memory["moments, of one portion"]
    else:
        peak += sum(moments.values())
    memory["activations"] = max(0, peak - sum(memory.values()))
    return StagePlan(
        stage=stage,
        evaluations=cost.teacher_evaluations,
        trained=trained,
        moments=moments,
        memory=memory,
        peak=peak,
        pictures=pictures,
    )


def _kind(stage: Stage) -> str:
    return f"{stage.model_dump(include=_KIND)} {stage.guidance > 1}"


def _measure(
    prepared: PreparedStage, source: Source, meter: Meter, codec: Codec, processes: int
) -> Measured:
    """Take one iteration of a stage, as if it were not the first."""
    stage = prepared.stage
    # Nothing is read from a bank or from walks: there are no landings of tensors without memory.
    method = stage.method.model_copy(update=without_kept(stage.method))
    stage = stage.model_copy(update={"method": method})
    if stage.teacher_steps is not None:
        # A teacher keeps nothing but latents from one of its evaluations to the next, so one will
        # do.
        stage = stage.model_copy(update={"teacher_steps": stage.student_steps})
    return measure(
        stage,
        source,
        prepared.teacher,
        prepared.student,
        meter,
        codec=codec,
        processes=processes,
    )


def measure(
    stage: TrainedStage,
    source: Source,
    teacher: Any,
    student: Any,
    meter: Meter,
    *,
    codec: Codec | None = None,
    processes: int = 1,
) -> Measured:
    """Take one iteration, as if it were not the first, and return what it took.

    Args:
        stage: of the training.
        source: of examples without values.
        teacher: as for `StageTrainer`.
        student: likewise.
        meter: under which all of them were made.
        codec: of the teacher.
        processes: how many train together, of which one is measured.
    """
    before = meter.living
    # Other optimisers know no tensors without memory: what they keep is computed.
    plain = {
        "optimiser": _MEASURED_WITH,
        "betas": None,
        "eps": None,
        "offload": False,
        "compile": False,
        "batch_size": stage.batch_size // processes,
    }
    stage = stage.model_copy(update=plain)
    trainer = StageTrainer(stage, source, teacher, student, codec=codec)
    for name, optimiser in trainer.optimisers.items():
        if processes > 1:
            _keep_gradients(optimiser)
        for parameter in trainer.roles[name].weights.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad()
    standing = meter.living
    meter.peak = standing
    trainer.iterate(0, Randomness.at(0, 0))
    batch = meter.living - standing
    shapes = {name: _shapes(trainer.roles[name].weights) for name in trainer.optimisers}
    for name in trainer.optimisers:
        # A student may stay, to teach a later stage; its gradients do not.
        for parameter in trainer.roles[name].weights.parameters():
            parameter.grad = None
    trainer.remove_roles()
    return Measured(shapes, meter.peak - before, batch)


def _keep_gradients(optimiser: torch.optim.Optimizer) -> None:
    """Let gradients lie where they are after a step, as those of several processes do.

    They are views of the buckets that `training.replicas` exchanges, of every network its own.
    """

    def keep(set_to_none: bool = True) -> None:
        pass

    optimiser.zero_grad = keep  # type: ignore[method-assign]


def _shapes(weights: Weights) -> list[torch.Size]:
    """Return the shapes of what is trained."""
    return [parameter.shape for parameter in weights.parameters()]


def _measure_drawing(examples: Examples, meter: Meter) -> int:
    """Return the bytes that drawing adds, by the teacher with its guidance in one step."""
    before = meter.living
    meter.peak = before
    examples.draw(examples.teacher.denoiser, examples.guided, 1)
    return meter.peak - before


def _outline(recipe: DistillRecipe) -> tuple[Bundle, Denoiser | None]:
    """Return the teacher, and the student that is trained on if it is another, without weights."""
    bundle = load_bundle(recipe.model, steps=recipe.model_steps, outline=True)
    teacher = bundle.as_teacher()
    if recipe.base_precision == "bf16":
        for network in teacher.denoiser.networks:
            nn.Module.to(network, torch.bfloat16)
    if not recipe.starts_apart:
        return teacher, None
    start = load_bundle(recipe.model, steps=recipe.start_steps, outline=True).denoiser
    for network in start.networks:
        nn.Module.to(network, teacher.denoiser.dtype)
    return teacher, start


def _without_files(recipe: DistillRecipe) -> DistillRecipe:
    """Return a recipe whose LoRAs start fresh, which takes as much and reads no weights."""
    stages = tuple(stage.model_copy(update={"lora_start": None}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _drop_text_encoders(teacher: Bundle) -> None:
    """Let the text encoders weigh nothing: they are on the CPU while something else computes."""
    for encoder in teacher.text.networks.values():
        for parameter in encoder.parameters():
            parameter.data = torch.empty(0)


def read_cache(recipe: RunRecipe) -> tuple[list[tuple[int, int]], int]:
    """Return the latents' sizes (width, height) in a recipe's cache, and how many items it has."""
    if recipe.cache is None:
        return [], 0
    shards = [read_shard(path) for path in sorted(recipe.cache.glob("shard-*.safetensors"))]
    return [shard.size for shard in shards], sum(len(shard) for shard in shards)


def item_size(source: BlankSource, *, with_texts: bool) -> int:
    """Return the bytes of one example, in 16 bits, with what is written beside it."""
    if not with_texts:
        return 2 * math.prod(source.latents) + 3
    texts = source.conditioning.text.numel() + source.conditioning.pooled.numel()
    return 2 * (math.prod(source.latents) + texts) + 24


@dataclass(frozen=True)
class BlankSource:
    """A source of examples without values, in the shapes of those that a run draws."""

    latents: tuple[int, ...]
    conditioning: Conditioning

    def draw(self, count: int, tensors: object, words: object) -> tuple[Tensor, Conditioning]:
        """Return so many items."""
        return torch.empty(count, *self.latents), Conditioning.cat([self.conditioning] * count)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of as many items."""
        return Conditioning.cat([self.conditioning] * len(like))


def blank_source(teacher: Bundle, sizes: Sequence[tuple[int, int]]) -> BlankSource:
    """Return a source of the largest latents of a cache, or of the teacher's first size."""
    size = teacher.contract.sizes[0]
    first = teacher.latent_shape(*size)
    shapes = [(first[0], height, width) for width, height in sizes]
    largest = max(shapes, key=math.prod, default=first)
    return BlankSource(largest, teacher.conditioning([""], *size))
