"""SDXL in one .safetensors file, as ComfyUI, A1111 and Civitai keep it, and in a folder.

A single file has no configs. They, and the tokenizers, come from a model folder of the same name
beside it, or else they are SDXL's own, which lie in this package. What a file says of the noise
that it was trained on, it says by a few odd tensors and by its metadata.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.contract import (
    Contract,
    ContractError,
    EdmSpec,
    PredictionType,
    RectifiedFlowSpec,
    ScheduleSpec,
    VariancePreservingSpec,
)
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
from twostep.formats.locate import (
    INDEX_FILE,
    SDXL_CONFIGS,
    ModelError,
    read_json,
    weights_variant,
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

LEFT_OUT = ("position_ids", "logit_scale")
"""Ends of keys that some files have and no network needs."""


EDM_MEAN = "edm_mean"
EDM_STD = "edm_std"
EDM_V_MAX = "edm_vpred.sigma_max"
EDM_V_MIN = "edm_vpred.sigma_min"
V = "v_pred"
ZERO_SNR = "ztsnr"
"""Tensors beside the networks' by which a file says what noise it was trained on: Playground 2.5
has mean and deviation of its latents, CosXL the ends of its noise levels; the last two are marks.
"""

_EDM_SCALE = 0.5
"""What latents of such files are scaled by, beside their mean and deviation."""

_PREDICTS = ("modelspec.prediction_type", "modelspec.predict_key")
"""Metadata that say what a network predicts."""

_WORDS: dict[str, PredictionType] = {
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "v-prediction": "v",
    "vpred": "v",
    "v_pred": "v",
    "sample": "x0",
    "x0": "x0",
    "flow": "flow",
    "flow_prediction": "flow",
    "rectified_flow": "flow",
}
"""What such metadata say, and what it means."""


@dataclass(frozen=True)
class Noise:
    """What a file says of what its network predicts, and of its schedule; None is: nothing."""

    prediction_type: PredictionType | None = None
    schedule: ScheduleSpec | None = None


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
        """What the file says of the noise that it was trained on; most say nothing.

        Raises ModelError for what is contradictory or not known.
        """
        path = self.header.path
        marks = self.header.shapes.keys()
        if EDM_MEAN in marks or EDM_STD in marks:
            if not {EDM_MEAN, EDM_STD} <= marks:
                raise ModelError(f"{path} has only one of {EDM_MEAN} and {EDM_STD}. Fetch it anew.")
            return Noise("edm", EdmSpec())
        if EDM_V_MAX in marks or EDM_V_MIN in marks:
            return Noise("v", self._edm_of_v())
        predicts = self._named_prediction()
        if V in marks:
            predicts = "v"
        says_zero_snr = str(self.header.metadata.get("ss_zero_terminal_snr", "")).lower() == "true"
        if ZERO_SNR in marks or says_zero_snr:
            if predicts not in ("v", "x0"):
                raise ModelError(
                    f"{path} was trained to begin without any signal (zero SNR), and predicts "
                    f"{predicts or 'noise'}, which says nothing of the picture there: it lacks the "
                    f"mark {V}. Fetch it anew, or convert it with the program that trained it."
                )
            return Noise(predicts, VariancePreservingSpec(zero_snr=True))
        return Noise(predicts, RectifiedFlowSpec() if predicts == "flow" else None)

    def _named_prediction(self) -> PredictionType | None:
        """Return what the metadata say that is predicted; ModelError for an unknown word."""
        if str(self.header.metadata.get("ss_v_parameterization", "")).lower() == "true":
            return "v"
        for key in _PREDICTS:
            word = str(self.header.metadata.get(key, "")).strip().lower()
            if word and word not in _WORDS:
                raise ModelError(
                    f"{self.header.path} says that it predicts {word!r} ({key}), which is not "
                    f"known here; known are {', '.join(_WORDS)}."
                )
            if word:
                return _WORDS[word]
        return None

    def _edm_of_v(self) -> EdmSpec:
        """Return the noise levels of a file that predicts v after EDM."""
        if EDM_V_MAX not in self.header.shapes:
            raise ModelError(f"{self.header.path} has {EDM_V_MIN} without {EDM_V_MAX}.")
        highest = float(self.tensor(EDM_V_MAX))
        lowest = EdmSpec.sigma_min
        if EDM_V_MIN in self.header.shapes:
            lowest = float(self.tensor(EDM_V_MIN))
        try:
            # Data of deviation 1 and an even ramp, as the programs that read the mark have it.
            return EdmSpec(lowest, highest, sigma_data=1.0, ramp="exponential")
        except ContractError as error:
            raise ModelError(f"{self.header.path} ({EDM_V_MAX}): {error}") from error

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a network, `name` as in `PARTS`, with what the file says itself."""
        config = read_json(self.folder / name / "config.json")
        if name == "unet" and self.folder == SDXL_CONFIGS:
            first = self.header.shape(r"diffusion_model\.(input_blocks\.0\.0|conv_in)\.weight")
            if len(first) == 4:
                config["in_channels"] = first[1]
        if name == "vae" and EDM_MEAN in self.header.shapes:
            config["latents_mean"] = self.tensor(EDM_MEAN).float().flatten().tolist()
            config["latents_std"] = self.tensor(EDM_STD).float().flatten().tolist()
            config["scaling_factor"] = _EDM_SCALE
        return config

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


@dataclass(frozen=True)
class Outline:
    """Stands for weights where only the shapes of networks are wanted, which the source has."""

    source: SingleFile | FolderFiles
    made_on = "cpu"

    def config(self, name: str) -> dict[str, Any]:
        """Return the config of a network, `name` as in `PARTS`."""
        return self.source.config(name)

    def weights(self, network: nn.Module, part: str) -> dict[str, Tensor]:
        """Return a network's weights as it was made with them."""
        return network.state_dict()


Weights = SingleFile | FolderFiles | Outline
"""Where the weights of networks come from."""


def is_whole(header: Header) -> bool:
    """Tell whether a file holds an autoencoder, and so all that a model is."""
    return header.has(VAE)


def find_single_file(header: Header) -> SingleFile:
    """Return a whole checkpoint with the folder of its configs.

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
    return SingleFile(header, beside if (beside / INDEX_FILE).is_file() else SDXL_CONFIGS)


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
    return bool(autoencoder.get("_class_name") != AutoencoderTiny.__name__)


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
