"""The networks of an SDXL model folder, made by their configs and loaded with weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twostep.contract import Contract, EdmSpec
from twostep.diffusion import Schedule, make_schedule
from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.diffusers_names import noise_of_scheduler
from twostep.formats.locate import CONFIGS, INDEX_FILE, ModelError, read_json
from twostep.formats.single_file import (
    PARTS,
    FolderFiles,
    SingleFile,
    Weights,
    find_single_file,
)
from twostep.media.image import ImageCodec
from twostep.networks.lean import lean_network
from twostep.text.clip import TextEncoders
from twostep.text.vocabulary import END, clip_tokenizer, clip_words
from twostep.text.words import ClipWords


def build_network(config: dict[str, Any], name: str, *, lean: bool = False) -> Any:
    """Make a network by its config, with random weights on the default device.

    Arguments:
        config: as diffusers and transformers write it.
        name: one of `PARTS`.
        lean: whether it need do no more than draw, and may be one of `networks.lean`.
    """
    config = dict(config)
    if name == "unet":
        config["time_cond_proj_dim"] = None  # see `sdxl.embed_no_guidance`
    if lean and (network := lean_network(config, name)) is not None:
        return network
    if name.startswith("text"):
        return _text_encoder(config, name)
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    if name == "unet":
        return UNet2DConditionModel.from_config(config)
    if config.get("_class_name") == "AutoencoderTiny":
        return AutoencoderTiny.from_config(config)
    return AutoencoderKL.from_config(config)


def _text_encoder(config: dict[str, Any], name: str) -> Any:
    """Make a text encoder of transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def load_network(
    folder: Path, name: str, weights: Weights | None = None, *, lean: bool = False
) -> Any:
    """Load a network of a model folder, frozen and in float32.

    Arguments:
        folder: the model folder, for the config.
        name: one of `PARTS`.
        weights: where the weights come from; the folder itself by default.
        lean: as in `build_network`.

    Raises ModelError if weights are missing, damaged, or do not fit the config.
    """
    source = weights or FolderFiles(folder)
    config = source.config(name)
    with torch.device(source.made_on):
        network = build_network(config, name, lean=lean)
    network.load_state_dict(source.weights(network, PARTS[name], torch.float32), assign=True)
    for module in network.modules():
        # Text encoders count their positions in a buffer that no file has.
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.eval().requires_grad_(False)


def load_codec(
    folder: Path,
    weights: Weights | None = None,
    *,
    contract: Contract | None = None,
    lean: bool = False,
) -> ImageCodec:
    """Load the autoencoder of a model folder, frozen and in float32; see `load_network`.

    EDM counts noise in other units than the deviation of its data: the contract says which.
    """
    # Channels last: half as fast again on CPUs for a network that is all 3x3 convolutions.
    vae = load_network(folder, "vae", weights, lean=lean).to(memory_format=torch.channels_last)
    _check_units(folder / "vae" / "config.json", vae.config)
    if contract is not None and isinstance(contract.schedule, EdmSpec):
        return ImageCodec(vae, deviation=contract.schedule.sigma_data)
    return ImageCodec(vae)


def _check_units(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError unless a config says usable units of latents, which nothing else reads."""
    count = config["latent_channels"]
    _check_numbers(path, "scaling_factor", config.get("scaling_factor"), above=0.0)
    if config.get("latents_mean") is not None:
        _check_numbers(path, "latents_mean", config["latents_mean"], count)
    if config.get("latents_std") is not None:
        _check_numbers(path, "latents_std", config["latents_std"], count, above=0.0)


def _check_numbers(
    path: Path, name: str, given: Any, count: int | None = None, *, above: float = -math.inf
) -> None:
    """Raise ModelError unless an entry of a config is a number, or a list of so many.

    They must be finite, and above a bound.
    """
    values = [given] if count is None else given
    is_right = (
        isinstance(values, Sequence)
        and len(values) == (count or 1)
        and all(
            isinstance(each, int | float) and math.isfinite(each) and each > above
            for each in values
        )
    )
    if not is_right:
        expected = "a number" if count is None else f"{count} numbers"
        bound = "" if math.isinf(above) else f" above {above:g}"
        raise ModelError(
            f"{path} has {name} = {given!r}; expected {expected}{bound}. Fetch that model again."
        )


def load_text(folder: Path, weights: Weights | None = None, *, lean: bool = False) -> TextEncoders:
    """Load the text encoders of a model folder, frozen and in float32; see `load_network`.

    SDXL's index says that the empty prompt is all zeros, and an index that does not say it means
    the same, as in diffusers; without an index, it is encoded like any other. Without tokenizers,
    they are CLIP's, which SDXL has.
    """
    has_index = (folder / INDEX_FILE).is_file()
    index = read_json(folder / INDEX_FILE) if has_index else {}
    first = load_network(folder, "text_encoder", weights, lean=lean)
    second = load_network(folder, "text_encoder_2", weights, lean=lean)
    return TextEncoders(
        tokenizers=(
            load_tokenizer(folder / "tokenizer", END, lean=lean),
            load_tokenizer(folder / "tokenizer_2", "!", lean=lean),
        ),
        encoders=(first, second),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", has_index)),
    )


def load_tokenizer(folder: Path, pad: str, *, lean: bool) -> Any:
    """Return the tokenizer in a folder, or CLIP's where there is none.

    Arguments:
        folder: of the tokenizer.
        pad: what CLIP's fills prompts up with.
        lean: whether it need do no more than draw.
    """
    if not folder.is_dir():
        return clip_words(pad) if lean else clip_tokenizer(pad)
    if lean and (words := ClipWords.read(folder)) is not None:
        return words
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def load_schedule(folder: Path, contract: Contract | None = None) -> Schedule:
    """Return the noise schedule of a model, which stands in its contract.

    Without a contract it is read from the scheduler's config in the folder. Raises ModelError for a
    law of noise that is not known.
    """
    if contract is not None:
        return make_schedule(**asdict(contract.schedule))
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    _, spec = noise_of_scheduler(config, folder)
    return make_schedule(**asdict(spec))


def hollow_networks(model: str | Path | Checkpoint) -> dict[str, nn.Module]:
    """Return the networks of a model by their names in a folder, without memory for weights.

    Raises ModelError if their configs cannot be had.
    """
    checkpoint = resolve(model, only=CONFIGS)
    source: SingleFile | FolderFiles = FolderFiles(checkpoint.path)
    if not checkpoint.is_folder:
        source = find_single_file(checkpoint.file)
    configs = {name: source.config(name) for name in PARTS}
    with torch.device("meta"):
        return {name: build_network(config, name) for name, config in configs.items()}
