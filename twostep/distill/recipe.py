"""What a distillation recipe says: a list of phases, each with its student, its teacher and its
objective.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from twostep.diffusion import PredictionType
from twostep.distill.health import Health
from twostep.training.loop import LoopSettings
from twostep.training.recipe import Settings
from twostep.training.trackers import Tracker

Objective = Literal["mse", "conditional", "unconditional", "convert"]


class Phase(LoopSettings):
    """One phase of one stage: who learns from whom, judged how, for how long."""

    student_steps: int = Field(gt=0, description="steps of the student that is trained")
    teacher_steps: int = Field(
        gt=0, description="steps of the model that teaches; a multiple of student_steps"
    )
    objective: Objective = Field(
        description="mse | conditional | unconditional | convert (to x0, eq 27-29)"
    )
    guidance: float = Field(
        1.0, ge=1, description="the teacher's guidance; above 1 only where the model teaches"
    )
    lora_rank: int | None = Field(
        None, gt=0, description="train a LoRA of this rank; the whole UNet where not given"
    )
    optimiser: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps its moments in 8 bits"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of Adam")
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="as learning_rate where not given"
    )
    discriminator_lora: bool = Field(
        False, description="its encoder as a LoRA on the shared base: needs lora_rank"
    )
    r1_weight: float = Field(
        0.0, ge=0, description="weight of the approximated R1 penalty; 100 in arXiv 2501.08316"
    )
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm of either network")
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )
    reuse: int = Field(
        1, ge=1, description="times each batch, kept in memory with the teacher's answer, is used"
    )
    early_weight: int = Field(
        1, ge=1, description="weight of t* = 10 against 250, 500, 750 (section 3.7.2)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Phase":
        if self.teacher_steps % self.student_steps:
            raise ValueError(
                f"teacher_steps {self.teacher_steps} is no multiple of student_steps {self.student_steps}; "
                "the student's times must be among the teacher's"
            )
        if self.reuse > 1 and self.judges:
            raise ValueError(
                f"reuse {self.reuse} with objective {self.objective}: only mse and convert keep answers"
            )
        if self.lora_rank is not None and self.student_steps == 1:
            raise ValueError(
                "a 1-step student predicts x0, into which no LoRA turns an eps network: no lora_rank here"
            )
        if self.discriminator_lora and self.lora_rank is None:
            raise ValueError(
                "discriminator_lora without lora_rank: only LoRA students share a base with it"
            )
        return self

    @property
    def name(self) -> str:
        """The phase's name in the log and the checkpoints: "4-unconditional", "4-conditional-lora"."""
        return f"{self.student_steps}-{self.objective}{'' if self.lora_rank is None else '-lora'}"

    def predicts(self, before: PredictionType) -> PredictionType:
        """Return what the student predicts: as the last one, but x0 at one step, where eps errors
        grow 14.6 times.
        """
        return (
            "x0"
            if self.objective == "convert" or (self.student_steps == 1 and before == "eps")
            else before
        )

    @property
    def grids(self) -> tuple[int, int]:
        """Steps of the grids on which student and teacher walk: in a conversion, which is about x0,
        one step to 0.
        """
        return (1, 1) if self.objective == "convert" else (self.student_steps, self.teacher_steps)

    @property
    def judges(self) -> bool:
        """Whether a discriminator judges the student."""
        return self.objective in ("conditional", "unconditional")


class DistillRecipe(Settings):
    """A chain of phases from a teacher to its students."""

    model: str = Field("nano", description="teacher: a built-in name or a model folder")
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, mps; auto is the accelerator if there is one"
    )
    model_steps: int | None = Field(
        None, gt=0, description="start from that model's student of so many steps"
    )
    style_lora: Path | None = Field(
        None, description="a LoRA that the teacher wears, and the student's own starts as"
    )
    start_steps: int | None = Field(
        None, gt=0, description="train on its student of so many steps; the model teaches"
    )
    prediction_type: PredictionType | None = Field(
        None, description="what the teacher predicts if its config is wrong"
    )
    shard: bool = Field(
        False, description="spread what whole-UNet phases train over the processes (FSDP)"
    )
    data: str | None = Field(
        None, description='folder of `twostep cache`, or "module:function" of a `trainer.Source`'
    )
    data_options: dict[str, str | int | float] = Field(
        {}, description="what that function is told beside the teacher"
    )
    release: tuple[int, ...] = Field(
        (8, 4, 2, 1), description="step counts whose students are written to the model"
    )
    sample_prompts: tuple[str, ...] = Field(min_length=1, description="prompts of the sample grids")
    base_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="weights of the teacher, and so of the base that LoRAs share; what is trained is fp32",
    )
    trackers: tuple[Tracker, ...] = Field(
        (), description="tensorboard, wandb: told every logged figure, if installed"
    )
    health: Health = Field(Health(), description="when a run counts as ill, and what then happens")
    phases: tuple[Phase, ...] = Field(min_length=1, description="the chain, in order")

    @property
    def cache(self) -> Path | None:
        """The folder of encoded pictures and texts to train from, if it is one and no function that
        makes them.
        """
        return (
            None if self.data is None or re.fullmatch(r"[\w.]+:\w+", self.data) else Path(self.data)
        )

    @property
    def starts_apart(self) -> bool:
        """Whether the student that is trained on starts from another network than the teacher's."""
        return self.start_steps is not None or self.style_lora is not None

    @model_validator(mode="after")
    def _every_teacher_exists(self) -> "DistillRecipe":
        known: set[int] = set() if self.model_steps is None else {self.model_steps}
        for phase in self.phases:
            made = phase.teacher_steps in known
            if (
                not made
                and phase.teacher_steps < max(known, default=0)
                and phase.objective != "convert"
            ):
                raise ValueError(
                    f"phase {phase.name} learns from a {phase.teacher_steps}-step student that no phase before it "
                    f"makes; there are {sorted(known, reverse=True)}, and above them the model itself"
                )
            if phase.guidance > 1 and (
                made or self.model_steps is not None or phase.objective == "convert"
            ):
                raise ValueError(
                    f"phase {phase.name} asks for guidance {phase.guidance:g} of a student, into which it was already "
                    "distilled; leave it out"
                )
            known.add(phase.student_steps)
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two phases train the same student with the same objective: {', '.join(names)}"
            )
        return self
