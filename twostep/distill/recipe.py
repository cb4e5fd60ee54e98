"""Recipes of distillation: a chain of stages, each with its student, its teacher and its method.

In a recipe `[defaults]` holds what stages have in common, and every `[[stages]]` what differs.
`[stages.method]` is checked by the settings of the method that it names; what several stages of one
method share may stand in `[defaults.methods.NAME]`.
"""

from __future__ import annotations

import difflib
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from twostep.diffusion import PredictionType
from twostep.distill.health import Health
from twostep.distill.method import Method, MethodSettings, Procedure
from twostep.distill.methods.registry import find_method, methods_with_setting, settings_keys
from twostep.distill.samples import SEEDS
from twostep.training.optimiser import SHARDED_OPTIMISERS, OptimiserSettings
from twostep.training.recipe import ANY_TIME, COMPARED, WHILE_RUNNING, Settings
from twostep.training.trackers import Tracker

BUILTIN = "builtin"
"""The value of `data` that means the drawings in the package."""


class TrainedStage(OptimiserSettings):
    """What the trainer needs to know of a stage, whatever is trained in it."""

    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay", json_schema_extra=WHILE_RUNNING
    )
    gradient_clip: float = Field(
        1.0,
        gt=0,
        description="largest gradient norm of any network",
        json_schema_extra=WHILE_RUNNING,
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which batch_size is computed one after the other, for less memory",
        json_schema_extra=WHILE_RUNNING,
    )
    offload: bool = Field(
        False,
        description="keep the optimisers' state in main memory between steps, for less memory of "
        "the accelerator; steps take longer",
        json_schema_extra=ANY_TIME,
    )
    compile: bool = Field(
        False,
        description="compile the blocks of all networks: a minute or two at first, less for every "
        "iteration",
        json_schema_extra=WHILE_RUNNING,
    )
    sample_every: int | None = Field(
        None,
        gt=0,
        description="iterations between sheets of samples, from iteration 0 on, beside those of "
        "checkpoints",
        json_schema_extra=ANY_TIME,
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainedStage:
        if self.offload and self.optimiser == "adamw8bit":
            raise ValueError(
                "offload is for state of 32 bits: leave it out, or choose another optimiser than "
                "adamw8bit"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        return self

    @property
    @abstractmethod
    def name(self) -> str:
        """The stage's name in the log, the checkpoints and the samples."""

    @abstractmethod
    def make_method(self) -> Procedure[Any]:
        """Return what is done in every iteration; ValueError where settings do not fit."""

    @property
    def num_snapshots(self) -> int:
        """How many files of the student are kept on the way."""
        return 0

    @property
    def dropout(self) -> float:
        """The share of its inputs that the student's LoRA drops, if it is one."""
        return 0.0


class Stage(TrainedStage):
    """One stage: which student learns from whom, by which method, for how long."""

    student_steps: int = Field(gt=0, description="steps of the student that is trained")
    teacher_steps: int | None = Field(
        None,
        gt=0,
        description="steps of the model that teaches: a finished student, or the model itself on "
        "a finer grid; not given where the method has no use for it",
    )
    teacher: Literal["chain", "first"] = Field(
        "chain",
        description="who teaches: the chain's own student of teacher_steps if there is one, or the "
        "first teacher in so many steps",
    )
    method: SerializeAsAny[MethodSettings] = Field(
        description="the method's own table, with its name"
    )
    guidance: float = Field(
        1.0, ge=1, description="the teacher's guidance; above 1 only where the model teaches"
    )
    lora_rank: int | None = Field(
        None, gt=0, description="train a LoRA of this rank; the whole network where not given"
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="what the LoRA is multiplied with, times its rank; the rank if none"
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of its layers' inputs that the LoRA does not see in training",
        json_schema_extra=WHILE_RUNNING,
    )
    lora_targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="the layers that get the LoRA: groups, names, endings or patterns of names; "
        "all that the network offers if not given",
    )
    lora_start: Path | None = Field(
        None,
        description="a LoRA of the same rank that the student's starts as",
        json_schema_extra=COMPARED,
    )
    snapshot_every: int | None = Field(
        None,
        gt=0,
        description="iterations between files of the student, for `twostep export RUN --at N`",
        json_schema_extra=ANY_TIME,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="less memory for activations, about a third slower",
        json_schema_extra=WHILE_RUNNING,
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_of_methods_stand_in_their_table(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values.keys() - cls.model_fields.keys():
                if owners := methods_with_setting(key):
                    raise ValueError(
                        f"{key} is a setting of the method {' or '.join(owners)}: write it into "
                        "the stage's own table, [stages.method]"
                    )
        return values

    @field_validator("method", mode="before")
    @classmethod
    def _checked_by_the_method(cls, values: Any) -> Any:
        return _method_settings(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _fits_together(self) -> Stage:
        if self.lora_rank is not None and self.student_steps == 1:
            raise ValueError(
                "a 1-step student predicts x0, into which no LoRA turns an eps network: no "
                "lora_rank here"
            )
        if self.lora_rank is None:
            for key in ("lora_alpha", "lora_dropout", "lora_targets", "lora_start"):
                if getattr(self, key):
                    raise ValueError(f"{key} is of a LoRA: give lora_rank too, or leave it out")
        self.make_method()
        return self

    @property
    def name(self) -> str:
        """The stage's name in the log, the checkpoints and the samples.

        Steps, method, the method's variant if it has any, and "lora" if one is trained, as in
        "32-regression" or "4-adversarial-conditional-lora".
        """
        words = [str(self.student_steps), find_method(self.method.name).name]
        if self.method.variant is not None:
            words.append(self.method.variant)
        if self.lora_rank is not None:
            words.append("lora")
        return "-".join(words)

    def make_method(self) -> Method[Any]:
        """Return the stage's method; ValueError where its settings do not fit the stage."""
        return find_method(self.method.name)(self)

    @property
    def num_snapshots(self) -> int:
        """How many files of the student are kept on the way."""
        return 0 if self.snapshot_every is None else self.iterations // self.snapshot_every

    @property
    def dropout(self) -> float:
        """The share of its inputs that the student's LoRA drops."""
        return self.lora_dropout

    def check_teacher_steps(self) -> None:
        """Check that a teacher's grid contains the student's times; ValueError if it does not."""
        if self.teacher_steps is None:
            raise ValueError(
                f"the method {self.method.name!r} needs teacher_steps: who teaches, and how finely"
            )
        if self.teacher_steps % self.student_steps:
            raise ValueError(
                f"teacher_steps {self.teacher_steps} is no multiple of student_steps "
                f"{self.student_steps}; the student's times must be among the teacher's"
            )


class RunRecipe(Settings):
    """What every recipe says that learns from a model: which one, where, and from what data."""

    @property
    @abstractmethod
    def trained_stages(self) -> tuple[TrainedStage, ...]:
        """All that is trained, in order."""

    model: str = Field(
        "nano",
        description="teacher: a built-in name or a model folder",
        json_schema_extra=COMPARED,
    )
    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:1, mps; auto is the accelerator if there is one",
        json_schema_extra=ANY_TIME,
    )
    data: str | None = Field(
        None,
        description='folder of `twostep cache`, "builtin" for the drawings in the package, or '
        '"module:function" that makes a `distill.pairs.Source`',
        json_schema_extra=COMPARED,
    )
    data_options: dict[str, str | int | float] = Field(
        {},
        description="arguments of that function beside the teacher; of a cache caption_dropout, "
        "the share of items that are drawn without their caption",
    )
    trackers: tuple[Tracker, ...] = Field(
        (),
        description="tensorboard, wandb: get every logged figure, if installed",
        json_schema_extra=ANY_TIME,
    )
    health: Health = Field(
        Health(),
        description="when a run counts as ill, and what then happens",
        json_schema_extra=ANY_TIME,
    )

    @property
    def cache(self) -> Path | None:
        """The folder of encoded pictures and texts to train from; None if a function makes data."""
        if self.data in (None, BUILTIN) or re.fullmatch(r"[\w.]+:\w+", self.data):
            return None
        return Path(self.data)


class DistillRecipe(RunRecipe):
    """A chain of stages from a teacher to its students."""

    model_steps: int | None = Field(
        None, gt=0, description="start from that model's student of so many steps"
    )
    style_lora: Path | None = Field(
        None,
        description="a LoRA that is merged into the teacher, and that the student's LoRA starts as",
        json_schema_extra=COMPARED,
    )
    start_steps: int | None = Field(
        None, gt=0, description="train on its student of so many steps; the model teaches"
    )
    prediction_type: PredictionType | None = Field(
        None, description="what the teacher predicts if its config is wrong"
    )
    shard: bool = Field(
        False, description="spread what whole-network stages train over the processes (FSDP)"
    )
    release: tuple[int, ...] = Field(
        (8, 4, 2, 1),
        description="step counts whose students are written to the model",
        json_schema_extra=ANY_TIME,
    )
    sample_prompts: tuple[str, ...] = Field(
        min_length=1, description="prompts of the sample grids", json_schema_extra=ANY_TIME
    )
    base_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="weights of the teacher, and so of the base that LoRAs share; what is trained "
        "is fp32",
    )
    sample_sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        (),
        description="width and height of the samples, one or several; the model's first size where "
        "not given, and the first is the one whose looks count",
        json_schema_extra=ANY_TIME,
    )
    sample_seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        SEEDS,
        min_length=2,
        description="seeds of every sample prompt; at least two, which show whether pictures vary",
        json_schema_extra=ANY_TIME,
    )
    stages: tuple[Stage, ...] = Field(min_length=1, description="the chain, in order")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "phases" in values:
            raise ValueError(
                "[[phases]] and objective were replaced by [[stages]] and [stages.method]. "
                "`twostep recipe --migrate OLD.toml` prints this recipe rewritten"
            )
        if "defaults" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "defaults"}
        defaults = dict(values["defaults"])
        by_method = defaults.pop("methods", {})
        _check_defaults(defaults, by_method)
        stages = [
            _filled(stage, defaults, by_method) if isinstance(stage, Mapping) else stage
            for stage in rest.get("stages", ())
        ]
        return {**rest, "stages": stages}

    @model_validator(mode="after")
    def _every_teacher_exists(self) -> DistillRecipe:
        known = set() if self.model_steps is None else {self.model_steps}
        for stage in self.stages:
            self._check_teacher(stage, known)
            known.add(stage.student_steps)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two stages train the same student by the same method: {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _one_lora_starts_once(self) -> DistillRecipe:
        running: Path | None = None
        is_running = False
        for stage in self.stages:
            if stage.lora_start is not None and self.style_lora is not None:
                raise ValueError("both style_lora and lora_start say what the LoRA starts as")
            if is_running and stage.lora_start not in (None, running):
                raise ValueError(
                    f"stage {stage.name} cannot start from {stage.lora_start}: it trains the LoRA "
                    "of the stage before it on. Say lora_start there"
                )
            if not is_running:
                running = stage.lora_start
            is_running = stage.lora_rank is not None
        return self

    @model_validator(mode="after")
    def _shards_have_optimisers(self) -> DistillRecipe:
        sharded = [stage for stage in self.stages if self.shard and stage.lora_rank is None]
        for stage in sharded:
            if stage.offload:
                raise ValueError(
                    f"stage {stage.name} asks for offload, which takes no shards: leave it out, "
                    "or set shard to false"
                )
            if stage.optimiser not in SHARDED_OPTIMISERS:
                raise ValueError(
                    f"stage {stage.name} asks for {stage.optimiser}, which needs whole networks "
                    f"and not the shards of shard = true: choose {' or '.join(SHARDED_OPTIMISERS)}"
                )
        return self

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """All that is trained, in order."""
        return self.stages

    def _check_teacher(self, stage: Stage, known: set[int]) -> None:
        """Check a stage against the steps of the students that there are before it."""
        learns_from_itself = find_method(stage.method.name).learns_from_itself
        is_student = stage.teacher_steps in known and stage.teacher == "chain"
        fewest_of_the_model = 0 if stage.teacher == "first" else max(known, default=0)
        is_model = stage.teacher_steps is None or stage.teacher_steps >= fewest_of_the_model
        if not is_student and not is_model:
            raise ValueError(
                f"stage {stage.name} learns from a {stage.teacher_steps}-step student that no "
                f"stage before it makes; there are {sorted(known, reverse=True)}, and above them "
                "the model itself"
            )
        if stage.guidance > 1 and (
            is_student or learns_from_itself or self.model_steps is not None
        ):
            raise ValueError(
                f"stage {stage.name} asks for guidance {stage.guidance:g} of a student, into which "
                "it was already distilled; leave it out"
            )

    @property
    def starts_apart(self) -> bool:
        """Whether the student that is trained on starts from another network than the teacher's."""
        return self.start_steps is not None or self.style_lora is not None


def _method_settings(values: Mapping[str, Any]) -> MethodSettings:
    """Return a method's table as its own settings; ValueError names what is wrong in it."""
    name = values.get("name")
    if not isinstance(name, str):
        raise ValueError('a method needs a name, as in name = "regression"')
    known = settings_keys(name)
    for key in values.keys() - known.keys():
        raise ValueError(_unknown_setting(key, name, known))
    try:
        return find_method(name).Settings.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        ]
        raise ValueError("; ".join(problems)) from error


def _unknown_setting(key: str, name: str, known: Mapping[str, Any]) -> str:
    """Return what to do about a key that a method does not have."""
    message = f"the method {name!r} has no setting {key!r}."
    if owners := methods_with_setting(key):
        message += f" It is one of {' and '.join(map(repr, owners))}."
    if near := difflib.get_close_matches(key, known, 1):
        return f"{message} Did you mean {near[0]!r}?"
    return f"{message} {name!r} has {', '.join(known)}."


def _check_defaults(defaults: Mapping[str, Any], by_method: Mapping[str, Any]) -> None:
    """Refuse keys that no stage and no method has: ValueError."""
    for key in defaults.keys() - Stage.model_fields.keys():
        near = difflib.get_close_matches(key, Stage.model_fields, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if owners := methods_with_setting(key):
            hint = f" It belongs in [defaults.methods.{owners[0]}]."
        raise ValueError(f"defaults.{key}: no such key.{hint}")
    for name, settings in by_method.items():
        known = settings_keys(name)
        for key in settings.keys() - known.keys():
            raise ValueError(f"defaults.methods.{name}: {_unknown_setting(key, name, known)}")


def _filled(
    stage: Mapping[str, Any], defaults: Mapping[str, Any], by_method: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a stage's values with the defaults where it says nothing."""
    values = {**defaults, **stage}
    method = values.get("method")
    if isinstance(method, Mapping):
        values["method"] = {**by_method.get(str(method.get("name")), {}), **method}
    return values
