"""SDXL in one .safetensors file, as ComfyUI, A1111 and Civitai keep it, and in a folder.

A single file has no configs; `single_header` says where they lie, and what noise a file was trained
on. Here are the weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from twostep.contract import Contract, EdmSpec, PredictionType, VariancePreservingSpec
from twostep.formats.header import Header, read_header
from twostep.formats.ldm_names import (
    clip_g_names,
    clip_l_names,
    join,
    split,
    unet_names,
    vae_names,
)
from twostep.formats.locate import (
    SDXL_CONFIGS,
    ModelError,
    read_json,
    weights_variant,
)
from twostep.formats.single_header import (
    CLIP_G,
    CLIP_L,
    EDM_MEAN,
    EDM_STD,
    EDM_V_MAX,
    EDM_V_MIN,
    UNET,
    VAE,
    ZERO_SNR,
    Noise,
    V,
    config_folder,
    config_of,
    noise_of,
)

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

TINY = "AutoencoderTiny"
"""The class of diffusers that no single file has names for."""

LEFT_OUT = ("position_ids", "logit_scale")
"""Ends of keys that some files have and no network needs."""

_BYTES_AT_ONCE = 2**28
"""How much of a file stands in memory beside what it is converted to."""

_EDM_SCALE = 0.5
"""What latents of files with a mean and a deviation are scaled by beside."""


class SingleFile:
    """The weights of networks in one file, with the folder of their configs.

    The file is opened once, when the first weights are asked for.

    Arguments:
        file: its header, or its path, from which the header is read.
        folder: where the configs lie.
    """

    made_on = "meta"

    def __init__(self, file: Header | Path, folder: Path) -> None:
        self.header = read_header(file) if isinstance(file, Path) else file
        self.folder = folder

    @property
    def prediction_type(self) -> PredictionType | None:
        """What the file says that it predicts; most say nothing. Raises ModelError as `noise`."""
        return self.noise.prediction_type

    @cached_property
    def noise(self) -> Noise:
        """What the file says of the noise that it was trained on; raises as `noise_of`."""
        return noise_of(self.header)

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a network, `name` as in `PARTS`, with what the file says itself."""
        config = config_of(self.header, self.folder, name)
        if name == "vae" and EDM_MEAN in self.header.shapes:
            config["latents_mean"] = self.tensor(EDM_MEAN).float().flatten().tolist()
            config["latents_std"] = self.tensor(EDM_STD).float().flatten().tolist()
            config["scaling_factor"] = _EDM_SCALE
        return config

    def weights(
        self, network: nn.Module, part: str, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a network's weights; `part` is its prefix in the file.

        They are in the file's precision unless another one is given. Raises ModelError unless every
        key is accounted for.
        """
        # A UNet alone may have no prefix.
        keys = [key for key in self.header.shapes if key.startswith(part)] or self.header.shapes
        wanted = [key for key in keys if not key.endswith(LEFT_OUT)]
        read = read_tensors(self.header.path, wanted, dtype)
        weights = {key.removeprefix(part): value for key, value in read.items()}
        if part == CLIP_G:
            weights = split(weights)
        expected = network.state_dict()
        has_diffusers_names = part == UNET and weights.keys() & expected.keys()
        naming = _unchanged if has_diffusers_names else NAMES[part]
        where = f"{self.header.path} ({part}*)"
        try:
            return account(weights, expected, naming(expected), where)
        except ModelError as error:
            if self.folder != SDXL_CONFIGS:
                raise
            beside = self.header.path.with_suffix("")
            raise ModelError(
                f"{error} The configs are those of SDXL itself; of another model they must lie "
                f"beside it, in the folder {beside}."
            ) from error

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

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a network, `name` as in `PARTS`."""
        return read_json(self.folder / name / "config.json")

    def weights(
        self, network: nn.Module, part: str, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a network's weights; `part` is as in `PARTS`.

        They are in the files' precision unless another one is given. Raises ModelError unless every
        key is accounted for.
        """
        name = next(name for name, prefix in PARTS.items() if prefix == part)
        folder = self.folder / name
        weights = _read_parts(folder, dtype)
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


def folder_weights(
    folder: Path,
    network: nn.Module,
    dtype: torch.dtype | None = None,
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return the weights of a network in the folder of that one part, by the network's own names.

    Arguments:
        folder: of the part, as `vae` in a model folder.
        network: says which weights there are to be, and their shapes.
        dtype: their precision; None leaves the files'.
        tied: further names of weights, with the name that files have.

    Raises ModelError unless every weight is accounted for.
    """
    tied = tied or {}
    weights = _read_parts(folder, dtype)
    for again, name in tied.items():
        if name in weights:
            weights.pop(again, None)
    expected = network.state_dict()
    names = {key: tied.get(key, key) for key in expected}
    return account(weights, expected, names, str(folder))


def read_tensors(
    path: Path, keys: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read tensors of a file, which is mapped into memory and not copied.

    What is converted is copied, and the file is then mapped anew after every 256 MB of it, so that
    what was read does not stand in memory beside what became of it.

    Arguments:
        path: the file.
        keys: the names of the tensors.
        dtype: the precision that floating-point tensors get; None leaves all as they are.
    """
    tensors: dict[str, Tensor] = {}
    left = list(keys)[::-1]
    while left:
        num_bytes = 0
        with safe_open(path, "pt") as file:
            while left and num_bytes < _BYTES_AT_ONCE:
                tensor = file.get_tensor(left[-1])
                is_kept = dtype in (None, tensor.dtype) or not tensor.is_floating_point()
                tensors[left.pop()] = tensor if is_kept else tensor.to(dtype)
                num_bytes += 0 if is_kept else tensor.numel() * tensor.itemsize
                del tensor  # the last that holds the file in memory
    return tensors


def _read_parts(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Read all weights in the folder of one network, of the variant there is."""
    is_half = weights_variant(folder) is not None
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if (".fp16." in path.name) == is_half:
            header = read_header(path)  # says what is wrong with a file that is damaged
            weights |= read_tensors(path, header.shapes, dtype)
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


@dataclass(frozen=True)
class Outline:
    """Stands for weights where only the shapes of networks are wanted, which the source has."""

    source: SingleFile | FolderFiles
    made_on = "cpu"

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a network, `name` as in `PARTS`."""
        return self.source.config(name)

    def weights(
        self, network: nn.Module, part: str, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a network's weights as it was made with them."""
        return network.state_dict()


Weights = SingleFile | FolderFiles | Outline
"""Where the weights of networks come from."""


def find_single_file(header: Header) -> SingleFile:
    """Return a whole checkpoint with the folder of its configs.

    Raises ModelError for any other file, with what it is.
    """
    return SingleFile(header, config_folder(header))


def noise_marks(contract: Contract, vae: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors by which a whole file says what noise its network was trained on.

    Arguments:
        contract: of the model.
        vae: the config of its autoencoder.

    Raises ModelError for noise that no such file can speak of: it would be drawn as another.
    """
    schedule = contract.schedule
    predicts = contract.prediction_type
    mark = torch.zeros(0)
    if predicts == "edm" and schedule == EdmSpec() and vae.get("latents_std") is not None:
        shape = (1, -1, 1, 1)
        return {
            EDM_MEAN: torch.tensor(vae["latents_mean"]).view(shape),
            EDM_STD: torch.tensor(vae["latents_std"]).view(shape),
        }
    if isinstance(schedule, EdmSpec):
        known = EdmSpec(schedule.sigma_min, schedule.sigma_max, 1.0, "exponential")
        if predicts == "v" and schedule == known:
            return {
                EDM_V_MAX: torch.tensor(schedule.sigma_max),
                EDM_V_MIN: torch.tensor(schedule.sigma_min),
            }
    elif schedule == VariancePreservingSpec(zero_snr=True) and predicts == "v":
        return {V: mark, ZERO_SNR: mark}
    elif schedule == VariancePreservingSpec():
        return {V: mark} if predicts == "v" else {}
    raise ModelError(
        f"{contract.name} predicts {predicts} with the schedule {schedule}, which no single file "
        "can say: programs would draw it as another. Export it to diffusers, whose folders do."
    )


def has_names_for(autoencoder: Mapping[str, Any]) -> bool:
    """Tell by an autoencoder's config whether single files have names for its weights."""
    return bool(autoencoder.get("_class_name") != TINY)


def whole_weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the weights of networks, by their names in `PARTS`, as a single file has them.

    Raises ModelError for an autoencoder that no single file has names for.
    """
    if type(networks["vae"]).__name__ == TINY:
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
