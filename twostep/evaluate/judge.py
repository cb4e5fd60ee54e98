"""The judge: a small classifier that says what an emoji picture shows, and how.

It sees 64x64 pictures and names concept, style and background; from the same features it estimates
how blurred a picture is, so that features (and with them the Frechet distance) do not become blind
to blur. Convolutions with batch normalisation, mean over the picture, linear heads. It was shown
real drawings only, never generated pictures (`twostep pretrain nano-judge`), and knows nothing of
prompts, pipelines or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from twostep.errors import TwostepError
from twostep.evaluate.attributes import Concept
from twostep.evaluate.frechet import FeatureStatistics, fit_features
from twostep.files import write_atomically

BUILT_IN = Path(__file__).parents[1] / "weights" / "nano" / "judge.safetensors"
"""The judge that ships with the nano models."""

PICTURE_PIXELS = 64
"""Side of the pictures that a judge sees."""

METADATA_KEY = "twostep.judge"
_BATCH = 128


class JudgeError(TwostepError):
    """A file that is no judge, or pictures that it cannot judge."""


@dataclass(frozen=True)
class Classes:
    """What a judge can tell apart, in the order of its logits."""

    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]

    @property
    def subgroups(self) -> tuple[str, ...]:
        """The subgroup of every concept, in the order of the concepts."""
        return tuple(concept.subgroup for concept in self.concepts)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judge's answer: logits per head, the blur it sees (standard deviation in pixels), and the
    features.
    """

    concept: Float[Tensor, "batch concepts"]
    style: Float[Tensor, "batch styles"]
    background: Float[Tensor, "batch backgrounds"]
    blur_pixels: Float[Tensor, " batch"]
    features: Float[Tensor, "batch features"]

    @staticmethod
    def cat(verdicts: Sequence[Verdict]) -> Verdict:
        """Join verdicts on several batches into one."""
        names = ("concept", "style", "background", "blur_pixels", "features")
        return Verdict(
            *(torch.cat([getattr(verdict, name) for verdict in verdicts]) for name in names)
        )


@dataclass(frozen=True)
class Origin:
    """Where a judge comes from: recipe, version of twostep, and its accuracy on held-out pictures
    (shares 0..1).
    """

    recipe: str
    version: str
    accuracy: dict[str, float]


class Judge(nn.Module):
    """The classifier; `judge` is the way to ask it, `forward` the way to train it."""

    def __init__(self, classes: Classes, channels: Sequence[int] = (32, 64, 112, 160)) -> None:
        super().__init__()
        self.classes = classes
        self.channels = tuple(channels)
        self.origin: Origin | None = None
        self.real: FeatureStatistics | None = None
        """Statistics of the features of real pictures, all concepts, styles and backgrounds alike.
        """
        self.body = nn.Sequential(*_layers(self.channels))
        width = self.channels[-1]
        self.concept_head = nn.Linear(width, len(classes.concepts))
        self.style_head = nn.Linear(width, len(classes.styles))
        self.background_head = nn.Linear(width, len(classes.backgrounds))
        self.blur_head = nn.Linear(width, 1)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Verdict:
        """Return the verdict on pictures in -1..1, unchecked and with gradients."""
        features = self.body(images).mean(dim=(2, 3))
        return Verdict(
            self.concept_head(features),
            self.style_head(features),
            self.background_head(features),
            self.blur_head(features)[:, 0],
            features,
        )

    def judge(self, images: Float[Tensor, "batch 3 height width"]) -> Verdict:
        """Return the verdict on any number of pictures in -1..1, batch by batch, without gradients.

        Raises JudgeError for no pictures, a wrong size, values that are not numbers, or values far
        outside -1..1.
        """
        check_pictures(images)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            verdicts = [self(batch.float()) for batch in torch.split(images, _BATCH)]
        self.train(was_training)
        return Verdict.cat(verdicts)

    def statistics(self, images: Float[Tensor, "batch 3 height width"]) -> FeatureStatistics:
        """Return the statistics of the features of pictures, for the Frechet distance."""
        return fit_features(self.judge(images).features)


def load_judge(path: Path = BUILT_IN) -> Judge:
    """Read what `twostep pretrain nano-judge` wrote, in fp32 and ready to judge; JudgeError where the
    file is no judge.
    """
    if not path.is_file():
        raise JudgeError(
            f"There is no judge at {path}. Train one with: twostep pretrain nano-judge"
        )
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return _rebuild(description, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise JudgeError(
            f"{path} is no judge, or a damaged one ({type(error).__name__}: {reason}). "
            "Give a file that `twostep pretrain nano-judge` wrote."
        ) from error


def save_judge(judge: Judge, path: Path) -> None:
    """Write a judge to one fp16 safetensors file with its classes and origin as metadata."""
    tensors = {
        name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()
    }
    if judge.real is not None:
        tensors |= {
            "real.mean": judge.real.mean.float(),
            "real.covariance": judge.real.covariance.float(),
        }
    description = {
        "concepts": [[c.icon, c.subgroup, list(c.names)] for c in judge.classes.concepts],
        "styles": judge.classes.styles,
        "backgrounds": judge.classes.backgrounds,
        "channels": judge.channels,
        "origin": vars(judge.origin) if judge.origin else None,
        "num_real": judge.real.num_samples if judge.real else 0,
    }
    with write_atomically(path) as file:
        file.write(
            save(
                {name: t.contiguous() for name, t in tensors.items()},
                {METADATA_KEY: json.dumps(description)},
            )
        )


def check_pictures(images: Tensor) -> None:
    """Raise JudgeError for tensors that are no pictures [batch, 3, 64, 64] with finite values in
    about -1..1.
    """
    expected = (3, PICTURE_PIXELS, PICTURE_PIXELS)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise JudgeError(
            f"the judge was given {images.dtype} {list(images.shape)}; expected floating-point pictures "
            f"[batch, {', '.join(map(str, expected))}] in -1..1. It knows no other size."
        )
    if len(images) == 0:
        raise JudgeError("there are no pictures to judge; give at least one.")
    broken = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(broken.any()):
        listing = ", ".join(map(str, broken.nonzero().flatten().tolist()[:8]))
        raise JudgeError(
            f"{int(broken.sum())} of {len(images)} pictures hold NaN or infinity (number {listing})."
        )
    if float(images.abs().max()) > 2:
        raise JudgeError(
            f"the values reach {float(images.abs().max()):.3g}; expected -1..1. Scale and clamp them."
        )


def _rebuild(description: dict[str, Any], tensors: dict[str, Tensor]) -> Judge:
    concepts = tuple(
        Concept(icon, subgroup, tuple(names)) for icon, subgroup, names in description["concepts"]
    )
    classes = Classes(concepts, tuple(description["styles"]), tuple(description["backgrounds"]))
    judge = Judge(classes, description["channels"])
    mean, covariance = tensors.pop("real.mean", None), tensors.pop("real.covariance", None)
    if mean is not None and covariance is not None:
        judge.real = FeatureStatistics(mean.double(), covariance.double(), description["num_real"])
    judge.origin = Origin(**description["origin"]) if description["origin"] else None
    judge.load_state_dict(tensors)
    return judge.eval().requires_grad_(False)


def _layers(channels: Sequence[int]) -> Iterator[nn.Module]:
    """Halve the picture once per width; every width but the first looks twice."""
    for depth, (narrow, wide) in enumerate(zip((3, *channels), channels, strict=False)):
        yield _convolution(narrow, wide, stride=2)
        if depth > 0:
            yield Residual(wide)


class Residual(nn.Module):
    """A convolution added to what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = _convolution(width, width, stride=1)

    def forward(
        self, x: Float[Tensor, "batch width rows columns"]
    ) -> Float[Tensor, "batch width rows columns"]:
        """Return x plus its convolution."""
        changed: Tensor = self.change(x)
        return x + changed


def _convolution(narrow: int, wide: int, *, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide), nn.ReLU())
