"""From configs to networks, where these are among those that are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from twostep.networks.lean.autoencoders import KlAutoencoder, TinyAutoencoder
from twostep.networks.lean.clip import LeanClip
from twostep.networks.lean.unet import LeanUnet

_DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "cross_attention_dim": 1280,
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 4,
    },
    "AutoencoderKL": {
        "act_fn": "silu",
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "out_channels": 3,
        "scaling_factor": 0.18215,
    },
    "AutoencoderTiny": {
        "act_fn": "relu",
        "in_channels": 3,
        "latent_channels": 4,
        "out_channels": 3,
        "scaling_factor": 1.0,
    },
    "text": {
        "eos_token_id": 49407,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "vocab_size": 49408,
    },
}
"""What diffusers and transformers take for entries that a config leaves out."""


def lean_network(config: Mapping[str, Any], name: str) -> nn.Module | None:
    """Return the network of a config, with weights as they are initialised.

    Args:
        config: As diffusers and transformers write it.
        name: "unet", "vae", "text_encoder" or "text_encoder_2", as folders have it.

    Returns:
        None where the config asks for what is not here.
    """
    if name == "unet":
        config = {**_DEFAULTS["unet"], **config}
        return LeanUnet(config) if LeanUnet.fits(config) else None
    if name == "vae":
        kinds: dict[str, type[TinyAutoencoder] | type[KlAutoencoder]] = {
            "AutoencoderTiny": TinyAutoencoder,
            "AutoencoderKL": KlAutoencoder,
        }
        kind = config.get("_class_name", "AutoencoderKL")
        config = {**_DEFAULTS.get(kind, {}), **config}
        if kind not in kinds or not kinds[kind].fits(config):
            return None
        return kinds[kind](config)
    config = {**_DEFAULTS["text"], **config}
    if LeanClip.fits(config):
        return LeanClip(config, is_projected=name == "text_encoder_2")
    return None
