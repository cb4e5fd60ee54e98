"""What travels between the server's own API and its client: bodies and answers, as both read them.

Neither a web framework nor torch is needed here.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from twostep.pipeline.request import MAX_BATCH

JOBS_PATH = "/api/v1/jobs"
CAPABILITIES_PATH = "/api/v1/capabilities"
SPEECH_PATH = "/v1/audio/speech"

MAX_CONTROLS = 4
"""The most ControlNets of one job."""

MAX_FRAMES = 1024
"""The most frames that may be asked for; models draw as many as they were made for."""

SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "video/mp4": ".mp4",
    "audio/wav": ".wav",
    "audio/flac": ".flac",
    "audio/ogg": ".ogg",
}
"""The endings of files, by the types that answers have."""

UNKNOWN_SUFFIX = ".bin"
"""The ending of a file of any other type."""

JobState = Literal["queued", "drawing", "done", "failed", "cancelled"]
"""Where a job stands. The last three are ends."""


class _Body(BaseModel):
    """What is posted: nothing that is not known, and nothing that is no text."""

    model_config = ConfigDict(extra="forbid")

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


class ControlBody(_Body):
    """A ControlNet of a job, by its name on the server, and the picture that it looks at.

    `picture` is a file in base64. `scale` is how strongly it acts, 1 as it was trained; it acts in
    the steps that lie between `start` and `end`, shares of all of them.
    """

    name: str
    picture: str
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)


class JobBody(_Body):
    """A job as it is posted. What is left out is the model's own; a seed is then picked.

    `image` and `mask` are files in base64; the mask is white where the image is changed. `previews`
    brings a small picture with every step. `decoder` "tiny" takes the smaller decoder that comes
    with the model; `frames` is how long a clip is. After `seconds` the job fails if it is not done.
    """

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
    controls: tuple[ControlBody, ...] = Field(default=(), max_length=MAX_CONTROLS)
    sampler: str | None = None
    loras: tuple[str, ...] = ()
    decoder: Literal["full", "tiny"] = "full"
    frames: int | None = Field(default=None, ge=1, le=MAX_FRAMES)
    previews: bool = False
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class JobAnswer(BaseModel):
    """How a job stands. All from `images` on is there once it is done, `error` if it failed,
    and `code`, a word for programs, where there is one for that: "content_policy_violation".

    `events` and `images` are addresses on the server. `images` are what was made, of whatever
    medium: `media` is "image", "video" or "audio". Of what is no picture `posters` are addresses of
    pictures that show it, of a sound its spectrogram and of a clip its first frame; each lasts
    `duration_seconds`, and a clip has `frames`. `milliseconds` are those of each stage.
    """

    id: str
    state: JobState
    seed: int
    events: str
    error: str | None = None
    code: str | None = None
    images: list[str] | None = None
    media: str | None = None
    posters: list[str] | None = None
    duration_seconds: float | None = None
    frames: int | None = None
    seeds: list[int] | None = None
    checkpoint: str | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    milliseconds: dict[str, int] | None = None
    warnings: list[str] | None = None


def file_stem(checkpoint: str, seed: int) -> str:
    """Return the name of an item's file without its ending, in letters that any system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{checkpoint}_{seed}")


class WorkflowAnswer(BaseModel):
    """A graph that draws a picture in ComfyUI: `prompt` for its server, `workflow` for its page.

    `inputs` says under which names it loads pictures, by what they are: "image", "mask",
    "control 1".
    """

    prompt: dict[str, Any]
    workflow: dict[str, Any]
    inputs: dict[str, str]


class CheckpointAnswer(BaseModel):
    """A teacher or a student of a model, as its contract has it. Sizes are [width, height].

    `strengths` are the shares of a picture that it can change, rising; others are taken for the
    nearest of them. There are none where it cannot begin with a picture. `media` is what it makes:
    "image", "video" or "audio"; `formats` are the files in which that can be had, the usual first.
    """

    name: str
    role: str
    steps: int
    guidance: float
    sizes: list[tuple[int, int]]
    prediction_type: str
    strengths: list[float] = []
    media: str = "image"
    formats: list[str] = []


class ModelAnswer(BaseModel):
    """A model that is served, with its checkpoints, and the decoders that may be asked for."""

    name: str
    decoders: list[str] = ["full"]
    checkpoints: list[CheckpointAnswer]


class Limits(BaseModel):
    """The most that one job may ask for."""

    num_images: int
    prompt_letters: int
    steps: int
    controls: int


class Capabilities(BaseModel):
    """What can be asked for."""

    default_model: str
    models: list[ModelAnswer]
    loras: list[str]
    controlnets: list[str] = []
    limits: Limits
