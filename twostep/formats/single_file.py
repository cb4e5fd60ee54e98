"""SDXL in one .safetensors file, as ComfyUI, A1111 and Civitai keep it, and in a folder.

A single file has no configs. They, and the tokenizers, come from a model folder of the same name
beside it, or else from SDXL's own repository on the hub, whose weights are never fetched.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.contract import PredictionType
from twostep.formats.header import Header, read_header
from twostep.formats.identify import kind_of
from twostep.formats.ldm_names import (
    CLIP_G,
    CLIP_L,
    UNET,
    VAE,
    clip_g_names,
    clip_l_names,
    join,
    split,
    unet_names,
    vae_names,
)
from twostep.formats.locate import CONFIGS, INDEX_FILE, ModelError, fetch, weights_variant

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_INPAINTING = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"

Naming = Callable[[Iterable[str]], dict[str, str]]
"""Returns for every key of a network the name of that weight in a file."""

NAMES: dict[str, Naming] = {
    UNET: unet_names,
    VAE: vae_names,
    CLIP_L: clip_l_names,
    CLIP_G: clip_g_names,
}
"""How the weights of each part of a single file are named."""

PARTS = {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
"""The prefix in a single file of each network, by its name in a folder."""

GUIDANCE = "time_embedding.cond_proj.weight"
"""Zeros in the UNet of a student's folder, which say that guidance is distilled in."""

LEFT_OUT = ("position_ids", "logit_scale")
"""Ends of keys that some files have and no network needs."""


@dataclass(frozen=True, eq=False)
class SingleFile:
    """The weights of networks in one file, with the folder of their configs.

    The file is opened once, when the first weights are asked for.
    """

    header: Header
    folder: Path
    made_on = "meta"

    @property
    def prediction_type(self) -> PredictionType | None:
        """What the file says that it predicts; most say nothing.

        Raises ModelError for a zero-SNR schedule.
        """
        if "ztsnr" in self.header.shapes:
            raise ModelError(
                f"{self.header.path} was trained on a zero-SNR schedule, which is not known here."
            )
        named = self.header.metadata.get("modelspec.prediction_type", "")
        return "v" if "v_pred" in self.header.shapes or named.startswith("v") else None

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights in the file's precision; `part` is its prefix in the file.

        Raises ModelError unless every key is accounted for.
        """
        keys = [key for key in self.header.shapes if key.startswith(part)]
        weights = {}
        for key in keys or self.header.shapes:  # a UNet alone may have no prefix
            if not key.endswith(LEFT_OUT):
                weights[key.removeprefix(part)] = self.tensor(key)
        if part == CLIP_G:
            weights = split(weights)
        expected = network.state_dict()
        has_diffusers_names = part == UNET and weights.keys() & expected.keys()
        naming = _unchanged if has_diffusers_names else NAMES[part]
        where = f"{self.header.path} ({part}*)"
        return account(weights, expected, naming(expected), where)

    def tensor(self, key: str) -> Tensor:
        """Return one tensor of the file."""
        tensor: Tensor = self._open_file.get_tensor(key)
        return tensor

    @cached_property
    def _open_file(self) -> Any:
        return safe_open(self.header.path, "pt")


@dataclass(frozen=True)
class FolderFiles:
    """The weights of the networks in a model folder."""

    folder: Path
    made_on = "meta"

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights in the files' precision; `part` is as in `PARTS`.

        Raises ModelError unless every key is accounted for.
        """
        name = next(name for name, prefix in PARTS.items() if prefix == part)
        folder = self.folder / name
        weights = _read_parts(folder)
        if part == UNET:
            _drop_guidance(weights, folder)
        # Newer transformers dropped the first word of the keys that files have.
        naming = clip_l_names if part == CLIP_L else _unchanged
        names = naming(weights)
        weights = {
            names[key]: value for key, value in weights.items() if not key.endswith(LEFT_OUT)
        }
        expected = network.state_dict()
        return account(weights, expected, naming(expected), str(folder))


def _read_parts(folder: Path) -> dict[str, Tensor]:
    """Read all weights in the folder of one network, of the variant there is."""
    is_half = weights_variant(folder) is not None
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if (".fp16." in path.name) == is_half:
            read_header(path)  # says what is wrong with a file that is damaged
            weights |= load_file(path)
    return weights


def _drop_guidance(weights: dict[str, Tensor], folder: Path) -> None:
    """Remove the zeros that stand for distilled guidance; raises ModelError if they are none."""
    embedding = weights.pop(GUIDANCE, None)
    if embedding is not None and embedding.any():
        raise ModelError(
            f"{folder} wants to be told its guidance, as latent consistency models: not done here."
        )


def account(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    names: Mapping[str, str],
    where: str,
) -> dict[str, Tensor]:
    """Return weights by a network's own keys, and see to it that every one has its place.

    Arguments:
        weights: what a file holds, by the file's names.
        expected: the network's state, for its keys and shapes.
        names: the file's name for every key of the network.
        where: the file, for errors.

    Raises ModelError if a weight is missing, left over, or of another shape.
    """
    wrong = sorted(set(weights) ^ set(names.values()))
    if wrong:
        raise ModelError(f"{where}: {len(wrong)} weights are missing or foreign, as {wrong[0]}.")
    accounted = {}
    for key, name in names.items():
        value = _shaped(weights[name], expected[key])
        if value.shape != expected[key].shape:
            shapes = f"{list(value.shape)}, not {list(expected[key].shape)}"
            raise ModelError(f"{where} has other sizes than its config: {key} is {shapes}.")
        accounted[key] = value
    return accounted


class Outline:
    """Stands for weights where only the shapes of networks are wanted."""

    made_on = "cpu"

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights as it was made with them."""
        return network.state_dict()


Weights = SingleFile | FolderFiles | Outline
"""Where the weights of networks come from."""


def is_whole(header: Header) -> bool:
    """Tell whether a file holds an autoencoder, and so all that a model is."""
    return header.has(VAE)


def find_single_file(header: Header) -> SingleFile:
    """Return a whole checkpoint with the folder of its configs, which may be fetched.

    Raises ModelError for any other file, with what it is.
    """
    lacking = [part for part in NAMES if not header.has(part)]
    if lacking:
        first_key = next(iter(header.shapes), "nothing")
        raise ModelError(
            f"{header.path} is {kind_of(header)}: it has no {lacking[0]}*, and begins with "
            f"{first_key}. Expected a whole SDXL checkpoint, or a UNet that carries its contract."
        )
    beside = header.path.with_suffix("")
    if (beside / INDEX_FILE).is_file():
        return SingleFile(header, beside)
    first_layer = header.shape(r"diffusion_model\.input_blocks\.0\.0\.weight")
    is_inpainting = bool(first_layer) and first_layer[1] > 4
    base = SDXL_INPAINTING if is_inpainting else SDXL_BASE
    return SingleFile(header, fetch(base, only=CONFIGS))


def whole_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the weights of networks, by their names in `PARTS`, as a single file has them.

    Raises ModelError for an autoencoder that no single file has names for.
    """
    if isinstance(networks["vae"], AutoencoderTiny):
        raise ModelError(
            "Its autoencoder is an AutoencoderTiny, which no single file has names for: such a "
            "model exports to diffusers, unet and LoRA alone."
        )
    weights: dict[str, Tensor] = {}
    for name, part in PARTS.items():
        state = networks[name].state_dict()
        named = {name: state[key] for key, name in NAMES[part](state).items()}
        if part == CLIP_G:
            named = join(named)
        weights |= {part + name: value for name, value in named.items()}
    # The autoencoder's attention consisted of 1x1 convolutions.
    squares = [key for key in weights if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", key)]
    return weights | {key: weights[key][:, :, None, None] for key in squares}


def _unchanged(keys: Iterable[str]) -> dict[str, str]:
    return {key: key for key in keys}


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    """Return a weight in the shape that a network has for it.

    What is a linear layer here may be a 1x1 convolution in a file.
    """
    if value.dim() == 4 and like.dim() == 2 and value.shape[2:] == (1, 1):
        return value.reshape(like.shape)
    return value
