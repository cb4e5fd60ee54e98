"""What a checkpoint says of itself: how it must be sampled, and where it comes from.

A few-step student is right only at its own number of steps, its own times, its own prediction type
and without guidance; files that do not say so are sampled wrongly. The contract travels as JSON in
safetensors metadata (key `twostep.contract`), in the model folder and in every PNG. It knows
neither tensors nor networks.

Version 2 of the format adds the model family, the media, the sampler and the schedule. A contract
of version 1 says nothing of these: it is one of SDXL, whose values are the defaults here. Sampling
times are written only where they are not those of the trailing grid, so a reader that does not know
them refuses exactly the files that it would sample wrongly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from twostep.errors import TwostepError

METADATA_KEY = "twostep.contract"
"""Where the contract lies in safetensors metadata; in a PNG it is part of the chunk `twostep`."""

CONTRACT_VERSION: Final = 2
"""The newest version of the format that this code reads, and the one that it writes."""

TOP_TIME = 1000
"""T, the time of pure noise of SDXL, and the most steps of any model."""

_THINGS = {"image": "pictures", "video": "clips", "audio": "sounds"}
"""What items of the media of the package are called."""

# The same as in the diffusion room, stated again so that a contract is read without torch.
PredictionType = Literal["eps", "x0", "v", "flow", "edm"]
SamplerName = Literal["euler", "renoise"]


class ContractError(TwostepError):
    """A contract that is missing or makes no sense, or a request that its model cannot honour."""


@dataclass(frozen=True)
class VariancePreservingSpec:
    """The parameters of a variance-preserving schedule of integer times; the defaults are SDXL's.

    Attributes:
        betas: how beta goes from start to end: linear, linear in its square root, or a cosine,
            which has ends of its own.
        beta_start: beta at time 1, in (0, 1).
        beta_end: beta at the top time, in (0, 1).
        num_times: the top time.
        zero_snr: whether all is rescaled so that no signal is left at the top.
        trained: the betas one by one, where no formula gives them; empty otherwise.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Literal["variance_preserving"] = field(default="variance_preserving", kw_only=True)
    betas: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_times: int = TOP_TIME
    zero_snr: bool = False
    trained: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that make no schedule: ContractError."""
        rules = [
            ("schedule.beta_start", 0 < self.beta_start < 1, "a number between 0 and 1"),
            ("schedule.beta_end", 0 < self.beta_end < 1, "a number between 0 and 1"),
            ("schedule.num_times", self.num_times >= 1, "a number of times of at least 1"),
            (
                "schedule.trained",
                len(self.trained) in (0, self.num_times) and all(0 < b < 1 for b in self.trained),
                f"no betas, or {self.num_times} between 0 and 1",
            ),
        ]
        _check_rules(self, rules)

    def __str__(self) -> str:
        """Return the parameters in words, for tables."""
        betas = f"betas {self.betas} {self.beta_start:g} to {self.beta_end:g}"
        if self.betas == "cosine":
            betas = "betas of a cosine"
        if self.trained:
            betas = f"betas of its own, {self.trained[0]:g} to {self.trained[-1]:g}"
        rescaled = ", no signal at the top" if self.zero_snr else ""
        return f"variance preserving, {betas}, {self.num_times} times{rescaled}"


@dataclass(frozen=True)
class RectifiedFlowSpec:
    """The parameters of a rectified flow, whose times are real numbers in 0..1.

    Attributes:
        shift: how far the grid of times is shifted towards noise; 1 is not at all, SD3 has 3.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Literal["rectified_flow"] = field(default="rectified_flow", kw_only=True)
    shift: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that make no schedule: ContractError."""
        _check_rules(
            self, [("schedule.shift", 0 < self.shift < math.inf, "a finite number above 0")]
        )

    def __str__(self) -> str:
        """Return the parameters in words, for tables."""
        return f"rectified flow, shift {self.shift:g}"


@dataclass(frozen=True)
class EdmSpec:
    """The noise levels of EDM (arXiv 2206.00364), whose times are real numbers in 0..1.

    Attributes:
        sigma_min: the least level.
        sigma_max: the level at the top, at least eight times that of the data.
        sigma_data: the deviation of the data.
        ramp: how levels go from least to top: "karras" (eq 5 there) or "exponential".
        rho: the exponent of eq 5.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Literal["edm"] = field(default="edm", kw_only=True)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    ramp: Literal["karras", "exponential"] = "karras"
    rho: float = 7.0

    def __post_init__(self) -> None:
        """Refuse values that make no schedule: ContractError."""
        rules = [
            ("schedule.sigma_data", 0 < self.sigma_data < math.inf, "a finite number above 0"),
            ("schedule.rho", 0 < self.rho < math.inf, "a finite number above 0"),
            (
                "schedule.sigma_max",
                8 * self.sigma_data <= self.sigma_max < math.inf,
                "a level that hides the data: at least 8 times sigma_data",
            ),
            (
                "schedule.sigma_min",
                0 < self.sigma_min < self.sigma_max,
                f"a level between 0 and sigma_max, which is {self.sigma_max:g}",
            ),
        ]
        _check_rules(self, rules)

    def __str__(self) -> str:
        """Return the parameters in words, for tables."""
        levels = f"levels {self.sigma_min:g} to {self.sigma_max:g}, {self.ramp}"
        return f"EDM, {levels}, data {self.sigma_data:g}"


ScheduleSpec = VariancePreservingSpec | RectifiedFlowSpec | EdmSpec
"""How much noise each time holds; `diffusion.make_schedule(**asdict(spec))` makes it."""


@dataclass(frozen=True)
class Contract:
    """How to sample a checkpoint, and where it comes from.

    Raises ContractError if the values contradict each other.

    Attributes:
        name: of the checkpoint, as in "nano-4step".
        role: "teacher" (any number of steps, guided) or "student".
        steps: the number of steps of a student, or the recommended one of a teacher.
        trained_times: the times at which a student was trained, in the unit of its schedule; empty
            for a teacher, which knows all of them.
        prediction_type: what the network's output means.
        spacing: how the grid of times is laid.
        guidance: the recommended scale of classifier-free guidance; 1 is none.
        sizes: (width, height) in pixels that it was trained on, the preferred one first.
        base: name of the model that it was made from; a LoRA is applied to it.
        lora_rank: rank of the LoRA, None for whole weights.
        lora_alpha: the LoRA is scaled by lora_alpha / lora_rank.
        recipe: name of the recipe that made it.
        version: of twostep, which wrote it.
        family: name of the model family, which knows how to load it.
        media: what it makes, as its codec calls it: image, video, audio, or another word.
        sampler: "euler" follows the flow, "renoise" adds fresh noise to x0 at every time.
        schedule: how much noise each time holds.
        sampling_times: the times that a student visits, falling, without the landing 0, one per
            step; empty for those of the trailing grid. Where the first is not the top, the student
            takes pure noise for latents of that time.
        contract_version: version of this format.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: str
    role: Literal["teacher", "student"]
    steps: int
    trained_times: tuple[int | float, ...]
    prediction_type: PredictionType
    spacing: Literal["trailing"]
    guidance: float
    sizes: tuple[tuple[int, int], ...]
    base: str
    lora_rank: int | None
    lora_alpha: float | None
    recipe: str
    version: str
    family: str = "sdxl"
    media: str = "image"
    sampler: SamplerName = "euler"
    schedule: Annotated[ScheduleSpec, Field(discriminator="kind")] = field(
        default_factory=VariancePreservingSpec
    )
    sampling_times: tuple[int | float, ...] = ()
    contract_version: Literal[2] = CONTRACT_VERSION

    def __post_init__(self) -> None:
        """Refuse values that no checkpoint can mean: ContractError."""
        is_student = self.role == "student"
        lora_goes_together = (self.lora_alpha is None) == (self.lora_rank is None)
        rules = [
            ("name", bool(self.name.strip()), "a name that is not empty"),
            (
                "media",
                re.fullmatch("[a-z][a-z0-9_-]*", self.media) is not None,
                "one word in small letters, such as image, video or audio",
            ),
            ("steps", 1 <= self.steps <= TOP_TIME, f"a number of steps from 1 to {TOP_TIME}"),
            self._rule_of_times("trained_times", self.trained_times),
            (
                "trained_times",
                bool(self.trained_times) or not is_student,
                "at least one time for a student",
            ),
            self._rule_of_times("sampling_times", self.sampling_times),
            (
                "sampling_times",
                not self.sampling_times or (is_student and len(self.sampling_times) == self.steps),
                f"one time for each of a student's {self.steps} steps, or empty",
            ),
            (
                "sampling_times",
                all(t > s for t, s in pairwise(self.sampling_times)),
                "falling from step to step",
            ),
            self._rule_of_prediction_type(),
            (
                "guidance",
                math.isfinite(self.guidance) and self.guidance >= 1,
                "a finite number, 1 (none) or more",
            ),
            (
                "guidance",
                self.guidance == 1 or not is_student,
                "1 for a student: its guidance is distilled in",
            ),
            ("sizes", bool(self.sizes), "at least one [width, height]"),
            (
                "sizes",
                all(min(size) >= 1 for size in self.sizes),
                "widths and heights of at least one pixel",
            ),
            (
                "lora_rank",
                self.lora_rank is None or self.lora_rank >= 1,
                "a rank of at least 1, or null",
            ),
            (
                "lora_alpha",
                lora_goes_together,
                f"a number exactly if lora_rank is one (it is {self.lora_rank})",
            ),
            (
                "lora_alpha",
                self.lora_alpha is None or math.isfinite(self.lora_alpha),
                "a finite number",
            ),
            ("family", bool(self.family.strip()), "a name that is not empty"),
        ]
        _check_rules(self, rules)

    @property
    def things(self) -> str:
        """What the model makes, as a sentence has it: pictures, clips or sounds."""
        return _THINGS.get(self.media, f"items of the medium {self.media!r}")

    def to_json(self) -> str:
        """Return the contract as indented JSON, fields in the order of this class.

        What came later is left out where it has no effect, in the schedule too, so that
        older versions read what they can honour.
        """
        values = asdict(self)
        for name in _LEFT_OUT_IF_EMPTY:
            if not values[name]:
                del values[name]
        for name in ("zero_snr", "trained"):
            if not values["schedule"].get(name, True):
                del values["schedule"][name]
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read what `to_json` wrote, by this or an older version of twostep.

        Raises:
            ContractError: a field is missing, unknown or wrong, which is named, or the format is of
                a newer version.
        """
        _check_version(text)
        try:
            return _READER.validate_json(text)
        except ValidationError as error:
            raise ContractError(_explain(error.errors(), text)) from error

    def to_metadata(self) -> dict[str, str]:
        """Return the contract as safetensors metadata: one key with the JSON."""
        return {METADATA_KEY: self.to_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> Contract:
        """Read the contract in the safetensors metadata of a file.

        Raises:
            ContractError: there is none, or `from_json` refuses it.
        """
        if metadata is None or METADATA_KEY not in metadata:
            present = ", ".join(sorted(metadata)) if metadata else "no metadata at all"
            raise ContractError(
                "this file carries no sampling contract: expected the metadata key "
                f"{METADATA_KEY!r}, found {present}. It was not written by twostep, or another "
                "tool dropped its metadata; use the original file."
            )
        return cls.from_json(metadata[METADATA_KEY])

    def check(
        self,
        steps: int | None,
        guidance: float | None,
        width: int | None,
        height: int | None,
        *,
        sampler: str | None = None,
    ) -> list[str]:
        """Compare a request with the contract; None means "as the checkpoint wants it".

        Args:
            steps: number of steps.
            guidance: scale of classifier-free guidance.
            width: in pixels.
            height: in pixels.
            sampler: how to go from time to time.

        Returns:
            Warnings for what has no effect or harms.

        Raises:
            ContractError: the request cannot be honoured.
        """
        return [
            *self._check_size(width, height),
            *self._check_steps(steps),
            *self._check_guidance(guidance),
            *self._check_sampler(sampler),
        ]

    def _check_steps(self, steps: int | None) -> list[str]:
        if steps is None:
            return []
        if self.role == "student" and steps != self.steps:
            plural = "" if self.steps == 1 else "s"
            raise ContractError(
                f"{self.name} draws in exactly {self.steps} step{plural}; asked for {steps}. "
                "It never saw the times of another grid. "
                "Load the student that was trained for it, or leave steps out."
            )
        if not 1 <= steps <= TOP_TIME:
            raise ContractError(
                f"{self.name} takes 1 to {TOP_TIME} steps, {self.steps} by default; "
                f"asked for {steps}."
            )
        if 2 * steps < self.steps:
            return [
                f"{self.name} is a teacher meant for about {self.steps} steps; with {steps} its "
                "pictures stay blurred. Few steps are what the students are for."
            ]
        return []

    def _check_guidance(self, guidance: float | None) -> list[str]:
        if guidance is None:
            return []
        if not math.isfinite(guidance) or guidance < 0:
            raise ContractError(
                f"guidance must be a finite number of at least 0; asked for {guidance}."
            )
        if self.role == "student" and guidance > 1:
            return [
                f"guidance {guidance:g} has no effect: {self.name} is a student, its teacher's "
                "guidance was distilled into it, and it runs once per step. "
                "Leave guidance out, or use the teacher."
            ]
        if self.role == "teacher" and guidance <= 1 < self.guidance:
            return [
                f"guidance {guidance:g} switches guidance off: {self.name} then follows the prompt "
                f"only loosely. It was made for {self.guidance:g}."
            ]
        return []

    def _check_sampler(self, sampler: str | None) -> list[str]:
        if sampler in (None, self.sampler):
            return []
        if self.role == "student":
            raise ContractError(
                f"{self.name} is a student that was trained to draw with {self.sampler}; asked for "
                f"{sampler}. Leave the sampler out, or use the teacher."
            )
        return []

    def _check_size(self, width: int | None, height: int | None) -> list[str]:
        if any(width in (None, w) and height in (None, h) for w, h in self.sizes):
            return []
        asked = "x".join("any" if pixels is None else str(pixels) for pixels in (width, height))
        known = ", ".join(f"{w}x{h}" for w, h in self.sizes)
        sides = [side for size in self.sizes for side in size]
        multiple = math.gcd(*sides)
        if width and height and self._fits_between(width, height, multiple, max(sides)):
            return [
                f"{self.name} was trained on {known}; {asked} is none of these, and may look worse."
            ]
        raise ContractError(
            f"{self.name} draws {known} (width x height in pixels), and smaller sizes whose sides "
            f"are multiples of {multiple}; asked for {asked}."
        )

    def _fits_between(self, width: int, height: int, multiple: int, longest: int) -> bool:
        """Whether a size is a legal one that is no larger than those trained on."""
        largest_area = max(w * h for w, h in self.sizes)
        is_multiple = width % multiple == 0 and height % multiple == 0
        return is_multiple and width * height <= largest_area and max(width, height) <= longest

    def _rule_of_times(self, name: str, times: tuple[int | float, ...]) -> _Rule:
        if not isinstance(self.schedule, VariancePreservingSpec):
            return (name, all(0 < t <= 1 for t in times), "times above 0, up to 1")
        top = self.schedule.num_times
        hold = all(isinstance(t, int) and 1 <= t <= top for t in times)
        return (name, hold, f"integer times from 1 to {top}")

    def _rule_of_prediction_type(self) -> _Rule:
        # Where there is no signal at the top, eps says nothing of x0; and v is defined for
        # schedules that preserve variance.
        schedule = self.schedule
        if isinstance(schedule, RectifiedFlowSpec):
            holds = self.prediction_type in ("flow", "x0")
            return ("prediction_type", holds, "'flow' or 'x0' with a rectified flow")
        if isinstance(schedule, EdmSpec):
            holds = self.prediction_type != "flow"
            return ("prediction_type", holds, "'edm', 'v', 'x0' or 'eps' with EDM's noise")
        if schedule.zero_snr:
            holds = self.prediction_type in ("v", "x0")
            expected = "'v' or 'x0' where no signal is left at the top (zero SNR)"
            return ("prediction_type", holds, expected)
        holds = self.prediction_type != "edm"
        return ("prediction_type", holds, "'eps', 'v', 'x0' or 'flow' with this schedule")


_LEFT_OUT_IF_EMPTY = ("sampling_times",)
"""Fields that came after version 2 was in use, written only where they say something."""

_Rule = tuple[str, bool, str]
"""A field, whether its rule holds, and what was expected."""

_READER = TypeAdapter(Contract)


def student_name(base: str, steps: int) -> str:
    """Return the name of a student of so many steps of a base: "nano-4step"."""
    return f"{base}-{steps}step"


def is_student_name(name: str) -> bool:
    """Tell whether a name is one that `student_name` gives."""
    return re.search(r"-\d+step$", name) is not None


def _check_rules(contract: object, rules: list[_Rule]) -> None:
    """Raise ContractError for the first rule that does not hold."""
    for name, holds, expected in rules:
        if not holds:
            value = getattr(contract, name.rpartition(".")[2])
            raise ContractError(_wrong_value(name, value, expected))


def _check_version(text: str) -> None:
    """Refuse a newer format, and version 2 with fields left out: ContractError.

    What is no JSON object at all is left to the reader.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict) or "contract_version" not in values:
        return
    version = values["contract_version"]
    if isinstance(version, int) and version > CONTRACT_VERSION:
        raise ContractError(
            f"the contract is of version {version}, written by twostep "
            f"{values.get('version', 'of unknown version')}; this twostep reads versions up to "
            f"{CONTRACT_VERSION}. Update it: pip install --upgrade twostep."
        )
    # Defaults stand for what version 1 could not say; version 2 says everything.
    names = [field.name for field in fields(Contract)]
    missing = [name for name in names if name not in values and name not in _LEFT_OUT_IF_EMPTY]
    if missing:
        raise ContractError(_lacks(missing))


def _lacks(missing: list[str]) -> str:
    return (
        f"the contract lacks {', '.join(missing)}. Take it anew from the checkpoint or its recipe."
    )


def _explain(problems: list[ErrorDetails], text: str) -> str:
    """Say what is wrong with JSON that is no contract, and what to do."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return (
            f"the contract is not JSON: {first['msg']}. It starts with {text[:40]!r}; "
            "take it anew from the checkpoint."
        )
    if first["type"] == "dataclass_type" and not first["loc"]:
        return f"the contract must be a JSON object with named fields; got {first['input']!r:.60}."
    for problem in problems:
        if problem["type"] == "unexpected_keyword_argument":
            return _explain_unknown(_field_of(problem), text)
    missing = [_field_of(problem) for problem in problems if problem["type"] == "missing"]
    if missing:
        return _lacks(missing)
    if first["type"].startswith("union_tag"):
        kinds = "an object with the kind 'variance_preserving', 'rectified_flow' or 'edm'"
        return _wrong_value(_field_of(first), first["input"], kinds)
    expected = first["msg"].removeprefix("Input should be ")
    expected = expected.replace("Tuple should have", "pairs with")
    return _wrong_value(_field_of(first), first["input"], expected)


def _explain_unknown(name: str, text: str) -> str:
    known = [known_field.name for known_field in fields(Contract)]
    inner = [
        f"schedule.{known_field.name}"
        for spec in (VariancePreservingSpec, RectifiedFlowSpec, EdmSpec)
        for known_field in fields(spec)
    ]
    near = get_close_matches(name, [*known, *inner], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"a contract has {', '.join(known)}."
    writer = json.loads(text).get("version", "of unknown version")
    return (
        f"the contract has an unknown field {name!r}; {hint} "
        f"It was written by twostep {writer}: a newer one may be needed."
    )


def _field_of(problem: ErrorDetails) -> str:
    """Return the field of a problem; what lies in the schedule is called "schedule.shift"."""
    first, *inner = [str(part) for part in problem["loc"]]
    if first == "schedule" and len(inner) > 1:
        # pydantic names the kind of the schedule between the field and what is in it.
        return f"schedule.{inner[1]}"
    return first


def _wrong_value(name: str, given: object, expected: str) -> str:
    return (
        f"the contract's {name} must be {expected}; got {given!r:.60}. "
        "Take it anew from its source."
    )
