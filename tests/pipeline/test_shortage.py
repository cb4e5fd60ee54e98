"""Where memory runs out: smaller pieces, then tiles with a word, then what would fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twostep.models.bundle import Bundle
from twostep.models.shortage import MemoryShortageError, is_shortage
from twostep.networks.backbone import Backbone
from twostep.pipeline.generation import generate, generate_together
from twostep.pipeline.request import Request

REQUEST = Request("a red apple", num_images=2)


def refuse(values: Tensor, most: int) -> None:
    if values.numel() > most:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {values.nbytes} bytes.")


@dataclass(frozen=True, eq=False)
class SmallCodec:
    """A codec with memory for so many latents."""

    codec: Any
    most: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def decode(self, latents: Tensor) -> Tensor:
        refuse(latents, self.most)
        pictures: Tensor = self.codec.decode(latents)
        return pictures


@dataclass(frozen=True, eq=False)
class SmallBackbone:
    """A backbone with memory for so many latents."""

    backbone: Backbone
    network: Any
    most: int

    @property
    def spec(self) -> Any:
        return self.backbone.spec

    def __call__(self, x: Tensor, time: Tensor, conditioning: Any) -> Tensor:
        refuse(x, self.most)
        return self.backbone(x, time, conditioning)


def with_small_codec(bundle: Bundle, most: int) -> Bundle:
    return replace(bundle, codec=SmallCodec(bundle.codec, most))


def with_small_backbone(bundle: Bundle, most: int) -> Bundle:
    denoiser = bundle.denoiser
    small = SmallBackbone(denoiser.backbone, denoiser.network, most)
    return replace(bundle, denoiser=replace(denoiser, backbone=small))


@pytest.fixture
def large(student: Bundle) -> Bundle:
    """The student, for pictures of twice the sides too."""
    contract = replace(student.contract, sizes=((128, 128), (64, 64)))
    return replace(student, contract=contract)


def test_pictures_are_decoded_one_by_one(student: Bundle) -> None:
    whole = generate(student, REQUEST)
    small = generate(with_small_codec(student, 4 * 16 * 16), REQUEST)
    assert small.warnings == whole.warnings
    for one, other in zip(small.images, whole.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_a_picture_is_decoded_in_tiles_with_a_word(student: Bundle) -> None:
    whole = generate(student, REQUEST)
    small = generate(with_small_codec(student, 4 * 8 * 8), REQUEST)
    (word,) = [each for each in small.warnings if each not in whole.warnings]
    assert "so it was done in tiles of 32 pixels" in word
    for one, other in zip(small.images, whole.images, strict=True):
        difference = np.abs(np.asarray(one, float) - np.asarray(other, float))
        assert difference.mean() < 12
        assert difference[:8, :8].mean() < 2  # far from every seam
        assert np.asarray(other).std() > 12


def test_what_would_fit_is_found_out(large: Bundle) -> None:
    cases: list[tuple[Bundle, str]] = [
        (with_small_backbone(large, 4 * 32 * 32), "one of 128x128 at a time fits"),
        (with_small_backbone(large, 4 * 16 * 16), "64x64 fits"),
        (with_small_backbone(large, 4), "nothing smaller fits either: use a smaller model"),
        (with_small_codec(large, 4), "nothing smaller fits either: use a smaller model"),
    ]
    for bundle, advice in cases:
        with pytest.raises(MemoryShortageError, match=f"for 2 pictures of 128x128; {advice}"):
            generate(bundle, REQUEST)


def test_the_other_requests_are_drawn_all_the_same(large: Bundle) -> None:
    bundle = with_small_backbone(large, 4 * 16 * 16)
    small = replace(REQUEST, num_images=1, width=64, height=64)
    first, second = generate_together(bundle, [replace(REQUEST, num_images=1), small])
    assert isinstance(first, MemoryShortageError)
    assert str(first) == "there is not enough memory for 128x128 pixels; 64x64 fits."
    assert second.images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_how_libraries_say_it(error: Exception, expected: bool) -> None:
    assert is_shortage(error) is expected


def test_other_errors_stay_what_they_are(student: Bundle) -> None:
    def fail(self: Any, latents: Tensor) -> Tensor:
        raise RuntimeError("a fault")

    codec: Callable[..., Any] = type("Faulty", (SmallCodec,), {"decode": fail})
    with pytest.raises(RuntimeError, match="a fault"):
        generate(replace(student, codec=codec(student.codec, 1)), REQUEST)
