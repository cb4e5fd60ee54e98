"""The settings of a server, as `twostep serve --config serve.toml` reads them.

A file of settings says what the verb's flags say and what they have no room for. Flags win over it.
Paths are taken from where the server is started. Neither torch nor a web framework is needed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from twostep.errors import TwostepError
from twostep.pipeline.request import MAX_BATCH
from twostep.training.recipe import Settings, bytes_of, load_settings

MAX_PROMPT_LETTERS = 32_000
"""The longest prompt, as the OpenAI API has it."""

MAX_BODY = 64 * 2**20
"""The most bytes of a request."""

Size = Annotated[float, BeforeValidator(lambda value: bytes_of(str(value)))]
"""Bytes, written as 24GB."""

Verdict = Literal["keep", "blur", "refuse"]
"""What becomes of a picture, from the mildest to the hardest."""


class ServeError(TwostepError):
    """The server cannot be started as it was asked to."""


class Bounds(Settings):
    """The most that one job may ask for, and the most bytes of a request."""

    num_images: int = Field(default=MAX_BATCH, ge=1, le=MAX_BATCH)
    prompt_letters: int = Field(default=MAX_PROMPT_LETTERS, ge=1)
    steps: int = Field(default=150, ge=1)
    body: Size = MAX_BODY


class FilterSettings(Settings):
    """What looks at pictures before anybody gets them: a classifier, or a function.

    - `model`: a folder or hub id of an image classifier as transformers saves it.
    - `verdicts`: what becomes of pictures of a label of its, such as `{nsfw = "refuse"}`.
    - `threshold`: the probability from which on a label counts, above 0 and up to 1.
    - `function`: instead, `module:attribute` of a function that takes a list of pictures and
      returns "keep", "blur" or "refuse" for each.
    """

    model: str | None = None
    verdicts: dict[str, Verdict] = Field(default_factory=dict)
    threshold: float = Field(default=0.5, gt=0, le=1)
    function: str | None = Field(default=None, pattern=r"[\w.]+:\w+")

    @model_validator(mode="after")
    def _is_one(self) -> FilterSettings:
        if (self.model is None) == (self.function is None):
            raise ValueError("give either the model of a classifier or a function")
        if (self.model is None) != (not self.verdicts):
            raise ValueError('a model needs verdicts, as {nsfw = "refuse"}, and a function none')
        return self


class ClusterSettings(Settings):
    """Replicas of the engine in Ray.

    - `address`: of a Ray cluster that runs, as "auto" or HOST:PORT; without, one is started here.
    - `min_replicas`, `max_replicas`: how many replicas there are, as jobs come.
    - `cpus`, `gpus`: what Ray keeps free for each.
    - `jobs_per_replica`: how many jobs one is given at most; from half of it on Ray adds replicas.
    - `upscale_seconds`, `downscale_seconds`: how long that must last, and its opposite.
    """

    address: str | None = None
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    cpus: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    jobs_per_replica: int = Field(default=16, ge=1)
    upscale_seconds: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    downscale_seconds: float = Field(default=300.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _rises(self) -> ClusterSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}"
            )
        return self


class ServeSettings(Settings):
    """Everything that a server can be told.

    - `models`, `loras`, `controlnets`: names, folders, files or hub ids; the first model is the
      default. A folder of models among `models` counts as one of `model_folders`.
    - `model_folders`, `lora_folders`: everything in these is served, also what comes later.
    - `reload_seconds`: how often models and LoRAs are looked at for changes; 0 for never.
    - `host`, `port`: where it listens. 0 takes a free port.
    - `key_file`: holds what clients must send.
    - `origins`: web pages that may ask, as https://draw.example.
    - `devices`: where it draws, as torch names them.
    - `engine`: what runs the networks (docs/speed.md).
    - `memory`, `max_models`: what loaded models may take on each device, or how many stay loaded.
    - `queue`: how many jobs may wait.
    - `jobs`: a file that keeps accepted jobs.
    - `strict`: whether what a model cannot do is refused instead of changed.
    - `mcp`: whether language models get tools.
    - `drain_seconds`: how long jobs may still be drawn after SIGTERM.
    - `log_format`, `log_level`: how the log is written, and from what on.
    - `log_prompts`: whether the log has prompts, and the errors that may quote them.
    """

    models: tuple[str, ...] = ()
    model_folders: tuple[Path, ...] = ()
    loras: tuple[str, ...] = ()
    lora_folders: tuple[Path, ...] = ()
    controlnets: tuple[str, ...] = ()
    reload_seconds: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, lt=2**16)
    key_file: Path | None = None
    origins: tuple[str, ...] = ()
    devices: tuple[str, ...] = Field(default=("auto",), min_length=1)
    engine: str = Field(default="eager", min_length=1)
    memory: Size | None = None
    max_models: int = Field(default=4, ge=1)
    queue: int = Field(default=64, ge=1)
    jobs: Path | None = None
    strict: bool = False
    mcp: bool = False
    drain_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False
    limits: Bounds = Bounds()
    filter: FilterSettings | None = None
    cluster: ClusterSettings | None = None

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin; write it as https://draw.example")
        return origins

    @property
    def names_no_model(self) -> bool:
        """Whether nothing to draw with is named."""
        return not self.models and not self.model_folders


def read_settings(path: Path | None, flags: dict[str, Any]) -> ServeSettings:
    """Return the settings of a file with flags over them; flags that are None say nothing.

    Raises RecipeError for a file with a key that is not known, or a value that does not fit.
    """
    settings = ServeSettings() if path is None else load_settings(path, ServeSettings)
    given = {name: value for name, value in flags.items() if value is not None}
    return settings.model_copy(update=given)
