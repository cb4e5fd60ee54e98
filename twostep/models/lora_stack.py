"""LoRAs on a model: which one may go on which, and how the two are then sampled.

A LoRA without a contract is a style and changes no steps. One with a contract makes a teacher a
student of few steps, or is a style that was trained on one student, and goes on that one alone.

A `LoraCache` puts other stacks of them on one loaded model. It copies the networks' modules, not
their weights, and computes the LoRAs beside the layers, W x + weight * alpha / rank * up down x;
or, fused, changes weights of its own. The model itself is never written to: it stays as it was bit
for bit, and different stacks may draw at the same time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from twostep.contract import Contract, ContractError, student_name
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import LowRank, find_layer, merge_lora, read_lora
from twostep.models.bundle import Bundle, load_bundle
from twostep.models.contracts import carried_contract, goes_on_a_student


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file, how strongly it is put on, and what it says of itself."""

    path: Path
    weight: float
    contract: Contract | None

    @classmethod
    def named(cls, lora: str) -> LoraFile:
        """Find "file", "file:0.8", or a built-in name; ModelError where there is none."""
        found = re.fullmatch(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?", lora)
        name, weight = (found[1], float(found[2] or 1)) if found else (lora, 1.0)
        path = find_model(name)
        if path.is_dir():
            raise ModelError(
                f"{path} is a model folder; give a LoRA's .safetensors, or its built-in name."
            )
        return cls(path, weight, carried_contract(path))

    @property
    def makes_students(self) -> bool:
        """Whether it turns teachers into students of few steps."""
        return self.contract is not None and not goes_on_a_student(self.contract)

    def read(self, parts: Mapping[str, nn.Module]) -> dict[str, LowRank]:
        """Read what it does to these networks; LoraError for a misfit."""
        return read_lora(
            self.path, parts, alpha=None if self.contract is None else self.contract.lora_alpha
        )

    def together(self, model: Contract) -> Contract:
        """Return the contract of such a model with this on it; ContractError where it was made for
        another.
        """
        said, weight = self.contract, "" if self.weight == 1 else f":{self.weight:g}"
        if (
            said is not None
            and not self.makes_students
            and said.base != re.split("[+:]", model.name)[0]
        ):
            raise ContractError(
                f"{self.path} was trained on {said.base}; this is {model.name}. Load that student."
            )
        if said is None or not self.makes_students:
            # The name goes into every picture.
            return replace(model, name=f"{model.name}+{self.path.stem}{weight}")
        if model.role == "student":
            twice = (
                f"{model.name} is one of {model.steps} steps already: it would be distilled twice"
            )
            makes = f"{self.path} makes {said.steps}-step students of teachers"
            raise ContractError(f"{makes}, and {twice}. Load its teacher, or leave this LoRA out.")
        if said.prediction_type != model.prediction_type:
            other = f"{model.name} predicts {model.prediction_type}. Use a LoRA of such a teacher"
            raise ContractError(
                f"{self.path} was distilled where {said.prediction_type} is predicted; {other}."
            )
        _, plus, styles = model.name.partition("+")
        name = f"{student_name(model.base, said.steps)}{weight}{plus}{styles}"
        return replace(said, name=name, base=model.base, sizes=model.sizes)


def load_with_loras(model: str | Path, loras: Sequence[str], *, steps: int | None = None) -> Bundle:
    """Load a model and merge LoRAs into it, in order, each "file" or "file:weight"; `steps` as for
    `load_bundle`.

    Where one of them makes students, it is the teacher that is loaded. Raises ModelError,
    ContractError.
    """
    worn = [LoraFile.named(lora) for lora in loras]
    few = next((garment for garment in worn if garment.makes_students), None)
    bundle = load_bundle(model, steps=steps if few is None else None)
    for garment in worn:
        bundle = replace(bundle, contract=garment.together(bundle.contract))
        merge_lora(garment.read(bundle.parts), bundle.parts, weight=garment.weight)
    if steps not in (None, bundle.contract.steps) and bundle.contract.role == "student":
        raise ModelError(
            f"{bundle.contract.name} draws in {bundle.contract.steps} steps, not in {steps}."
        )
    return replace(bundle, origin=(str(model), *loras))


class LoraCache:
    """A loaded model and the last `num_kept` stacks that it wore: one of them again costs no time
    and no look at disk.

    Move the model to its device and precision before. Not fused, a stack takes no memory beyond its
    LoRAs, which are shared between stacks; fused, it takes that of the networks it changes, and
    draws as fast as the model alone.
    """

    def __init__(self, bundle: Bundle, *, fused: bool = False, num_kept: int = 8) -> None:
        self.bundle, self.fused = bundle, fused
        self._wear, self._read = (
            lru_cache(num_kept)(self._put_on),
            lru_cache(num_kept)(self._take_out),
        )

    def apply(self, loras: Sequence[str]) -> Bundle:
        """Return the model with LoRAs on, each "file" or "file:weight"; raises as `load_with_loras`, also
        from any thread.
        """
        return self._wear(tuple(loras))

    def _put_on(self, loras: tuple[str, ...]) -> Bundle:
        worn, contract = [LoraFile.named(lora) for lora in loras], self.bundle.contract
        for garment in worn:
            contract = garment.together(contract)
        stack = [(garment.weight, self._read(replace(garment, weight=1.0))) for garment in worn]
        parts: dict[str, Any] = self.bundle.parts
        for part in {layer.partition(".")[0] for _, lora in stack for layer in lora}:
            weights = chain(parts[part].parameters(), parts[part].buffers())
            parts[part] = copy.deepcopy(
                parts[part], {} if self.fused else {id(kept): kept for kept in weights}
            )
        for weight, lora in stack:
            if self.fused:
                merge_lora(lora, parts, weight=weight)
            for name, low in lora.items() if not self.fused else ():
                scale = weight * low.alpha / low.rank
                find_layer(parts, name).register_forward_hook(partial(_beside, low, scale))
        text = replace(self.bundle.text, encoders=(parts["text_encoder"], parts["text_encoder_2"]))
        denoiser = self.bundle.denoiser.with_network(parts["unet"])
        origin = (*self.bundle.origin, *loras)
        return replace(self.bundle, denoiser=denoiser, text=text, contract=contract, origin=origin)

    def _take_out(self, garment: LoraFile) -> dict[str, LowRank]:
        parts, found = self.bundle.parts, {}
        for name, low in garment.read(parts).items():
            weight = find_layer(parts, name).weight
            found[name] = replace(low, down=low.down.to(weight), up=low.up.to(weight))
        return found


def _beside(
    low: LowRank, scale: float, layer: Any, inputs: tuple[Tensor], output: Tensor
) -> Tensor:
    if isinstance(layer, nn.Linear):
        return output + linear(scale * linear(inputs[0], low.down), low.up)
    inner = conv2d(inputs[0], low.down, None, layer.stride, layer.padding, layer.dilation)
    return output + conv2d(scale * inner, low.up)
