"""What is served, by name, and wishes fitted to it.

Clients name models and LoRAs; where these lie is the server's business, and nothing else can be
asked for. Many clients send steps, guidance and sizes that were meant for another model. `fit`
takes what comes nearest and says what it changed, or refuses, as it is told.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twostep.contract import Contract, ContractError
from twostep.diffusion import make_schedule, trailing_times
from twostep.errors import TwostepError
from twostep.formats import read_contracts, resolve
from twostep.formats.tiny_decoder import own_decoder
from twostep.media.codec import FULL, TINY
from twostep.networks.control import BUILT_IN as BUILT_IN_CONTROLNETS
from twostep.pipeline.request import (
    MAX_BATCH,
    NUM_DISTINCT_SEEDS,
    Control,
    LoraChoice,
    Picture,
    Request,
    RequestError,
)
from twostep.pipeline.settings import DrawingSettings
from twostep.pipeline.studio import FAVOURITE_STEPS
from twostep.serve.config import Bounds
from twostep.serve.items import formats_of
from twostep.serve.shapes import MAX_CONTROLS, MAX_FRAMES

_BUILT_IN_BASE = "nano"
"""What the ControlNets of the package were made for."""

_WITHOUT_FRAMES = ("image", "audio")
"""The media whose items have no frames."""

_USUAL_BOUNDS = Bounds()


class UnknownModelError(TwostepError):
    """A name that is not served."""


@dataclass(frozen=True)
class Served:
    """A name that clients may give: the model, where it lies, and the steps if the name says so."""

    name: str
    model: str
    contracts: tuple[Contract, ...]
    steps: int | None = None

    @property
    def media(self) -> str:
        """What it makes, as contracts call it."""
        return self.contracts[0].media

    @property
    def students(self) -> list[Contract]:
        """The students that the model has, by falling steps."""
        return [contract for contract in self.contracts if contract.role == "student"]

    @property
    def decoders(self) -> list[str]:
        """The decoders that may be asked for: the model's own, and the tiny one if it has one."""
        try:
            has_tiny = own_decoder(resolve(self.model)) is not None
        except TwostepError:
            # It went since it was listed, which whoever draws with it is told.
            has_tiny = False
        return [FULL, TINY] if has_tiny else [FULL]


@dataclass(frozen=True)
class Wish(DrawingSettings):
    """What a client asks for, before it is known whether the model can do it.

    The other fields are those of `Request`; `model` is the name that the client gave, None for any,
    and so are those of the LoRAs and ControlNets.
    """

    model: str | None = field(default=None, kw_only=True)
    image: Picture | None = field(default=None, kw_only=True)
    mask: Picture | None = field(default=None, kw_only=True)
    controls: tuple[Control, ...] = field(default=(), kw_only=True)
    loras: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Fitted:
    """A request that the model can draw, and sentences about what was changed to get there."""

    request: Request
    served: Served
    changes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stock:
    """What is served at one moment: models by name, the default first, and the places of LoRAs."""

    served: dict[str, Served]
    loras: dict[str, str]

    @property
    def default(self) -> Served:
        """The first model; raises UnknownModelError where there is none at the moment."""
        for served in self.served.values():
            return served
        raise UnknownModelError("no model is served at the moment; ask again when one is there.")


def take_stock(
    models: Sequence[str],
    loras: Sequence[str] = (),
    *,
    more_models: Sequence[str] = (),
    more_loras: Sequence[str] = (),
    read: Callable[[str], Sequence[Contract]] = read_contracts,
) -> tuple[Stock, list[str]]:
    """Read the contracts of models, and return what can be served, and notes on what cannot.

    Args:
        models: names, folders or files, the default first. A client names a model by the last part
            of its path without the suffix, or one of its checkpoints by the name in its contract,
            such as nano-4step.
        loras: files, named in the same way.
        more_models: models that were found; one whose name is taken is left out, with a note.
        more_loras: LoRAs that were found, likewise.
        read: returns the contracts of a model, the teacher's first.

    Raises ModelError for what is no model, and RequestError where two of `models` or of `loras`
    have one name.
    """
    served: dict[str, Served] = {}
    known: dict[str, str] = {}
    notes: list[str] = []
    for place in (*models, *more_models):
        new = Served(short_name(place), place, tuple(read(place)))
        if new.name not in served:
            served[new.name] = new
        elif place in models:
            raise RequestError(f"two models are called {new.name}; rename one.")
        else:
            notes.append(f"{place} is left out: {served[new.name].model} has its name. Rename one.")
    for each in list(served.values()):
        for contract in each.students:
            student = Served(contract.name, each.model, each.contracts, contract.steps)
            holder = served.setdefault(contract.name, student).model
            if holder != each.model:
                notes.append(f"{contract.name} is that of {holder}, not of {each.model}.")
    for place in (*loras, *more_loras):
        name = short_name(place)
        if name not in known:
            known[name] = place
        elif place in loras:
            raise RequestError(f"two LoRAs are called {name}; rename one.")
        else:
            notes.append(f"{place} is left out: {known[name]} has its name. Rename one.")
    return Stock(served, known), notes


class Catalogue:
    """The models, LoRAs and ControlNets that are served.

    Args:
        models: as for `take_stock`, and so are `loras`; or a stock with both.
        controlnets: names, folders, files or hub ids, named in the same way; those of the package
            are there too where a model is served that they were made for.
        bounds: the most that a wish may ask for.
        engine: what runs the networks.

    Raises what `take_stock` raises, and RequestError where two ControlNets have one name.
    """

    def __init__(
        self,
        models: Sequence[str] | Stock,
        loras: Sequence[str] = (),
        controlnets: Sequence[str] = (),
        *,
        bounds: Bounds = _USUAL_BOUNDS,
        engine: str = "eager",
    ) -> None:
        if not models:
            raise RequestError("no model to serve; name at least one.")
        self.bounds = bounds
        self.engine = engine
        self._stock = models if isinstance(models, Stock) else take_stock(models, loras)[0]
        self._controlnets: dict[str, str] = {}
        for place in controlnets:
            if short_name(place) in self._controlnets:
                raise RequestError(f"two ControlNets are called {short_name(place)}; rename one.")
            self._controlnets[short_name(place)] = place
        bases = {contract.base for each in self.served for contract in each.contracts}
        if _BUILT_IN_BASE in bases:
            for name in BUILT_IN_CONTROLNETS:
                self._controlnets.setdefault(name, name)

    def restock(self, stock: Stock) -> None:
        """Serve something else from now on; what was fitted before stays as it is."""
        self._stock = stock

    @property
    def default(self) -> Served:
        """What is drawn with where nothing is named; raises UnknownModelError without a model."""
        return self._stock.default

    @property
    def served(self) -> list[Served]:
        """Everything that may be named, the default first."""
        return list(self._stock.served.values())

    @property
    def loras(self) -> list[str]:
        """The names of the LoRAs."""
        return list(self._stock.loras)

    @property
    def controlnets(self) -> list[str]:
        """The names of the ControlNets."""
        return list(self._controlnets)

    def find_controlnet(self, name: str) -> str:
        """Return where a ControlNet lies; raises RequestError for a name that is not served."""
        if name not in self._controlnets:
            known = ", ".join(self._controlnets) or "none"
            raise RequestError(f"there is no ControlNet {name[:80]!r}; there are {known}.")
        return self._controlnets[name]

    def find(self, name: str) -> Served:
        """Return what a name stands for; raises UnknownModelError."""
        return _find(self._stock, name)

    def fit(self, wish: Wish, *, strict: bool) -> Fitted:
        """Make a request of a wish.

        What the model cannot do becomes what comes nearest, with a sentence for each change; or,
        if `strict`, the first one is refused. What no model can do is refused in any case.

        Raises:
            UnknownModelError: strict, and the model is not served.
            ContractError: strict, and the model cannot do what is wished.
            RequestError: the wish is impossible, too large, or names an unknown LoRA or ControlNet.
        """
        stock = self._stock
        _check_bounds(wish, self.bounds)
        changes: list[str] = []
        served = _nearest(stock, wish.model, changes, strict=strict)
        steps, contract = _fit_steps(served, wish.steps, self.bounds.steps, changes)
        is_student = contract.role == "student"
        guidance = wish.guidance
        if is_student and guidance is not None and guidance > 1:
            changes.append(f"guidance {guidance:g} was left out: {contract.name} has none")
            guidance = None
        negative = wish.negative_prompt
        if is_student and negative:
            changes.append(f"the negative prompt was left out: {contract.name} has no guidance")
            negative = ""
        sampler = wish.sampler
        if is_student and sampler not in (None, contract.sampler):
            changes.append(f"the sampler {sampler[:80]} was left out: {contract.name} has its own")
            sampler = None
        width, height = _fit_size(contract, wish, changes)
        frames = wish.frames
        if frames is not None and contract.media in _WITHOUT_FRAMES:
            made = f"{contract.name} makes {contract.things}"
            changes.append(f"frames {frames} was left out: {made}")
            frames = None
        decoder = wish.decoder
        if decoder != FULL and decoder not in served.decoders:
            changes.append(f"the decoder {decoder[:80]} was left out: {served.name} has none")
            decoder = FULL
        if strict and changes:
            raise ContractError(f"{changes[0]}. Ask for what it can do; this server is strict.")
        fitted = {
            "steps": steps,
            "guidance": guidance,
            "negative_prompt": negative,
            "width": width,
            "height": height,
            "sampler": sampler,
            "decoder": decoder,
            "frames": frames,
        }
        request = Request(
            **wish.settings | fitted,
            image=wish.image,
            mask=wish.mask,
            controls=tuple(
                replace(control, model=self.find_controlnet(control.model))
                for control in wish.controls
            ),
            model=served.model,
            loras=wish.loras,
            engine=self.engine,
        )
        return Fitted(_with_known_loras(stock, request), served, changes)

    def describe(self) -> dict[str, Any]:
        """Return what can be asked for, as plain values for JSON: the contracts in short."""
        stock = self._stock
        models = [
            {
                "name": served.name,
                "decoders": served.decoders,
                "checkpoints": [
                    {
                        "name": contract.name,
                        "role": contract.role,
                        "steps": contract.steps,
                        "guidance": contract.guidance,
                        "sizes": [list(size) for size in contract.sizes],
                        "prediction_type": contract.prediction_type,
                        "strengths": strengths(contract),
                        "media": contract.media,
                        "formats": formats_of(contract),
                    }
                    for contract in served.contracts
                ],
            }
            for served in stock.served.values()
            if served.steps is None
        ]
        return {
            "default_model": stock.default.name,
            "models": models,
            "loras": list(stock.loras),
            "controlnets": self.controlnets,
            "limits": {
                **self.bounds.model_dump(include={"num_images", "prompt_letters", "steps"}),
                "controls": MAX_CONTROLS,
            },
        }


def random_seed() -> int:
    """Return a seed for a request that has none."""
    return secrets.randbelow(NUM_DISTINCT_SEEDS - MAX_BATCH)


def strengths(contract: Contract) -> list[float]:
    """Return how much of a picture a model can change, rising, as shares of all of it.

    A student begins at the times that it was trained at, a teacher anywhere on its own grid. None
    where it knows no picture in its noise, or makes no pictures.
    """
    if contract.media != "image":
        return []
    schedule = make_schedule(**asdict(contract.schedule))
    if contract.sampling_times and contract.sampling_times[0] != schedule.top:
        return []
    times = contract.trained_times or trailing_times(contract.steps, schedule)
    return sorted(time / schedule.top for time in times)


def short_name(place: str) -> str:
    """Return what a model, LoRA or ControlNet is called: the end of its path without the suffix."""
    name = Path(place).name or place
    return name.removesuffix(".safetensors") or place


def nearest_student(students: Sequence[Contract], steps: int) -> Contract:
    """Return the student whose number of steps is nearest as a ratio, the slower of two."""
    return min(
        students, key=lambda contract: (abs(math.log(contract.steps / steps)), -contract.steps)
    )


def _find(stock: Stock, name: str) -> Served:
    if name not in stock.served:
        known = ", ".join(stock.served) or "none"
        raise UnknownModelError(f"there is no model {name[:80]!r}; there are {known}.")
    return stock.served[name]


def _nearest(stock: Stock, name: str | None, changes: list[str], *, strict: bool) -> Served:
    if not name:
        return stock.default
    if strict or name in stock.served:
        return _find(stock, name)
    changes.append(f"there is no model {name[:80]!r}: {stock.default.name} was taken")
    return stock.default


def _with_known_loras(stock: Stock, request: Request) -> Request:
    """Put where the LoRAs lie for their names; those of the prompt's tags are among them."""
    places = []
    for lora in request.loras:
        choice = LoraChoice.parse(lora) if isinstance(lora, str) else lora
        if choice.name not in stock.loras:
            known = ", ".join(stock.loras) or "none"
            raise RequestError(f"there is no LoRA {choice.name[:80]!r}; there are {known}.")
        places.append(LoraChoice(stock.loras[choice.name], choice.weight))
    return replace(request, loras=tuple(places))


def _check_bounds(wish: Wish, bounds: Bounds) -> None:
    if not wish.prompt.strip():
        raise RequestError("the prompt is empty; say what to draw.")
    letters = max(len(wish.prompt), len(wish.negative_prompt))
    most = bounds.prompt_letters
    if letters > most:
        raise RequestError(f"a prompt has {letters} letters; at most {most} may be.")
    most = bounds.num_images
    if not 1 <= wish.num_images <= most:
        raise RequestError(f"asked for {wish.num_images} images; 1 to {most} may be at once.")
    if wish.frames is not None and not 1 <= wish.frames <= MAX_FRAMES:
        raise RequestError(f"asked for {wish.frames} frames; 1 to {MAX_FRAMES} may be.")
    if wish.steps is not None and wish.steps < 1:
        raise RequestError(f"steps is {wish.steps}; expected a whole number from 1 up.")
    if len(wish.controls) > MAX_CONTROLS:
        raise RequestError(
            f"asked for {len(wish.controls)} ControlNets; at most {MAX_CONTROLS} may be."
        )


def _fit_steps(
    served: Served, wished: int | None, most: int, changes: list[str]
) -> tuple[int | None, Contract]:
    """Return the steps to ask a studio for, None for its own choice, and what will draw.

    A teacher without students takes any number up to `most`.
    """
    students = served.students
    by_steps = {contract.steps: contract for contract in served.contracts}
    if served.steps is not None:
        contract = by_steps[served.steps]
        if wished not in (None, contract.steps):
            changes.append(f"{contract.name} draws in {contract.steps} steps, not in {wished}")
        return contract.steps, contract
    if wished in by_steps:
        return wished, by_steps[wished]
    if not students:
        if wished is not None and wished > most:
            changes.append(f"at most {most} steps are drawn here, not {wished}")
            wished = most
        return wished, served.contracts[0]
    if wished is None:
        favourite = nearest_student(students, FAVOURITE_STEPS)
        if favourite.steps != FAVOURITE_STEPS:
            favourite = students[0]
        return None, favourite
    contract = nearest_student(students, wished)
    offered = ", ".join(str(each.steps) for each in served.contracts)
    changes.append(
        f"{served.name} draws in {offered} steps, not in {wished}: {contract.steps} were taken"
    )
    return contract.steps, contract


def _fit_size(
    contract: Contract, wish: Wish, changes: list[str]
) -> tuple[int, int] | tuple[None, None]:
    """Return a size that a contract has, or none where none is wished."""
    if wish.width is None or wish.height is None:
        return None, None
    width, height = wish.width, wish.height
    if min(width, height) < 1:
        raise RequestError(f"the size is {width}x{height}; expected at least one pixel a side.")
    try:
        contract.check(None, None, width, height)
    except ContractError:
        shape = math.log(width / height)
        area = math.log(width * height)

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            return (
                abs(math.log(size[0] / size[1]) - shape),
                abs(math.log(size[0] * size[1]) - area),
            )

        nearest = min(contract.sizes, key=distance)
        changes.append(
            f"{contract.name} does not draw {width}x{height}: {nearest[0]}x{nearest[1]} was taken"
        )
        return nearest
    return width, height
