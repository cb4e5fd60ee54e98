"""What looks at pictures before anybody gets them, and keeps, blurs or refuses each.

A filter is a classifier as transformers saves it, or a function of the operator's. It stands
between a studio and the engine, so every API has what it decides; the previews on the way are
judged too, and all frames of clips. Where it fails the job fails: nothing is let through unseen, so
sounds, of which it knows nothing, are refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, get_args

import torch
from PIL import Image, ImageFilter

from twostep.errors import TwostepError
from twostep.media.clip import Clip
from twostep.pipeline.generation import OnAnswerOf, OnStepOf, Progress
from twostep.pipeline.request import Request, Result
from twostep.serve.config import FilterSettings, ServeError, Verdict
from twostep.serve.engine import Draws, EngineError
from twostep.serve.items import pictures_in

Judges = Callable[[Sequence[Image.Image]], Sequence[Verdict]]
"""Returns "keep", "blur" or "refuse" for each picture."""

_BLUR = 1 / 12
"""The blur's standard deviation as a share of a picture's longer side: shapes are gone."""

_MILDEST: Verdict = "keep"

_HARDNESS: dict[Verdict, int] = {verdict: rank for rank, verdict in enumerate(get_args(Verdict))}


class RefusedPictureError(EngineError):
    """A picture that was drawn, and that the server's filter does not let out."""

    code = "content_policy_violation"
    """The word that OpenAI's API has for it."""


class Classifier:
    """Judges pictures by the labels of an image classifier.

    Args:
        model: a folder or hub id, as transformers saves it; only safetensors are read.
        verdicts: what becomes of pictures of a label; the hardest of those that count is taken.
        threshold: the probability from which on a label counts.
        device: where it runs, as torch names it.

    Raises ServeError for what is no such model, and for a label that it does not have.
    """

    def __init__(
        self, model: str, verdicts: dict[str, Verdict], threshold: float, device: str = "cpu"
    ) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self._prepare = AutoImageProcessor.from_pretrained(model, backend="pil")
            network = AutoModelForImageClassification.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ServeError(f"{model} is no image classifier: {reason}.") from error
        self._device = device
        self._network = network.eval().to(device)
        labels = {name: int(place) for place, name in network.config.id2label.items()}
        for label in verdicts:
            if label not in labels:
                raise ServeError(
                    f"the filter {model} has no label {label!r}; it has {', '.join(labels)}."
                )
        self._verdicts = [(labels[label], verdict) for label, verdict in verdicts.items()]
        self._threshold = threshold

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return a verdict on each picture."""
        pixels = self._prepare([image.convert("RGB") for image in images], return_tensors="pt")
        logits = self._network(pixel_values=pixels["pixel_values"].to(self._device)).logits
        verdicts: list[Verdict] = []
        for shares in logits.float().softmax(-1).tolist():
            counting: list[Verdict] = [
                verdict for place, verdict in self._verdicts if shares[place] >= self._threshold
            ]
            verdicts.append(max([*counting, _MILDEST], key=_HARDNESS.__getitem__))
        return verdicts


class FilteredStudio:
    """A studio whose pictures are judged; the engine draws with it as with the studio alone.

    Args:
        studio: what draws.
        judge: what judges.
        count: told of every verdict on a finished picture.
    """

    def __init__(
        self, studio: Draws, judge: Judges, count: Callable[[Verdict], None] | None = None
    ) -> None:
        self._studio = studio
        self._judge = judge
        self._count = count

    def submit(
        self,
        requests: Sequence[Request],
        *,
        on_step: OnStepOf | None = None,
        on_answer: OnAnswerOf | None = None,
    ) -> list[Result | TwostepError]:
        """Draw requests as the studio does, and judge what comes of them."""
        judged: dict[int, Result | TwostepError] = {}

        def report(place: int, progress: Progress) -> None:
            if on_step is not None:
                on_step(place, replace(progress, previews=lambda: self._shown(progress.previews())))

        def judge(place: int, answer: Result | TwostepError) -> None:
            judged[place] = self._judged(answer) if isinstance(answer, Result) else answer
            if on_answer is not None:
                on_answer(place, judged[place])

        self._studio.submit(requests, on_step=report, on_answer=judge)
        return [judged[place] for place in range(len(requests))]

    def _judged(self, result: Result) -> Result | TwostepError:
        """Return a result with what is to be blurred blurred, or why it is refused as a whole."""
        shown = [pictures_in(item) for item in result.images]
        if not all(shown):
            return RefusedPictureError(
                f"{result.contract.name} makes {result.contract.things}, and the server's "
                "filter judges pictures alone; ask for pictures, or a server without a filter."
            )
        found = iter(self._verdicts([picture for pictures in shown for picture in pictures]))
        # Of a clip the hardest of its frames.
        verdicts = [
            max(islice(found, len(pictures)), key=_HARDNESS.__getitem__) for pictures in shown
        ]
        for verdict in verdicts:
            if self._count is not None:
                self._count(verdict)
        total = len(verdicts)
        if "refuse" in verdicts:
            which = " ".join(
                str(i + 1) for i, verdict in enumerate(verdicts) if verdict == "refuse"
            )
            return RefusedPictureError(
                f"picture {which} of {total} was refused by the server's filter; "
                "ask for something else, or with another seed."
            )
        images = [
            _blurred_item(item) if verdict == "blur" else item
            for item, verdict in zip(result.images, verdicts, strict=True)
        ]
        notes = [
            f"picture {i + 1} of {total} was blurred by the server's filter."
            for i, verdict in enumerate(verdicts)
            if verdict == "blur"
        ]
        return replace(result, images=images, warnings=[*result.warnings, *notes])

    def _shown(self, previews: list[Image.Image]) -> list[Image.Image]:
        """Return previews with those blurred that are not kept."""
        verdicts = self._verdicts(previews)
        return [
            image if verdict == "keep" else blurred(image)
            for image, verdict in zip(previews, verdicts, strict=True)
        ]

    def _verdicts(self, images: Sequence[Image.Image]) -> list[Verdict]:
        verdicts = list(self._judge(images))
        if len(verdicts) != len(images) or any(each not in _HARDNESS for each in verdicts):
            raise TypeError(
                f"the filter returned {verdicts!r} for {len(images)} pictures; expected one of "
                f"{', '.join(_HARDNESS)} for each"
            )
        return verdicts


def _blurred_item(item: Any) -> Any:
    """Return a picture, or a clip, with all that can be seen of it blurred."""
    if isinstance(item, Clip):
        return replace(item, frames=tuple(map(blurred, item.frames)))
    return blurred(item)


def blurred(image: Image.Image) -> Image.Image:
    """Return a picture of which only the rough distribution of colours is left."""
    return image.filter(ImageFilter.GaussianBlur(_BLUR * max(image.size)))


def load_filter(settings: FilterSettings, device: str = "cpu") -> Judges:
    """Return what judges pictures, as the settings say.

    Raises ServeError for a function that cannot be imported, and what `Classifier` raises.
    """
    if settings.model is not None:
        return Classifier(settings.model, settings.verdicts, settings.threshold, device)
    module, _, name = str(settings.function).partition(":")
    try:
        judge: Judges = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ServeError(f"the filter {settings.function} cannot be imported: {error}.") from error
    if not callable(judge):
        raise ServeError(f"the filter {settings.function} is no function.")
    return judge
