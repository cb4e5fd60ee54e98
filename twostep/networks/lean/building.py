"""From configs to networks, where these are among those that are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from twostep.networks.lean.autoencoders import KlAutoencoder, TinyAutoencoder
from twostep.networks.lean.clip import LeanClip
from twostep.networks.lean.unet import LeanUnet


def lean_network(config: Mapping[str, Any], name: str) -> nn.Module | None:
    """Return the network of a config, with weights as they are initialised.

    Args:
        config: As diffusers and transformers write it.
        name: "unet", "vae", "text_encoder" or "text_encoder_2", as folders have it.

    Returns:
        None where the config asks for what is not here.
    """
    if name == "unet":
        return LeanUnet(config) if LeanUnet.fits(config) else None
    if name == "vae":
        for kind in (TinyAutoencoder, KlAutoencoder):
            if kind.fits(config):
                return kind(config)
        return None
    if LeanClip.fits(config):
        return LeanClip(config, is_projected=name == "text_encoder_2")
    return None
