"""What the header of a single file says: which parts it has, where their configs lie, and on what
noise it was trained. Nothing here needs torch.

A single file has no configs. They come from a model folder of the same name beside it, or else they
are SDXL's own, which lie in this package. What a file says of the noise that it was trained on, it
says by a few odd tensors and by its metadata.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostep.contract import (
    ContractError,
    EdmSpec,
    PredictionType,
    RectifiedFlowSpec,
    ScheduleSpec,
    VariancePreservingSpec,
)
from twostep.formats.header import Header
from twostep.formats.identify import kind_of
from twostep.formats.locate import INDEX_FILE, SDXL_CONFIGS, ModelError, read_json

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."
"""What a single file puts before the names of each of its parts."""

EDM_MEAN = "edm_mean"
EDM_STD = "edm_std"
EDM_V_MAX = "edm_vpred.sigma_max"
EDM_V_MIN = "edm_vpred.sigma_min"
V = "v_pred"
ZERO_SNR = "ztsnr"
"""Tensors beside the networks' by which a file says what noise it was trained on: Playground 2.5
has mean and deviation of its latents, CosXL the ends of its noise levels; the last two are marks.
"""

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


def is_whole(header: Header) -> bool:
    """Tell whether a file holds an autoencoder, and so all that a model is."""
    return header.has(VAE)


def config_folder(header: Header) -> Path:
    """Return the folder with the configs of a whole checkpoint.

    Raises ModelError for any other file, with what it is.
    """
    lacking = [part for part in (UNET, VAE, CLIP_L, CLIP_G) if not header.has(part)]
    if lacking:
        first_key = next(iter(header.shapes), "nothing")
        raise ModelError(
            f"{header.path} is {kind_of(header)}: it has no {lacking[0]}*, and begins with "
            f"{first_key}. Expected a whole SDXL checkpoint, or a UNet that carries its contract."
        )
    beside = header.path.with_suffix("")
    return beside if (beside / INDEX_FILE).is_file() else SDXL_CONFIGS


def config_of(header: Header, folder: Path, name: str) -> dict[str, Any]:
    """Return the config of a network as it lies in a folder, with what the file's shapes say."""
    config = read_json(folder / name / "config.json")
    if name == "unet" and folder == SDXL_CONFIGS:
        first = header.shape(r"diffusion_model\.(input_blocks\.0\.0|conv_in)\.weight")
        if len(first) == 4:
            config["in_channels"] = first[1]
    return config


def noise_of(header: Header) -> Noise:
    """What the file says of the noise that it was trained on; most say nothing.

    Raises ModelError for what is contradictory or not known.
    """
    path = header.path
    marks = header.shapes.keys()
    if EDM_MEAN in marks or EDM_STD in marks:
        if not {EDM_MEAN, EDM_STD} <= marks:
            raise ModelError(f"{path} has only one of {EDM_MEAN} and {EDM_STD}. Fetch it anew.")
        return Noise("edm", EdmSpec())
    if EDM_V_MAX in marks or EDM_V_MIN in marks:
        return Noise("v", _edm_of_v(header))
    predicts = _named_prediction(header)
    if V in marks:
        predicts = "v"
    says_zero_snr = str(header.metadata.get("ss_zero_terminal_snr", "")).lower() == "true"
    if ZERO_SNR in marks or says_zero_snr:
        if predicts not in ("v", "x0"):
            raise ModelError(
                f"{path} was trained to begin without any signal (zero SNR), and predicts "
                f"{predicts or 'noise'}, which says nothing of the picture there: it lacks the "
                f"mark {V}. Fetch it anew, or convert it with the program that trained it."
            )
        return Noise(predicts, VariancePreservingSpec(zero_snr=True))
    return Noise(predicts, RectifiedFlowSpec() if predicts == "flow" else None)


def _named_prediction(header: Header) -> PredictionType | None:
    """Return what the metadata say that is predicted; ModelError for an unknown word."""
    if str(header.metadata.get("ss_v_parameterization", "")).lower() == "true":
        return "v"
    for key in _PREDICTS:
        word = str(header.metadata.get(key, "")).strip().lower()
        if word and word not in _WORDS:
            raise ModelError(
                f"{header.path} says that it predicts {word!r} ({key}), which is not "
                f"known here; known are {', '.join(_WORDS)}."
            )
        if word:
            return _WORDS[word]
    return None


def _edm_of_v(header: Header) -> EdmSpec:
    """Return the noise levels of a file that predicts v after EDM."""
    if EDM_V_MAX not in header.shapes:
        raise ModelError(f"{header.path} has {EDM_V_MIN} without {EDM_V_MAX}.")
    highest = header.levels.get(EDM_V_MAX)
    lowest: float | None = EdmSpec.sigma_min
    if EDM_V_MIN in header.shapes:
        lowest = header.levels.get(EDM_V_MIN)
    if highest is None or lowest is None:
        raise ModelError(f"{header.path}: {EDM_V_MAX} or {EDM_V_MIN} is no single number.")
    try:
        # Data of deviation 1 and an even ramp, as the programs that read the mark have it.
        return EdmSpec(lowest, highest, sigma_data=1.0, ramp="exponential")
    except ContractError as error:
        raise ModelError(f"{header.path} ({EDM_V_MAX}): {error}") from error
