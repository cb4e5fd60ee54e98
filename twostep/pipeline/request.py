"""What to make, and what was made.

A `Request` is the one description of a wish that Python, command line, server and evaluation share; a `Result` is
everything that is known of its answer. Image i of a request is drawn from seed + i, so any single picture of a batch
can be asked for again by itself.

This module does not know models: whether a model can honour a request is its contract's business.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace

from PIL.Image import Image

from twostep.contract import Contract
from twostep.errors import TwostepError

NUM_SEEDS = 2**63
"""Seeds are 0 <= seed < NUM_SEEDS, so that they fit a signed 64-bit integer in every file format and language."""

NUM_DISTINCT_SEEDS = 2**32
"""torch's CPU generator reads the lowest 32 bits of a seed; larger seeds draw the noise of a smaller one."""


class RequestError(TwostepError):
    """A request that no model could honour."""


@dataclass(frozen=True)
class Request:
    """One wish: a prompt, how many pictures of it, and from which noise.

    `steps`, `guidance`, `width` and `height` (pixels) left at None take what the model's contract recommends.
    Raises `RequestError` where a value is impossible for any model.
    """

    prompt: str
    num_images: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)
    guidance: float | None = field(default=None, kw_only=True)
    negative_prompt: str = field(default="", kw_only=True)
    width: int | None = field(default=None, kw_only=True)
    height: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        _check_count("num_images", self.num_images, "ask for at least one image")
        _check_seeds(self.seed, self.num_images)
        for name in ("steps", "width", "height"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), "or leave it out to take the model's own")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise RequestError(
                f"guidance is {self.guidance}; expected a number from 0 up. 1 means none, 3 to 8 is usual."
            )

    @property
    def seeds(self) -> list[int]:
        """One seed per image: seed, seed + 1, ..."""
        return [self.seed + i for i in range(self.num_images)]

    def only(self, seed: int) -> "Request":
        """Return the request that draws exactly one of this request's pictures."""
        return replace(self, num_images=1, seed=seed)

    def to_json(self) -> str:
        """Write the request as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Read what `to_json` wrote; raises `RequestError` for anything else."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(f"a request must be JSON, but reading it failed: {error}.") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or "prompt" not in values or not set(values) <= set(known):
            raise RequestError(f"got {text[:80]!r}; expected a JSON object with a prompt and none but {known}.")
        return cls(**values)


@dataclass(frozen=True)
class Result:
    """What was made of a request.

    `request` has every default filled in and the guidance that was really used, `seconds` is per stage ("text",
    "denoise", "decode"), `warnings` are sentences for a person.
    """

    images: list[Image]
    seeds: list[int]
    seconds: dict[str, float]
    warnings: list[str]
    contract: Contract
    request: Request

    @property
    def seconds_per_image(self) -> float:
        """Time of all stages divided by the number of images."""
        return sum(self.seconds.values()) / len(self.images)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} is {text!r}; expected text. For several prompts make one request each.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} {text!r} is not valid Unicode text: {error.reason}. Give it in UTF-8.") from error


def _check_count(name: str, value: object, advice: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name} is {value!r}; expected a whole number from 1 up: {advice}.")


def _check_seeds(seed: object, num_images: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RequestError(f"seed is {seed!r}; expected a whole number from 0 up. Image i is drawn from seed + i.")
    if seed + num_images > NUM_SEEDS:
        raise RequestError(
            f"seed is {seed} and {num_images} image(s) follow from it; expected every seed below 2**63 = {NUM_SEEDS}. "
            f"Below 2**32 is enough: torch's generator knows no more seeds than that."
        )
