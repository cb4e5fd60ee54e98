"""SDXL in one .safetensors, as ComfyUI, A1111 and Civitai keep it: what the file is, and its
weights by part.

Such a file has no configs. They, and the tokenizers, come from a model folder of the same name
beside it, or else from SDXL's own on the hub; its weights are never fetched.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.contract import PredictionType
from twostep.formats.identify import kind_of, read_header
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
NAMES: dict[str, Naming] = {
    UNET: unet_names,
    VAE: vae_names,
    CLIP_L: clip_l_names,
    CLIP_G: clip_g_names,
}
PARTS = {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
GUIDANCE = "time_embedding.cond_proj.weight"
"""Zeros in the UNet of a student's folder, where they say that guidance is distilled in."""

LEFT_OUT = ("position_ids", "logit_scale")
"""Ends of keys that some files have and no network needs."""


@dataclass(frozen=True)
class SingleFile:
    """An SDXL checkpoint in one file, its weights still on disk."""

    path: Path
    folder: Path
    made_on = "meta"

    @property
    def prediction_type(self) -> PredictionType | None:
        """What the file says that it predicts; most say nothing. ModelError for a zero-SNR
        schedule.
        """
        header = read_header(self.path)
        if "ztsnr" in header.shapes:
            raise ModelError(
                f"{self.path} was trained on a zero-SNR schedule, which is not known here."
            )
        said = header.metadata.get("modelspec.prediction_type", "")
        return "v" if "v_pred" in header.shapes or said.startswith("v") else None

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights, in the file's precision; ModelError unless every key is
        accounted for.
        """
        with safe_open(self.path, "pt") as file:
            keys = [key for key in list(file.keys()) if key.startswith(part)] or list(file.keys())
            found = {
                key.removeprefix(part): file.get_tensor(key)
                for key in keys
                if not key.endswith(LEFT_OUT)
            }
        if part == CLIP_G:
            found = split(found)
        expected = network.state_dict()
        # a UNet alone may have diffusers' names
        own = part == UNET and found.keys() & expected.keys()
        names = (_unchanged if own else NAMES[part])(expected)
        return account(found, expected, names, f"{self.path} ({part}*)")


@dataclass(frozen=True)
class FolderFiles:
    """The networks of a model folder, their weights still on disk."""

    folder: Path
    made_on = "meta"

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights, in the files' precision; ModelError unless every key is
        accounted for.
        """
        folder = self.folder / next(name for name, each in PARTS.items() if each == part)
        half, found, expected = (
            weights_variant(folder) is not None,
            dict[str, Tensor](),
            network.state_dict(),
        )
        for path in sorted(folder.glob("*.safetensors")):
            if (".fp16." in path.name) == half and read_header(path):
                found |= load_file(path)
        told = found.pop(GUIDANCE, None) if part == UNET else None
        if told is not None and told.any():
            raise ModelError(
                f"{folder} wants to be told its guidance, as latent consistency models: not done here."
            )
        names, own = (
            (clip_l_names if part == CLIP_L else _unchanged)(keys) for keys in (found, expected)
        )
        found = {names[key]: value for key, value in found.items() if not key.endswith(LEFT_OUT)}
        return account(found, expected, own, str(folder))


def account(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    names: Mapping[str, str],
    where: str,
) -> dict[str, Tensor]:
    """Return by a network's own names what was found by other `names`; ModelError unless every
    weight has its place.
    """
    if wrong := sorted(set(found) ^ set(names.values())):
        raise ModelError(f"{where}: {len(wrong)} weights are missing or foreign, as {wrong[0]}.")
    weights = {key: _shaped(found[name], expected[key]) for key, name in names.items()}
    if other := next(
        (key for key, value in weights.items() if value.shape != expected[key].shape), None
    ):
        sizes = f"{list(weights[other].shape)}, not {list(expected[other].shape)}"
        raise ModelError(f"{where} has other sizes than its config: {other} is {sizes}.")
    return weights


class Outline:
    """Stands for weights where only the shapes of networks are wanted."""

    made_on = "cpu"

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights as it was made with them."""
        return network.state_dict()


def is_whole(path: Path) -> bool:
    """Tell whether a file holds an autoencoder, and so all that a model is."""
    return any(key.startswith(VAE) for key in read_header(path).shapes)


def find_single_file(path: Path) -> SingleFile:
    """Return the checkpoint with the folder of its configs; ModelError says what else the file is."""
    header = read_header(path)
    kind, lacking = (
        kind_of(header),
        [part for part in NAMES if not any(key.startswith(part) for key in header.shapes)],
    )
    if lacking:
        has = f"it has no {lacking[0]}*, and begins with {next(iter(header.shapes), 'nothing')}"
        expected = "Expected a whole SDXL checkpoint, or a UNet that carries its contract"
        raise ModelError(f"{path} is {kind}: {has}. {expected}.")
    beside, first = (
        path.with_suffix(""),
        header.shape(r"diffusion_model\.input_blocks\.0\.0\.weight"),
    )
    if (beside / INDEX_FILE).is_file():
        return SingleFile(path, beside)
    return SingleFile(
        path, fetch(SDXL_INPAINTING if first and first[1] > 4 else SDXL_BASE, only=CONFIGS)
    )


def whole_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the weights of networks, by their names in `PARTS`, as one file has them; ModelError
    for another kind.
    """
    if isinstance(networks["vae"], AutoencoderTiny):
        others = "such a model exports to diffusers, unet and LoRA alone."
        raise ModelError(
            f"Its autoencoder is an AutoencoderTiny, which no single file has names for: {others}"
        )
    weights: dict[str, Tensor] = {}
    for name, part in PARTS.items():
        state = networks[name].state_dict()
        named = {old: state[key] for key, old in NAMES[part](state).items()}
        weights |= {
            part + old: value for old, value in (join(named) if part == CLIP_G else named).items()
        }
    # The autoencoder's attention was of 1x1 convolutions.
    squares = [key for key in weights if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", key)]
    return weights | {key: weights[key][:, :, None, None] for key in squares}


def _unchanged(keys: Iterable[str]) -> dict[str, str]:
    return {key: key for key in keys}


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    """Return what is a 1x1 convolution in the file as the linear layer that it may be here."""
    return (
        value.reshape(like.shape)
        if value.dim() == 4 and like.dim() == 2 and value.shape[2:] == (1, 1)
        else value
    )
