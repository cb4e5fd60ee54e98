"""The judge: a small classifier that says what a picture of the built-in models shows, and how.

It sees pictures of one size and names concept, style and background. From the same features it
estimates how blurred a picture is, so that the features, and with them the Frechet distance, do not
become blind to blur. Convolutions with batch normalisation, mean over the picture, linear heads. It
was shown real drawings only, never generated pictures (`twostep pretrain nano-judge`), and knows
nothing of prompts, pipelines or models.
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
from twostep.training.halves import halved

BUILT_IN = Path(__file__).parents[1] / "weights" / "nano" / "judge.safetensors"
"""The judge that ships with the nano models."""

METADATA_KEY = "twostep.judge"
"""Where a judge's file keeps its classes and its origin."""

_BATCH = 128
_DEFAULT_PIXELS = 64
"""The size of judges whose file does not say it."""

_LARGEST_VALUE = 2.0
"""Beyond it, pictures were surely not scaled to -1..1; slightly outside they may be."""


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
    """The judge's answer on a batch of pictures.

    Attributes:
        concept: logits of the concepts.
        style: logits of the styles.
        background: logits of the backgrounds.
        blur_pixels: the blur it sees, a standard deviation in pixels.
        features: what the heads read.
    """

    concept: Float[Tensor, "batch concepts"]
    style: Float[Tensor, "batch styles"]
    background: Float[Tensor, "batch backgrounds"]
    blur_pixels: Float[Tensor, " batch"]
    features: Float[Tensor, "batch features"]

    @staticmethod
    def cat(verdicts: Sequence[Verdict]) -> Verdict:
        """Join verdicts on several batches into one."""
        return Verdict(
            concept=torch.cat([verdict.concept for verdict in verdicts]),
            style=torch.cat([verdict.style for verdict in verdicts]),
            background=torch.cat([verdict.background for verdict in verdicts]),
            blur_pixels=torch.cat([verdict.blur_pixels for verdict in verdicts]),
            features=torch.cat([verdict.features for verdict in verdicts]),
        )


@dataclass(frozen=True)
class Origin:
    """Where a judge comes from.

    Attributes:
        recipe: its name.
        version: of twostep.
        accuracy: on held-out pictures, as shares 0..1.
    """

    recipe: str
    version: str
    accuracy: dict[str, float]


class Judge(nn.Module):
    """The classifier; `judge` is the way to ask it, `forward` the way to train it.

    Attributes:
        classes: what it tells apart.
        channels: widths of its layers.
        pixels: side of the pictures that it judges.
        origin: where it comes from; None before it has been measured.
        real: statistics of the features of real pictures, of all concepts, styles and backgrounds
            alike; None before they have been taken.
    """

    def __init__(
        self,
        classes: Classes,
        channels: Sequence[int] = (32, 64, 112, 160),
        pixels: int = _DEFAULT_PIXELS,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.channels = tuple(channels)
        self.pixels = pixels
        self.origin: Origin | None = None
        self.real: FeatureStatistics | None = None
        self.body = nn.Sequential(*_layers(self.channels))
        width = self.channels[-1]
        self.concept_head = nn.Linear(width, len(classes.concepts))
        self.style_head = nn.Linear(width, len(classes.styles))
        self.background_head = nn.Linear(width, len(classes.backgrounds))
        self.blur_head = nn.Linear(width, 1)

    @property
    def device(self) -> torch.device:
        """Where its weights are, and pictures must be."""
        return self.concept_head.weight.device

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Verdict:
        """Return the verdict on pictures in -1..1, unchecked and with gradients."""
        features = self.body(images).mean(dim=(2, 3))
        return Verdict(
            concept=self.concept_head(features),
            style=self.style_head(features),
            background=self.background_head(features),
            blur_pixels=self.blur_head(features)[:, 0],
            features=features,
        )

    def levels(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Return the features before every halving of the picture and at the end, with gradients.

        They are [batch, width, rows, columns] with the widths of `channels`.
        """
        levels: list[Tensor] = []
        features = images
        for layer in self.body:
            is_residual = isinstance(layer, Residual)
            features = layer(features)
            if is_residual:
                levels[-1] = features
            else:
                levels.append(features)
        return levels

    def judge(self, images: Float[Tensor, "batch 3 height width"]) -> Verdict:
        """Return the verdict on any number of pictures in -1..1, batch by batch, without gradients.

        Raises JudgeError for no pictures, a wrong size, values that are not numbers, or values far
        outside -1..1.
        """
        check_pictures(images, self.pixels)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            verdicts = [self(batch.float()) for batch in torch.split(images, _BATCH)]
        self.train(was_training)
        return Verdict.cat(verdicts)

    def statistics(self, images: Float[Tensor, "batch 3 height width"]) -> FeatureStatistics:
        """Return the statistics of the features of pictures, for the Frechet distance."""
        return fit_features(self.judge(images).features)


def load_judge(path: Path = BUILT_IN, *, outline: bool = False) -> Judge:
    """Read a judge, in fp32 and ready to judge; JudgeError if the file is none, or damaged.

    An outline has the shapes of the file and no weights, to plan with.
    """
    if not path.is_file():
        raise JudgeError(
            f"There is no judge at {path}. Train one with: twostep pretrain nano-judge"
        )
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})[METADATA_KEY])
            names = [] if outline else list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        return _rebuild(description, tensors, outline=outline)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise JudgeError(
            f"{path} is no judge, or a damaged one ({type(error).__name__}: {reason}). "
            "Give a file that `twostep pretrain nano-judge` wrote."
        ) from error


def save_judge(judge: Judge, path: Path) -> None:
    """Write a judge to one fp16 safetensors file, with classes and origin as metadata."""
    tensors = halved(judge.state_dict())
    if judge.real is not None:
        tensors["real.mean"] = judge.real.mean.float().contiguous()
        tensors["real.covariance"] = judge.real.covariance.float().contiguous()
    description = {
        "concepts": [[c.icon, c.subgroup, list(c.names)] for c in judge.classes.concepts],
        "styles": judge.classes.styles,
        "backgrounds": judge.classes.backgrounds,
        "channels": judge.channels,
        "pixels": judge.pixels,
        "origin": vars(judge.origin) if judge.origin else None,
        "num_real": judge.real.num_samples if judge.real else 0,
    }
    with write_atomically(path) as file:
        file.write(save(tensors, {METADATA_KEY: json.dumps(description)}))


def check_pictures(images: Tensor, pixels: int = _DEFAULT_PIXELS) -> None:
    """Raise JudgeError for tensors that are no pictures of this size.

    Expected are [batch, 3, pixels, pixels] with finite values in about -1..1.
    """
    expected = (3, pixels, pixels)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise JudgeError(
            f"the judge was given {images.dtype} {list(images.shape)}; expected floating-point "
            f"pictures [batch, {', '.join(map(str, expected))}] in -1..1. It knows no other size."
        )
    if len(images) == 0:
        raise JudgeError("there are no pictures to judge; give at least one.")
    broken = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(broken.any()):
        listing = ", ".join(map(str, broken.nonzero().flatten().tolist()[:8]))
        raise JudgeError(
            f"{int(broken.sum())} of {len(images)} pictures hold NaN or infinity "
            f"(number {listing})."
        )
    largest = float(images.abs().max())
    if largest > _LARGEST_VALUE:
        raise JudgeError(f"the values reach {largest:.3g}; expected -1..1. Scale and clamp them.")


def _rebuild(description: dict[str, Any], tensors: dict[str, Tensor], *, outline: bool) -> Judge:
    """Make a judge from what its file says; tensors that do not fit raise."""
    concepts = tuple(
        Concept(icon, subgroup, tuple(names)) for icon, subgroup, names in description["concepts"]
    )
    classes = Classes(concepts, tuple(description["styles"]), tuple(description["backgrounds"]))
    pixels = int(description.get("pixels", _DEFAULT_PIXELS))
    judge = Judge(classes, description["channels"], pixels)
    mean = tensors.pop("real.mean", None)
    covariance = tensors.pop("real.covariance", None)
    if mean is not None and covariance is not None:
        judge.real = FeatureStatistics(mean.double(), covariance.double(), description["num_real"])
    if description["origin"]:
        judge.origin = Origin(**description["origin"])
    if not outline:
        judge.load_state_dict(tensors)
    return judge.eval().requires_grad_(False)


def _layers(channels: Sequence[int]) -> Iterator[nn.Module]:
    """Halve the picture once per width; every width but the first has a residual block too."""
    for depth, (narrow, wide) in enumerate(zip((3, *channels), channels, strict=False)):
        yield _convolution(narrow, wide, stride=2)
        if depth > 0:
            yield Residual(wide)


class Residual(nn.Module):
    """A convolution added to its input."""

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
