"""The networks of an SDXL model folder, made by their configs and loaded with weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.contract import TOP_TIME, Contract, RectifiedFlowSpec
from twostep.diffusion import Schedule, VariancePreserving, make_schedule
from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.locate import CONFIGS, INDEX_FILE, ModelError, read_json
from twostep.formats.single_file import PARTS, FolderFiles, Weights, find_single_file
from twostep.media.image import ImageCodec
from twostep.text.clip import TextEncoders


def build_network(folder: Path, name: str) -> Any:
    """Make a network of a model folder by its config, with random weights on the default device.

    `name` is one of `PARTS`.
    """
    config = read_json(folder / name / "config.json")
    if name == "unet":
        config["time_cond_proj_dim"] = None  # see `sdxl.embed_no_guidance`
        return UNet2DConditionModel.from_config(config)
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    if name == "text_encoder_2":
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    if config.get("_class_name") == "AutoencoderTiny":
        return AutoencoderTiny.from_config(config)
    return AutoencoderKL.from_config(config)


def load_network(folder: Path, name: str, weights: Weights | None = None) -> Any:
    """Load a network of a model folder, frozen and in float32.

    Arguments:
        folder: the model folder, for the config.
        name: one of `PARTS`.
        weights: where the weights come from; the folder itself by default.

    Raises ModelError if weights are missing, damaged, or do not fit the config.
    """
    source = weights or FolderFiles(folder)
    with torch.device(source.made_on):
        network = build_network(folder, name)
    loaded = source.weights(network, PARTS[name])
    network.load_state_dict({key: value.float() for key, value in loaded.items()}, assign=True)
    for module in network.modules():
        # Text encoders count their positions in a buffer that no file has.
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.eval().requires_grad_(False)


def load_codec(folder: Path, weights: Weights | None = None) -> ImageCodec:
    """Load the autoencoder of a model folder, frozen and in float32; see `load_network`."""
    # Channels last: half as fast again on CPUs for a network that is all 3x3 convolutions.
    vae = load_network(folder, "vae", weights).to(memory_format=torch.channels_last)
    return ImageCodec(vae)


def load_text(folder: Path, weights: Weights | None = None) -> TextEncoders:
    """Load the text encoders of a model folder, frozen and in float32; see `load_network`.

    SDXL's index says that the empty prompt is all zeros; without an index, it is encoded like any
    other.
    """
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    first = load_network(folder, "text_encoder", weights)
    second = load_network(folder, "text_encoder_2", weights)
    return TextEncoders(
        tokenizers=(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        ),
        encoders=(first, second),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def load_schedule(folder: Path, contract: Contract) -> Schedule:
    """Return the noise schedule of a model.

    A rectified flow stands in the contract. Variance-preserving schedules are read from the
    scheduler's config, which every folder has. Raises ModelError unless it has linear or scaled
    linear betas over T = 1000 times.
    """
    if isinstance(contract.schedule, RectifiedFlowSpec):
        return make_schedule(**asdict(contract.schedule))
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    betas = config.get("beta_schedule", "linear")
    num_times = config.get("num_train_timesteps", TOP_TIME)
    is_zero_snr = bool(config.get("rescale_betas_zero_snr"))
    makers = {
        "scaled_linear": VariancePreserving.scaled_linear,
        "linear": VariancePreserving.linear,
    }
    if betas not in makers or num_times != TOP_TIME or is_zero_snr:
        rescaled = ", rescaled to zero SNR" if is_zero_snr else ""
        raise ModelError(
            f"{folder} has the schedule {betas!r} over {num_times} times{rescaled}; only "
            f"scaled_linear and linear betas over {TOP_TIME} times are known."
        )
    return makers[betas](num_times, config.get("beta_start", 0.0001), config.get("beta_end", 0.02))


def hollow_networks(model: str | Path | Checkpoint) -> dict[str, nn.Module]:
    """Return the networks of a model by their names in a folder, without memory for weights.

    Raises ModelError if their configs cannot be had.
    """
    checkpoint = resolve(model, only=CONFIGS)
    folder = checkpoint.path
    if not checkpoint.is_folder:
        folder = find_single_file(checkpoint.file).folder
    with torch.device("meta"):
        return {name: build_network(folder, name) for name in PARTS}
