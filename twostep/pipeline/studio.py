"""The models that are loaded, and requests drawn with them.

A `Studio` decides what a request leaves open about its model: the student, the device and the
precision. It keeps the models that were used last, each once, and adds the LoRAs of a request
beside their layers instead of merging them, so that requests with different LoRAs share a model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from torch import nn

from twostep.contract import Contract, ContractError
from twostep.engines.engine import registered_engine
from twostep.errors import TwostepError
from twostep.formats import Checkpoint, resolve
from twostep.formats.contracts import SDXL
from twostep.formats.few_step import as_student
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.loading import load_to_draw
from twostep.models.lora_stack import LoraCache, LoraFile, LoraFinder
from twostep.models.tiny_decoder import DecoderChoices
from twostep.pipeline.generation import (
    OnAnswerOf,
    OnStep,
    OnStepOf,
    Progress,
    generate,
    generate_together,
)
from twostep.pipeline.request import Request, RequestError, Result
from twostep.training.device import drawing_dtype, find_device

FAVOURITE_STEPS = 2
"""The student that draws where a request says no number of steps, if the model has it."""


@dataclass(eq=False)
class _Slot:
    """A place for one model. The lock is held while it is loaded, so that it is loaded once."""

    lock: Lock = field(default_factory=Lock)
    cache: LoraCache | None = None
    num_bytes: int = 0


class Studio:
    """Loaded models, and where requests are drawn with them.

    Args:
        device: "auto", which is an accelerator if there is one, or a name as torch has it.
        dtype: precision of the networks; by default float16 on an accelerator, float32 on a CPU.
        max_models: how many models are kept; the one that was used longest ago leaves first. Each
            student of a model counts as one.
        max_bytes: how many bytes the weights of the kept models may take; None for any number. What
            leaves does so before the next model is moved to the device.
        num_kept_loras: how many combinations of LoRAs are kept for each model.
        check: called with a model before its files are read and after; what it raises keeps the
            model from being used. With it, loaded models have nothing of their files in memory, so
            that these may be written over.

    A studio may be used by several threads at once.
    """

    def __init__(
        self,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        max_models: int = 2,
        max_bytes: int | None = None,
        num_kept_loras: int = 8,
        check: Callable[[str], None] | None = None,
    ) -> None:
        if max_models < 1:
            raise RequestError(f"max_models is {max_models}; expected at least 1.")
        self.device = find_device(device)
        self.dtype = dtype or drawing_dtype(self.device)
        self._max_models = max_models
        self._max_bytes = max_bytes
        self._num_kept_loras = num_kept_loras
        self._check = check
        self._loras = LoraFinder()
        self._decoders = DecoderChoices()
        self._lock = Lock()
        self._slots: OrderedDict[tuple[str, int | None], _Slot] = OrderedDict()
        # Of models that are loaded, the steps that draw where nobody says how many.
        self._favourites: dict[str, int] = {}

    @property
    def loaded(self) -> list[tuple[str, int | None]]:
        """The models that are kept, each with the steps that it was loaded for, the latest last."""
        with self._lock:
            return [key for key, slot in self._slots.items() if slot.cache is not None]

    def forget(self, model: str) -> None:
        """Let go of a model, whatever its steps, so that it is read again when it is next used.

        What is being drawn with it ends on it.
        """
        with self._lock:
            self._favourites.pop(model, None)
            for key in [key for key in self._slots if key[0] == model]:
                del self._slots[key]

    def draw(self, request: Request, *, on_step: OnStep | None = None) -> Result:
        """Draw one request; raises the TwostepError that ended it.

        `on_step` is called after every step; what it raises ends the drawing.
        """
        return generate(self.load(request), request, on_step=on_step)

    def submit(
        self,
        requests: Sequence[Request],
        *,
        on_step: OnStepOf | None = None,
        on_answer: OnAnswerOf | None = None,
    ) -> list[Result | TwostepError]:
        """Draw several requests, those that are alike enough in shared batches.

        Alike are requests with the same model, LoRAs, engine, decoder, steps, strength, guidance,
        size, length of text, and ControlNets with their scales and shares. Each gets the pixels
        that `draw` would give it. Results stand in the order of the requests; where one failed, the
        TwostepError that `draw` would raise stands in its place, and the others are drawn all the
        same. `on_step` gets the place of a request and its progress, and `on_answer` what came of
        it once that is there; what either raises ends the drawing of all.
        """
        answers: dict[int, Result | TwostepError] = {}
        for places in _by_model(requests):
            try:
                bundle = self.load(requests[places[0]])
            except TwostepError as error:
                for place in places:
                    answers[place] = error
                    if on_answer is not None:
                        on_answer(place, error)
                continue

            def report(index: int, progress: Progress, places: list[int] = places) -> None:
                if on_step is not None:
                    on_step(places[index], progress)

            def answered(
                index: int, answer: Result | TwostepError, places: list[int] = places
            ) -> None:
                if on_answer is not None:
                    on_answer(places[index], answer)

            drawn = generate_together(
                bundle,
                [requests[place] for place in places],
                on_step=report,
                on_answer=answered,
            )
            answers.update(zip(places, drawn, strict=True))
        return [answers[place] for place in range(len(requests))]

    def load(self, request: Request) -> Bundle:
        """Return the model of a request with its LoRAs on, loaded if it is not there yet.

        `steps` picks the student; a model that has none takes any number. Left open, it is the
        student of two steps if there is one and its LoRAs go on it; else the student that a LoRA
        was trained on, else the teacher. A LoRA that makes students needs the teacher. `treated_as`
        says which few-step kind a model is whose file does not say it.
        Raises ModelError where there is no such model, or none for these steps, and ContractError
        for a LoRA that does not go on it.
        """
        engine = registered_engine(request.engine)
        loras = [self._loras.find(str(lora)) for lora in request.loras]
        steps = request.steps
        checkpoint = None
        if any(lora.makes_students for lora in loras):
            steps = None
        elif steps is None and not loras and (known := self._known_favourite(request.model)):
            steps = known
        elif steps is None:
            checkpoint = resolve(request.model)
            steps = _favourite_steps(checkpoint, loras)
            if not loras and steps is not None:
                self._favourites[request.model] = steps
        elif steps is not None and (request.model, steps) not in self._slots:
            checkpoint = resolve(request.model, steps=steps)
            if checkpoint.takes_any_steps:
                steps = None  # one model, whatever the steps
        model = self._model(request.model, steps, checkpoint)
        bundle = model.apply(loras, embeddings=request.embeddings)
        bundle = self._decoders.apply(bundle, request.decoder)
        contract = bundle.contract
        if request.treated_as is not None:
            contract = as_student(contract, SDXL, request.treated_as, request.steps)
            bundle = replace(bundle, contract=contract)
        if request.steps not in (None, contract.steps) and contract.role == "student":
            raise ModelError(
                f"{contract.name} draws in {contract.steps} steps, not in {request.steps}."
            )
        sizes: Sequence[tuple[int, int]] = contract.sizes
        if request.width is not None and request.height is not None:
            sizes = [(request.width, request.height)]
        prepared = engine.prepare(bundle, sizes)
        if prepared is bundle or prepared.runtime is not bundle.runtime:
            return prepared
        # An engine of others, which need not know that bundles name theirs.
        return replace(prepared, runtime=replace(prepared.runtime, engine=engine.name))

    def _known_favourite(self, model: str) -> int | None:
        """Return the steps of the student that draws where nobody says which, if it is loaded."""
        favourite = self._favourites.get(model)
        return favourite if (model, favourite) in self._slots else None

    def _model(self, model: str, steps: int | None, checkpoint: Checkpoint | None) -> LoraCache:
        """Return a loaded model, which is then the one that was used last.

        `checkpoint` is the model if it has been resolved already.
        """
        key = (model, steps)
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
            while len(self._slots) > self._max_models:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.cache is None:
                try:
                    bundle = self._read(model, steps, checkpoint)
                    self._make_room(key, slot, _num_bytes(bundle, self.dtype))
                    bundle = bundle.to(self.device, self.dtype)
                except BaseException:
                    self._forget(key, slot)
                    raise
                slot.cache = LoraCache(bundle.remembering(), num_kept=self._num_kept_loras)
            return slot.cache

    def _read(self, model: str, steps: int | None, checkpoint: Checkpoint | None) -> Bundle:
        """Read a model's files, which must be those that the studio may use all the while."""
        if self._check is None:
            return load_to_draw(checkpoint or model, steps=steps)
        self._check(model)
        bundle = load_to_draw(checkpoint or model, steps=steps)
        for network in bundle.networks:
            for tensor in (*nn.Module.parameters(network), *nn.Module.buffers(network)):
                tensor.data = tensor.data.clone()
        self._check(model)
        return bundle

    def _make_room(self, key: tuple[str, int | None], slot: _Slot, num_bytes: int) -> None:
        """Drop models that were used long ago until one of so many bytes fits in.

        Raises ModelError where it does not even fit alone.
        """
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise ModelError(
                f"{key[0]} takes {num_bytes / 2**30:.2f} GiB, and all models together may take "
                f"{self._max_bytes / 2**30:.2f}. Allow more memory, or use a smaller model."
            )
        with self._lock:
            slot.num_bytes = num_bytes
            others = [other for other in self._slots if other != key]
            while others and self._max_bytes is not None:
                if sum(each.num_bytes for each in self._slots.values()) <= self._max_bytes:
                    return
                del self._slots[others.pop(0)]

    def _forget(self, key: tuple[str, int | None], slot: _Slot) -> None:
        """Free the place of a model that could not be loaded."""
        with self._lock:
            if self._slots.get(key) is slot:
                del self._slots[key]


def _num_bytes(bundle: Bundle, dtype: torch.dtype) -> int:
    """Return the bytes that the weights of a model take in a precision."""
    tensors = [
        tensor
        for network in bundle.networks
        for tensor in (*nn.Module.parameters(network), *nn.Module.buffers(network))
    ]
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for tensor in tensors
    )


def _favourite_steps(model: Checkpoint, loras: Sequence[LoraFile]) -> int | None:
    """Return the steps of the student that draws where a request says nothing of them.

    None where the model has no students to pick from.
    """
    if model.takes_any_steps:
        return None
    fitting = [contract.steps for contract in model.contracts if _all_go_on(contract, loras)]
    if FAVOURITE_STEPS in fitting:
        return FAVOURITE_STEPS
    # Where none fits, loading says why.
    return fitting[0] if fitting else model.contract.steps


def _all_go_on(contract: Contract, loras: Sequence[LoraFile]) -> bool:
    """Whether LoRAs may be put on the model of a contract, in order."""
    try:
        for lora in loras:
            contract = lora.contract_on(contract)
    except ContractError:
        return False
    return True


def _by_model(requests: Sequence[Request]) -> list[list[int]]:
    """Return the places of the requests that need the same model with the same LoRAs."""
    alike: dict[object, list[int]] = {}
    for place, request in enumerate(requests):
        wish = (request.model, request.loras, request.embeddings, request.steps, request.engine)
        key = (*wish, request.treated_as, request.decoder)
        alike.setdefault(key, []).append(place)
    return list(alike.values())
