"""What a checkpoint says of itself: how it must be sampled, and where it comes from.

A few-step student is right only at its own number of steps, its own times, its own prediction type
and without guidance; files that do not say so are sampled wrongly. The contract travels as JSON in
safetensors metadata (key `twostep.contract`), in the model folder and in every PNG. It knows
neither tensors nor networks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from twostep.errors import TwostepError

METADATA_KEY = "twostep.contract"
"""Where the contract lies in safetensors metadata; in a PNG it is part of the chunk `twostep`."""

TOP_TIME = 1000
"""T, the time of pure noise; trained times lie in 1..T."""

# as in the diffusion room, restated so that a contract reads without torch
PredictionType = Literal["eps", "x0", "v"]


class ContractError(TwostepError):
    """A contract that is missing or makes no sense, or a request that its checkpoint cannot honour."""


@dataclass(frozen=True)
class Contract:
    """How to sample a checkpoint, and where it comes from; ContractError if the values contradict
    each other.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: str
    role: Literal["teacher", "student"]
    steps: int
    trained_times: tuple[int, ...]
    prediction_type: PredictionType
    spacing: Literal["trailing"]
    guidance: float
    sizes: tuple[tuple[int, int], ...]
    base: str
    lora_rank: int | None
    lora_alpha: float | None
    recipe: str
    version: str

    def __post_init__(self) -> None:
        """Refuse values that no checkpoint can mean."""
        lora_goes_together = (self.lora_alpha is None) == (self.lora_rank is None)
        rules = [
            ("name", bool(self.name.strip()), "a name that is not empty"),
            ("steps", 1 <= self.steps <= TOP_TIME, f"a number of steps from 1 to {TOP_TIME}"),
            (
                "trained_times",
                all(1 <= t <= TOP_TIME for t in self.trained_times),
                f"times from 1 to {TOP_TIME}",
            ),
            (
                "trained_times",
                self.role == "teacher" or bool(self.trained_times),
                "at least one time for a student",
            ),
            (
                "guidance",
                math.isfinite(self.guidance) and self.guidance >= 1,
                "a finite number, 1 (none) or more",
            ),
            (
                "guidance",
                self.role == "teacher" or self.guidance == 1,
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
        ]
        for field, holds, expected in rules:
            if not holds:
                raise ContractError(_wrong_value(field, getattr(self, field), expected))

    def to_json(self) -> str:
        """Write the contract as indented JSON, fields in the order of this class."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read what `to_json` wrote; ContractError names the field that is missing, unknown or
        wrong.
        """
        try:
            return _READER.validate_json(text)
        except ValidationError as error:
            raise ContractError(_explained(error.errors(), text)) from error

    def to_metadata(self) -> dict[str, str]:
        """Return the contract as safetensors metadata, one key with the JSON."""
        return {METADATA_KEY: self.to_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> Contract:
        """Read the contract out of a file's safetensors metadata; ContractError if there is none in
        it.
        """
        if metadata is None or METADATA_KEY not in metadata:
            found = ", ".join(sorted(metadata)) if metadata else "no metadata at all"
            raise ContractError(
                f"this file carries no sampling contract: expected the metadata key {METADATA_KEY!r}, found {found}. "
                "It was not written by twostep, or another tool dropped its metadata; use the original file."
            )
        return cls.from_json(metadata[METADATA_KEY])

    def check(
        self, steps: int | None, guidance: float | None, width: int | None, height: int | None
    ) -> list[str]:
        """Compare a request with the contract; None means "as the checkpoint wants it".

        Returns warnings for what has no effect or harms; raises ContractError for what cannot be
        honoured.
        """
        return [
            *self._check_size(width, height),
            *self._check_steps(steps),
            *self._check_guidance(guidance),
        ]

    def _check_steps(self, steps: int | None) -> list[str]:
        if steps is None:
            return []
        if self.role == "student" and steps != self.steps:
            raise ContractError(
                f"{self.name} draws in exactly {self.steps} step{'' if self.steps == 1 else 's'}; asked for {steps}. "
                "It never saw the times of another grid. Load the student that was trained for it, or leave steps out."
            )
        if not 1 <= steps <= TOP_TIME:
            raise ContractError(
                f"{self.name} takes 1 to {TOP_TIME} steps, {self.steps} by default; asked for {steps}."
            )
        if 2 * steps < self.steps:
            return [
                f"{self.name} is a teacher meant for about {self.steps} steps; with {steps} its pictures stay blurred. "
                "Few steps are what the students are for."
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
                f"guidance {guidance:g} has no effect: {self.name} is a student, its teacher's guidance was distilled "
                "into it, and it runs once per step. Leave guidance out, or use the teacher."
            ]
        if self.role == "teacher" and guidance <= 1 < self.guidance:
            return [
                f"guidance {guidance:g} switches guidance off: {self.name} then follows the prompt only loosely. "
                f"It was made for {self.guidance:g}."
            ]
        return []

    def _check_size(self, width: int | None, height: int | None) -> list[str]:
        if any(width in (None, w) and height in (None, h) for w, h in self.sizes):
            return []
        asked = "x".join("any" if pixels is None else str(pixels) for pixels in (width, height))
        known = ", ".join(f"{w}x{h}" for w, h in self.sizes)
        multiple, longest = (
            math.gcd(*(side for size in self.sizes for side in size)),
            max(map(max, self.sizes)),
        )
        most = max(w * h for w, h in self.sizes)
        fits = width and height and width * height <= most and max(width, height) <= longest
        if fits and width % multiple == height % multiple == 0:  # type: ignore[operator]
            return [
                f"{self.name} was trained on {known}; {asked} is none of these, and may look worse."
            ]
        raise ContractError(
            f"{self.name} draws {known} (width x height in pixels), and smaller sizes whose sides are multiples of "
            f"{multiple}; asked for {asked}."
        )


_READER = TypeAdapter(Contract)


def student_name(base: str, steps: int) -> str:
    """Return the name of a student of so many steps of a base: "nano-4step"."""
    return f"{base}-{steps}step"


def is_student_name(name: str) -> bool:
    """Tell whether a name is one that `student_name` gives."""
    return re.search(r"-\d+step$", name) is not None


def _explained(problems: list[ErrorDetails], text: str) -> str:
    """Say what is wrong with JSON that is no contract, and what to do."""
    kind, given, said = problems[0]["type"], problems[0]["input"], problems[0]["msg"]
    if kind == "json_invalid":
        return f"the contract is not JSON: {said}. It starts with {text[:40]!r}; take it anew from the checkpoint."
    if kind == "dataclass_type":
        return f"the contract must be a JSON object with named fields; got {given!r:.60}."
    unknown = [
        str(problem["loc"][0])
        for problem in problems
        if problem["type"] == "unexpected_keyword_argument"
    ]
    missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing"]
    if unknown:
        known = [field.name for field in fields(Contract)]
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"a contract has {', '.join(known)}."
        writer = json.loads(text).get("version", "of unknown version")
        return (
            f"the contract has an unknown field {unknown[0]!r}; {hint} "
            f"It was written by twostep {writer}: a newer one may be needed."
        )
    if missing:
        return f"the contract lacks {', '.join(missing)}. Take it anew from the checkpoint or its recipe."
    expected = said.removeprefix("Input should be ").replace("Tuple should have", "pairs with")
    return _wrong_value(str(problems[0]["loc"][0]), given, expected)


def _wrong_value(field: str, given: object, expected: str) -> str:
    return f"the contract's {field} must be {expected}; got {given!r:.60}. Take it anew from its source."
