"""LoRAs on a model: which one may go on which, and how the two are then sampled.

A LoRA without a contract is a style and changes no steps. One with a contract makes a teacher a student of few steps,
or is a style that was trained on one student, and goes on that one alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from twostep.contract import Contract, ContractError, student_name
from twostep.models.bundle import Bundle, load_bundle
from twostep.models.contracts import carries_contract, file_contract, goes_on_a_student
from twostep.models.dialects import LowRank, merge_lora, read_lora
from twostep.models.folder import ModelError, find_model


@dataclass(frozen=True)
class Garment:
    """A LoRA's file, how strongly it is put on, and what it says of itself."""

    path: Path
    weight: float
    contract: Contract | None

    @classmethod
    def named(cls, lora: str) -> Garment:
        """Find "file", "file:0.8", or a built-in name; ModelError where there is none."""
        found = re.fullmatch(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?", lora)
        name, weight = (found[1], float(found[2] or 1)) if found else (lora, 1.0)
        path = find_model(name)
        if path.is_dir():
            raise ModelError(f"{path} is a model folder; give a LoRA's .safetensors, or its built-in name.")
        return cls(path, weight, file_contract(path) if carries_contract(path) else None)

    @property
    def makes_students(self) -> bool:
        """Whether it turns teachers into students of few steps."""
        return self.contract is not None and not goes_on_a_student(self.contract)

    def read(self, parts: Mapping[str, nn.Module]) -> dict[str, LowRank]:
        """Read what it does to these networks; LoraError for a misfit."""
        return read_lora(self.path, parts, alpha=None if self.contract is None else self.contract.lora_alpha)

    def together(self, model: Contract) -> Contract:
        """Return the contract of such a model with this on it; ContractError where it was made for another."""
        said, weight = self.contract, "" if self.weight == 1 else f":{self.weight:g}"
        if said is not None and not self.makes_students and said.base != re.split("[+:]", model.name)[0]:
            raise ContractError(f"{self.path} was trained on {said.base}; this is {model.name}. Load that student.")
        if said is None or not self.makes_students:
            # The name goes into every picture.
            return replace(model, name=f"{model.name}+{self.path.stem}{weight}")
        if model.role == "student":
            raise ContractError(
                f"{self.path} makes {said.steps}-step students of teachers, and {model.name} is one of {model.steps} "
                "steps already: it would be distilled twice. Load its teacher, or leave this LoRA out."
            )
        if said.prediction_type != model.prediction_type:
            raise ContractError(
                f"{self.path} was distilled where {said.prediction_type} is predicted; {model.name} predicts "
                f"{model.prediction_type}. Use a LoRA of such a teacher."
            )
        _, plus, styles = model.name.partition("+")
        name = f"{student_name(model.base, said.steps)}{weight}{plus}{styles}"
        return replace(said, name=name, base=model.base, sizes=model.sizes)


def load_worn(model: str | Path, loras: Sequence[str], *, steps: int | None = None) -> Bundle:
    """Load a model and merge LoRAs into it, in order, each "file" or "file:weight"; `steps` as for `load_bundle`.

    Where one of them makes students, it is the teacher that is loaded. Raises ModelError, ContractError.
    """
    worn = [Garment.named(lora) for lora in loras]
    few = next((garment for garment in worn if garment.makes_students), None)
    bundle = load_bundle(model, steps=steps if few is None else None)
    for garment in worn:
        bundle = replace(bundle, contract=garment.together(bundle.contract))
        merge_lora(garment.read(bundle.parts), bundle.parts, weight=garment.weight)
    if steps not in (None, bundle.contract.steps) and bundle.contract.role == "student":
        raise ModelError(f"{bundle.contract.name} draws in {bundle.contract.steps} steps, not in {steps}.")
    return bundle
