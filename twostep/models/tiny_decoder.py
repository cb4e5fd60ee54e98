"""Tiny decoders as networks: built, loaded, checked against a model's latents, and saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save
from torch import Tensor, nn

from twostep.contract import Contract
from twostep.files import write_atomically
from twostep.formats.checkpoint import Checkpoint
from twostep.formats.locate import ModelError
from twostep.formats.single_file import read_tensors
from twostep.formats.tiny_decoder import (
    DECODER_FILE,
    DecoderFile,
    DecoderNote,
    TinyLayout,
    diffusers_config,
    file_name,
    find_decoder,
    look_at_decoder,
    own_decoder,
)
from twostep.media.codec import FULL, TINY, TinyDecoder
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.networks.lean.autoencoders import TinyDecoder as Network
from twostep.training.halves import halved

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
"""The weights in a folder of diffusers."""

_ENCODER_WIDTHS = "encoder_block_out_channels"
"""What configs of tiny autoencoders have, and no others."""

_LEAST_AGREEMENT = 0.5
"""Share of what the model's own decoder shows that a decoder must show too. One of other latents
shows little of it; a picture that is grey all over, nothing.
"""


def build_decoder(layout: TinyLayout) -> Network:
    """Return a decoder of a size with random weights."""
    widths = (layout.width,) * len(layout.blocks)
    return Network(layout.latent_channels, widths, layout.blocks, 3)


def load_decoder(found: DecoderFile) -> TinyDecoder:
    """Load a decoder that was found, frozen and in float32."""
    path = found.header.path
    read = read_tensors(path, found.names.values(), torch.float32)
    weights = {name: read[key] for name, key in found.names.items()}
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"{path} holds values that are no numbers, in {found.names[name]}.")
    with torch.device("meta"):
        network: Any = build_decoder(found.layout)  # torch's stubs know no memory format
    network.load_state_dict(weights, assign=True)
    network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return TinyDecoder(network, found.scaling_factor, found.header.metadata)


def with_own_decoder(codec: ImageCodec, checkpoint: Checkpoint, contract: Contract) -> ImageCodec:
    """Return the codec of a model with the tiny decoder that comes with it, if any.

    Raises ModelError where that is for other latents.
    """
    file = own_decoder(checkpoint)
    if file is None:
        return codec
    found = look_at_decoder(file)
    _check_layout(found, codec, contract)
    return replace(codec, tiny=load_decoder(found))


class DecoderChoices:
    """Bundles that draw with a decoder of one's choice, each made once.

    Threads that ask for the same at once may make it twice.
    """

    def __init__(self) -> None:
        # Stacks of LoRAs share a codec, and so what was loaded for it.
        self._codecs: WeakKeyDictionary[ImageCodec, dict[str, ImageCodec]] = WeakKeyDictionary()
        self._bundles: WeakKeyDictionary[Bundle, dict[str, Bundle]] = WeakKeyDictionary()

    def apply(self, bundle: Bundle, decoder: str) -> Bundle:
        """Return a bundle that draws with a decoder: `FULL`, `TINY`, or of a file or a hub id.

        Raises ModelError where there is none, or it decodes other latents.
        """
        if decoder == FULL:
            return bundle
        made = self._bundles.setdefault(bundle, {})
        if decoder not in made:
            made[decoder] = replace(bundle, codec=self._codec(bundle, decoder))
        return made[decoder]

    def _codec(self, bundle: Bundle, decoder: str) -> ImageCodec:
        codec = bundle.codec
        if not isinstance(codec, ImageCodec):
            raise ModelError(
                f"{bundle.contract.name} makes {codec.media}, for which there are no tiny "
                f"decoders. Leave the decoder out, or say {FULL}."
            )
        made = self._codecs.setdefault(codec, {})
        if decoder not in made:
            made[decoder] = with_decoder(codec, decoder, bundle.contract)
        return made[decoder]


def with_decoder(codec: ImageCodec, decoder: str, contract: Contract) -> ImageCodec:
    """Return the codec of a contract's model with another decoder; see `DecoderChoices.apply`."""
    if decoder == TINY:
        if codec.tiny is None:
            raise ModelError(
                f"{contract.base} has no tiny decoder. Make one with `twostep distill --decoder "
                f"{contract.base} --out runs/decoder` and draw with --decoder "
                f"runs/decoder/model/{DECODER_FILE}, or give a file such as "
                "taesdxl_decoder.safetensors."
            )
        return replace(codec, decoder=TINY)
    found = find_decoder(decoder)
    _check_layout(found, codec, contract)
    _check_family(found, contract)
    tiny = load_decoder(found)
    weight = next(codec.vae.parameters())
    nn.Module.to(tiny.network, weight.device, weight.dtype)
    changed = replace(codec, tiny=tiny, decoder=decoder)
    shown = _agreement(changed)
    if shown < _LEAST_AGREEMENT:
        raise ModelError(
            f"{found.header.path} decodes other latents than those of {contract.base}: it shows "
            f"{max(0.0, shown):.0%} of what the model's own decoder shows{_made_for(found)}. Give "
            "one that was made for this model's autoencoder."
        )
    return changed


def save_own_decoder(bundle: Bundle, folder: Path) -> None:
    """Write the tiny decoder of a bundle, if it has one, into its model's folder."""
    if isinstance(bundle.codec, ImageCodec) and bundle.codec.tiny is not None:
        tiny = bundle.codec.tiny
        write_decoder(tiny.network, tiny.metadata, folder / DECODER_FILE)


def write_decoder(network: nn.Module, metadata: Mapping[str, str], path: Path) -> None:
    """Write a decoder in 16 bits, by the names that TAESD's own files have."""
    weights = {file_name(name): value for name, value in network.state_dict().items()}
    _write(weights, metadata, path)


def write_for_diffusers(
    network: nn.Module,
    layout: TinyLayout,
    vae: Any,
    metadata: Mapping[str, str],
    folder: Path,
) -> None:
    """Write a decoder in 16 bits as a folder of diffusers' AutoencoderTiny.

    Its encoder is that of `vae`, the autoencoder that the decoder learned from, if it is of that
    class. Of any other there is none that fits: diffusers then says that it is not trained.
    """
    config = diffusers_config(layout)
    weights = {f"decoder.{name}": value for name, value in network.state_dict().items()}
    if _ENCODER_WIDTHS in vae.config:
        config |= {key: vae.config[key] for key in (_ENCODER_WIDTHS, "num_encoder_blocks")}
        encoder = vae.encoder.state_dict()
        weights |= {f"encoder.{name}": value for name, value in encoder.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode())
    _write(weights, {"format": "pt", **metadata}, folder / DIFFUSERS_FILE)


def _write(weights: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    with write_atomically(path) as file:
        file.write(save(halved(weights), dict(metadata)))


def _check_layout(found: DecoderFile, codec: ImageCodec, contract: Contract) -> None:
    """Raise ModelError for a decoder of latents that have another layout."""
    layout = found.layout
    channels = codec.latent_shape(64, 64)[0]
    path = found.header.path
    if layout.latent_channels != channels:
        raise ModelError(
            f"{path} decodes latents of {layout.latent_channels} channels, and those of "
            f"{contract.base} have {channels}{_made_for(found)}. Give one for its autoencoder."
        )
    if layout.pixels_per_latent != codec.pixels_per_latent:
        raise ModelError(
            f"{path} makes {layout.pixels_per_latent} pixels a side of a latent, and "
            f"{contract.base} has {codec.pixels_per_latent}{_made_for(found)}. Give a decoder for "
            "its autoencoder."
        )


def _check_family(found: DecoderFile, contract: Contract) -> None:
    """Raise ModelError for a decoder that says that it is for another family."""
    note = DecoderNote.of_header(found.header)
    if note is not None and note.family != contract.family:
        raise ModelError(
            f"{found.header.path} is for models of the family {note.family}, and {contract.name} "
            f"is of {contract.family}. Give a decoder for its autoencoder."
        )


def _made_for(found: DecoderFile) -> str:
    note = DecoderNote.of_header(found.header)
    return "" if note is None else f" (it was made for {note.base})"


@torch.no_grad()
def _agreement(codec: ImageCodec) -> float:
    """Return which share of the variance of what the full decoder shows the tiny one shows too.

    Of soft colours, which any autoencoder knows.
    """
    weight = next(codec.vae.parameters())
    latents = codec.encode(codec.smooth_pictures().to(weight.device)).float()
    shown = replace(codec, decoder=FULL).decode(latents).float()
    error = (codec.decode_tiny(latents).clamp(-1, 1).float() - shown).square().mean()
    spread = (shown - shown.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    return float(1 - error / spread)
