"""Checkpoints of others that draw in few steps, and say so in their name or metadata alone.

The web is full of SDXL models into which somebody merged a distillation: Lightning, Turbo, LCM,
Hyper-SD or DMD2. Nothing in their weights tells, but drawn like any teacher, in 32 steps with
guidance, they burn. What such a word means stands here. A file that says one of them is drawn so,
by as many steps as it names or as are usual, and anybody may ask for others: it is no student of
ours, whose trained times are known. `as_student` holds it to one number of steps all the same.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from twostep.contract import Contract, ContractError, SamplerName

BASE = "base"
"""The word for no few-step model at all."""

_BY_NAME = ", by its name"
"""How the recipe ends of a contract that rests on a name."""


@dataclass(frozen=True)
class FewStep:
    """A kind of distillation, and how its models are drawn.

    Attributes:
        title: as people write it.
        pattern: how names say it.
        steps: the numbers of steps there are models for, the usual one first.
        sampler: how it goes from time to time.
    """

    title: str
    pattern: str
    steps: tuple[int, ...]
    sampler: SamplerName


KINDS = {
    # arXiv 2402.13929: trailing times, no noise on the way.
    "lightning": FewStep("SDXL-Lightning", r"(?i)lightning", (4, 2, 8), "euler"),
    # arXiv 2311.17042: x0, and fresh noise on it.
    "turbo": FewStep("SDXL-Turbo (ADD)", r"(?i)turbo", (4, 1, 2, 3), "renoise"),
    # arXiv 2310.04378: the multistep sampler of consistency models.
    "lcm": FewStep("LCM", r"LCM|(?<![a-z])lcm(?![a-z])", (4, 2, 3, 5, 6, 7, 8), "renoise"),
    # arXiv 2404.13686: its 2, 4 and 8 steps follow the flow along trailing times.
    "hyper": FewStep(
        "Hyper-SD", r"(?i)hyper[-_ ]?(sd|xl)|(?<![a-z])hyper(?![a-z])", (8, 4, 2), "euler"
    ),
    # arXiv 2405.14867: x0 at 999, 749, 499 and 249, and fresh noise on it.
    "dmd2": FewStep("DMD2", r"(?i)dmd[-_ ]?2", (4,), "renoise"),
}
"""The kinds by the word that asks for them. The first whose pattern a name has counts."""

_TEXTS = ("modelspec.title", "modelspec.description", "modelspec.tags", "ss_output_name")
"""Metadata in which people write what a model is."""

_STEPS = re.compile(r"(\d+)[-_ ]?steps?", re.IGNORECASE)


def detect(name: str, metadata: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the kind that a file's name or metadata say, with a number of steps; None for none.

    Arguments:
        name: of the file or folder.
        metadata: of the file.
    """
    for text in (name, *(str(metadata.get(key, "")) for key in _TEXTS)):
        for kind, few in KINDS.items():
            if re.search(few.pattern, text):
                said = _STEPS.search(text)
                steps = int(said[1]) if said else few.steps[0]
                return kind, steps if 1 <= steps <= max(few.steps) else few.steps[0]
    return None


def drawn_as(contract: Contract, kind: str, steps: int) -> Contract:
    """Return the contract of a model that its name says to be of a kind.

    It takes any number of steps and guidance, as every model that is no student of ours, but so
    many without guidance by default, and by the sampler of its kind.
    """
    few = KINDS[kind]
    return replace(
        contract, steps=steps, guidance=1.0, sampler=few.sampler, recipe=f"{kind}{_BY_NAME}"
    )


def note(contract: Contract) -> str | None:
    """Say what it means that a model is drawn as its name says; None where it is not."""
    kind = contract.recipe.removesuffix(_BY_NAME)
    if kind not in KINDS or kind == contract.recipe:
        return None
    few = KINDS[kind]
    way = "adding fresh noise at every step" if few.sampler == "renoise" else "along the flow"
    return (
        f"{contract.name} says that it is {few.title}, which draws in few steps without guidance: "
        f"{contract.steps} by default here, {way}. If it is not, draw it as any other "
        f"(--as {BASE}); to hold it to its steps, --as {kind} --steps {contract.steps}."
    )


def as_student(contract: Contract, plain: Contract, kind: str, steps: int | None) -> Contract:
    """Return the contract of a model that somebody says to be of a kind.

    Arguments:
        contract: of the model, which must be no student already.
        plain: what draws as any teacher: for the kind "base".
        kind: one of `KINDS`, or "base".
        steps: in which it is drawn, and in no others; the usual number if not given.

    Raises:
        ContractError: the model is a student, or there is no such kind or number of steps.
    """
    if kind != BASE and kind not in KINDS:
        raise ContractError(f"there is no kind {kind!r}; there are {', '.join([*KINDS, BASE])}.")
    if contract.role == "student":
        raise ContractError(
            f"{contract.name} is a student and says itself how it is drawn: leave --as out."
        )
    if kind == BASE:
        return replace(
            contract,
            steps=plain.steps,
            guidance=plain.guidance,
            sampler=plain.sampler,
            recipe="",
        )
    few = KINDS[kind]
    steps = steps or few.steps[0]
    if steps not in few.steps:
        raise ContractError(
            f"{few.title} draws in {', '.join(map(str, sorted(few.steps)))} steps; asked for "
            f"{steps}."
        )
    # Imported here, for it loads torch, which locating a file does not need.
    from twostep.diffusion import make_schedule, trained_times

    schedule = make_schedule(**asdict(contract.schedule))
    return replace(
        contract,
        role="student",
        steps=steps,
        trained_times=trained_times(steps, schedule),
        guidance=1.0,
        sampler=few.sampler,
        recipe=f"{kind}, as asked for",
    )
