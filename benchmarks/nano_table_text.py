"""The words of the nano table: Markdown from figures, and which of the claims hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figures = dict[str, Any]
Check = dict[str, Any]

_SHARES = ("concept", "style", "background")
_LEAST_OF_TEACHER = {
    8: (0.95, 0.95, 0.95),
    4: (0.95, 0.95, 0.95),
    2: (0.90, 0.95, 0.95),
    1: (0.80, 0.90, 0.90),
}
_LEAST_TEACHER = (0.85, 0.95, 0.95)
_RIVALS = {
    8: ("euler-4-guided", "dpm-4-guided"),
    4: ("euler-2-guided", "euler-4-guided", "dpm-4-guided"),
    2: ("euler-1-guided", "euler-2-guided"),
    1: ("euler-1", "euler-1-guided"),
}
"""For each student: the teacher at as many evaluations, then at as many steps."""
_LEAST_DIVERSITY = {"diversity": 0.8, "incomplete": 0.7}
_LORA_STEPS = (8, 4)
"""Steps at which a LoRA is to keep up with the whole UNet."""

_LORA_POINTS = 0.05
"""How far behind it may be, as a share of the prompts."""
_KINDS = ("feature_diversity", "pixel_diversity")


def checks(rows: Sequence[Figures]) -> list[Check]:
    """List every claim with the number, the bound, and whether it holds."""
    by_key = {row["key"]: row for row in rows}
    teacher = by_key["teacher"]
    claims = [
        _at_least(f"teacher: {name}", _share(teacher, name), least)
        for name, least in zip(_SHARES, _LEAST_TEACHER, strict=True)
    ]
    for steps, bounds in _LEAST_OF_TEACHER.items():
        student = by_key.get(f"student-{steps}")
        if student is not None:
            claims += _student_checks(student, teacher, bounds)
            claims += [
                check for key in _RIVALS[steps] for check in _beats(student, by_key.get(key))
            ]
            claims += _beats_mse(student, by_key.get(f"mse-{steps}"))
            claims += _lora_checks(student, by_key.get(f"lora-{steps}"))
    return claims


def to_markdown(
    rows: Sequence[Figures], claims: Sequence[Check], accuracy: dict[str, float]
) -> str:
    """Write the table, the claims and how to read them."""
    teacher = rows[0]
    head = (
        "| | steps | evaluations | concept | style | background | to teacher | to real "
        "| incomplete: to teacher | to real | diversity, complete | incomplete | blur, px |"
    )
    lines = [head, "|---|" + "---:|" * 12, *(_line(row, teacher) for row in rows)]
    measured = ", ".join(f"{name} {value:.4g}" for name, value in accuracy.items())
    notes = [
        "Accuracy in % over complete prompts, in brackets as a share of the teacher's. 'To "
        "teacher' and 'to real' are Frechet distances in the judge's features: to the teacher's "
        "pictures of the same prompts and noise, and to real drawings. Diversity is the mean "
        "distance between seeds of one prompt, in features / in pixels, in brackets as shares of "
        f"the teacher's. Samples: {teacher['complete']['num_images']} complete, "
        f"{teacher['incomplete']['num_images']} incomplete; few samples bias Frechet distances "
        "upwards, for all rows alike. Guidance counts as two evaluations a step. Below three "
        "steps DPM-Solver++ 2M is Euler.",
        f"The judge's own accuracy on held-out placements and backgrounds: {measured}.",
    ]
    verdicts = [
        f"- {'yes' if c['holds'] else '**NO**'}: {c['claim']}: {c['value']:.4g}, {c['bound']}"
        for c in claims
    ]
    return "\n".join([*lines, "", *notes, "", "Claims:", "", *verdicts, ""])


def _student_checks(student: Figures, teacher: Figures, bounds: Sequence[float]) -> list[Check]:
    claims = [
        _at_least(
            f"{student['label']}: {name}, share of the teacher's",
            _ratio(student, teacher, name),
            least,
        )
        for name, least in zip(_SHARES, bounds, strict=True)
    ]
    for part, least in _LEAST_DIVERSITY.items():
        for kind in _KINDS:
            value = _diversity_ratio(student, teacher, part, kind)
            if value is not None:
                what = "complete" if part == "diversity" else part
                claims.append(
                    _at_least(
                        f"{student['label']}: {kind} of {what} prompts, of the teacher's",
                        value,
                        least,
                    )
                )
    return claims


def _beats(student: Figures, rival: Figures | None) -> list[Check]:
    if rival is None:
        return []
    distance = student["complete"]["frechet_to_reference"]
    other = rival["complete"]["frechet_to_reference"]
    against = f"{student['label']} against {rival['label']}"
    return [
        _check(
            f"{against}: Frechet distance to the teacher",
            distance,
            distance < other,
            f"below {other:.4g}",
        ),
        _check(
            f"{against}: concept",
            _share(student, "concept"),
            _share(student, "concept") > _share(rival, "concept"),
            f"above {_share(rival, 'concept'):.4g}",
        ),
    ]


def _beats_mse(student: Figures, rival: Figures | None) -> list[Check]:
    if rival is None:
        return []
    distance = student["incomplete"]["frechet_to_reference"]
    other = rival["incomplete"]["frechet_to_reference"]
    against = f"{student['label']} against {rival['label']}"
    claim = f"{against}: Frechet distance to the teacher, incomplete prompts"
    return [_check(claim, distance, distance < other, f"below {other:.4g}")]


def _lora_checks(student: Figures, lora: Figures | None) -> list[Check]:
    if lora is None or student["steps"] not in _LORA_STEPS:
        return []
    least = _share(student, "concept") - _LORA_POINTS
    return [
        _at_least(
            f"{lora['label']} against the whole UNet: concept", _share(lora, "concept"), least
        )
    ]


def _line(row: Figures, teacher: Figures) -> str:
    cells = [row["label"], row["steps"] or "", row["evaluations"] or ""]
    cells += [
        f"{100 * _share(row, name):.1f} ({100 * _ratio(row, teacher, name):.0f})"
        for name in _SHARES
    ]
    for part in ("complete", "incomplete"):
        cells += [f"{row[part]['frechet_to_reference']:.3f}", f"{row[part]['frechet_to_real']:.3f}"]
    cells += [_diversity_cell(row, teacher, part) for part in ("diversity", "incomplete")]
    cells.append(f"{row['complete']['mean_blur_pixels']:.2f}")
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _diversity_cell(row: Figures, teacher: Figures, part: str) -> str:
    ratios = [_diversity_ratio(row, teacher, part, kind) for kind in _KINDS]
    if row[part] is None or None in ratios:
        return ""
    values = " / ".join(f"{row[part][kind]:.3g}" for kind in _KINDS)
    shares = " / ".join(f"{100 * ratio:.0f}" for ratio in ratios if ratio is not None)
    return f"{values} ({shares})"


def _diversity_ratio(row: Figures, teacher: Figures, part: str, kind: str) -> float | None:
    value = (row[part] or {}).get(kind)
    whole = (teacher[part] or {}).get(kind)
    return value / whole if value is not None and whole else None


def _share(row: Figures, name: str) -> float:
    return float(row["complete"][name]["share"])


def _ratio(row: Figures, teacher: Figures, name: str) -> float:
    whole = _share(teacher, name)
    return _share(row, name) / whole if whole else 0.0


def _at_least(claim: str, value: float, least: float) -> Check:
    return _check(claim, value, value >= least, f"at least {least:g}")


def _check(claim: str, value: float, holds: bool, bound: str) -> Check:
    return {"claim": claim, "value": value, "bound": bound, "holds": holds}
