"""What travels between the server's own API and its client: bodies and answers, as both read them.

Neither a web framework nor torch is needed here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from twostep.pipeline.request import MAX_BATCH

JOBS_PATH = "/api/v1/jobs"
CAPABILITIES_PATH = "/api/v1/capabilities"

JobState = Literal["queued", "drawing", "done", "failed", "cancelled"]
"""Where a job stands. The last three are ends."""


class JobBody(BaseModel):
    """A job as it is posted. What is left out is the model's own; a seed is then picked.

    `image` and `mask` are files in base64; the mask is white where the image is changed. `previews`
    brings a small picture with every step. After `seconds` the job fails if it is not done.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    num_images: int = Field(default=1, ge=1, le=MAX_BATCH)
    seed: int | None = Field(default=None, ge=0, lt=2**63 - MAX_BATCH)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_prompt: str = ""
    width: int | None = Field(default=None, ge=1, le=2**16)
    height: int | None = Field(default=None, ge=1, le=2**16)
    image: str | None = None
    strength: float | None = Field(default=None, gt=0, le=1)
    mask: str | None = None
    sampler: str | None = None
    loras: tuple[str, ...] = ()
    previews: bool = False
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuse half letters, which can neither be written down nor sent back."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"it is no text: {error.reason}") from error
        return value


class JobAnswer(BaseModel):
    """How a job stands. All from `images` on is there once it is done, `error` if it failed.

    `events` and `images` are addresses on the server. `milliseconds` are those of each stage.
    """

    id: str
    state: JobState
    seed: int
    events: str
    error: str | None = None
    images: list[str] | None = None
    seeds: list[int] | None = None
    checkpoint: str | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    milliseconds: dict[str, int] | None = None
    warnings: list[str] | None = None


class CheckpointAnswer(BaseModel):
    """A teacher or a student of a model, as its contract has it. Sizes are [width, height]."""

    name: str
    role: str
    steps: int
    guidance: float
    sizes: list[tuple[int, int]]
    prediction_type: str


class ModelAnswer(BaseModel):
    """A model that is served, with its checkpoints."""

    name: str
    checkpoints: list[CheckpointAnswer]


class Limits(BaseModel):
    """The most that one job may ask for."""

    num_images: int
    prompt_letters: int
    steps: int


class Capabilities(BaseModel):
    """What can be asked for."""

    default_model: str
    models: list[ModelAnswer]
    loras: list[str]
    limits: Limits
