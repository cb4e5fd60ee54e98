"""Folders of Stable Audio as diffusers saves them, and the sampling contract of such a folder."""

import math
from pathlib import Path
from typing import Any

from twostep.contract import Contract, ContractError, EdmSpec, PredictionType
from twostep.formats.locate import INDEX_FILE, ModelError, read_json

FAMILY = "stable-audio"
"""The name of the family in contracts."""

PIPELINE = "StableAudioPipeline"

PARTS = {
    "transformer": "StableAudioDiTModel",
    "vae": "AutoencoderOobleck",
    "text_encoder": "T5EncoderModel",
    "projection_model": "StableAudioProjectionModel",
}
"""The classes of the networks by their folders."""

SCHEDULER = "CosineDPMSolverMultistepScheduler"
"""The one scheduler whose times are those that the network knows."""

SCHEDULER_CONFIG = "scheduler_config.json"

_STEPS = 100
_GUIDANCE = 7.0
"""What `StableAudioPipeline` takes where a call does not say it."""

_PREDICTION_TYPES: dict[str, PredictionType] = {"v_prediction": "v", "epsilon": "edm"}
"""What the scheduler's words mean; its "epsilon" is EDM's F, and no noise."""

_SCHEDULER_DEFAULTS: dict[str, Any] = {
    "sigma_min": 0.3,
    "sigma_max": 500,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "rho": 7.0,
    "prediction_type": "v_prediction",
}
_TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "sample_size": 1024,
    "in_channels": 64,
    "out_channels": 64,
    "cross_attention_input_dim": 768,
    "global_states_input_dim": 1536,
}
_VAE_DEFAULTS: dict[str, Any] = {
    "downsampling_ratios": (2, 4, 4, 8, 8),
    "decoder_input_channels": 64,
    "sampling_rate": 44_100,
}
"""What diffusers takes for what its configs leave out; a test compares them."""


def is_stable_audio(folder: Path) -> bool:
    """Tell whether a folder is one of Stable Audio's, by diffusers' index."""
    path = folder / INDEX_FILE
    return path.is_file() and read_json(path).get("_class_name") == PIPELINE


def stable_audio_contract(folder: Path) -> Contract:
    """Return a teacher's contract, of which configs say the noise and the length alone.

    Raises ModelError where a part is missing, of another class, or does not fit another one.
    """
    check_parts(folder)
    transformer, vae = _configs(folder)
    prediction_type, schedule = _noise(folder)
    hop = math.prod(int(ratio) for ratio in vae["downsampling_ratios"])
    name = folder.resolve().name
    return Contract(
        name=name,
        role="teacher",
        steps=_STEPS,
        trained_times=(),
        prediction_type=prediction_type,
        spacing="trailing",
        guidance=_GUIDANCE,
        sizes=((int(transformer["sample_size"]) * hop, 1),),
        base=name,
        lora_rank=None,
        lora_alpha=None,
        recipe="",
        version="",
        family=FAMILY,
        media="audio",
        schedule=schedule,
    )


def check_parts(folder: Path) -> None:
    """Refuse a folder that lacks a part, or whose parts do not fit each other: ModelError."""
    index = read_json(folder / INDEX_FILE)
    for part, expected in PARTS.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != expected:
            raise ModelError(
                f"{folder} has {found or 'nothing'} as its {part}; expected {expected}. Stable "
                f"Audio's folders have {', '.join(PARTS)}, a tokenizer and a scheduler."
            )
    transformer, vae = _configs(folder)
    text = read_json(folder / "text_encoder" / "config.json")
    projection = read_json(folder / "projection_model" / "config.json")
    width = projection["conditioning_dim"]
    latents = (vae["decoder_input_channels"], "components of latents")
    fits = [
        ("the transformer's in_channels", transformer["in_channels"], *latents),
        ("the transformer's out_channels", transformer["out_channels"], *latents),
        (
            "the transformer's cross_attention_input_dim",
            transformer["cross_attention_input_dim"],
            width,
            "numbers of a token",
        ),
        (
            "the transformer's global_states_input_dim",
            transformer["global_states_input_dim"],
            2 * width,
            "numbers of two seconds",
        ),
        (
            "the projection's text_encoder_dim",
            projection["text_encoder_dim"],
            text.get("d_model", 512),
            "numbers of T5",
        ),
    ]
    for what, taken, given, of_what in fits:
        if taken != given:
            raise ModelError(
                f"{folder}: {what} is {taken}, and there are {given} {of_what}. Its parts are of "
                "different models: fetch all of one."
            )


def _configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configs of transformer and autoencoder, with what they leave out."""
    transformer = _TRANSFORMER_DEFAULTS | read_json(folder / "transformer" / "config.json")
    return transformer, _VAE_DEFAULTS | read_json(folder / "vae" / "config.json")


def _noise(folder: Path) -> tuple[PredictionType, EdmSpec]:
    """Return what the network predicts, and its noise; ModelError for another scheduler."""
    path = folder / "scheduler" / SCHEDULER_CONFIG
    config = read_json(path)
    name = config.get("_class_name")
    if name != SCHEDULER:
        raise ModelError(
            f"{folder} has the scheduler {name}; expected {SCHEDULER}: the network was trained on "
            "its times, and those of others mean another noise. Put the model's own there."
        )
    values = _SCHEDULER_DEFAULTS | config
    expected = {
        "prediction_type": tuple(_PREDICTION_TYPES),
        "sigma_schedule": ("exponential", "karras"),
        "sigma_data": (1,),
    }
    for key, known in expected.items():
        if values[key] not in known:
            raise ModelError(
                f"{path} has {key} = {values[key]!r}; expected {' or '.join(map(str, known))}. "
                "Fetch that model again."
            )
    try:
        schedule = EdmSpec(
            sigma_min=float(values["sigma_min"]),
            sigma_max=float(values["sigma_max"]),
            sigma_data=1.0,
            ramp=values["sigma_schedule"],
            rho=float(values["rho"]),
        )
    except (TypeError, ValueError, ContractError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch that model again.") from error
    return _PREDICTION_TYPES[values["prediction_type"]], schedule


def scheduler_config(contract: Contract) -> dict[str, Any]:
    """Return the config of the scheduler of a contract's noise.

    Raises ModelError for noise or predictions that it has no words for.
    """
    schedule = contract.schedule
    words = {ours: theirs for theirs, ours in _PREDICTION_TYPES.items()}
    if not isinstance(schedule, EdmSpec) or schedule.sigma_data != 1:
        raise ModelError(
            f"{contract.name} has the noise {schedule}; models of {FAMILY} have EDM's for data of "
            "deviation 1."
        )
    # A student of one step predicts x0, which diffusers has no word for there; its contract says
    # it.
    return {
        "_class_name": SCHEDULER,
        "sigma_min": schedule.sigma_min,
        "sigma_max": schedule.sigma_max,
        "sigma_data": schedule.sigma_data,
        "sigma_schedule": schedule.ramp,
        "rho": schedule.rho,
        "prediction_type": words.get(contract.prediction_type, "v_prediction"),
    }


def index_of(tokenizer: str) -> dict[str, Any]:
    """Return the index of a folder by which diffusers finds its parts.

    Arguments:
        tokenizer: the name of the class of its tokenizer.
    """
    libraries = {"text_encoder": "transformers", "projection_model": "stable_audio"}
    parts = {part: [libraries.get(part, "diffusers"), name] for part, name in PARTS.items()}
    return {
        "_class_name": PIPELINE,
        **parts,
        "tokenizer": ["transformers", tokenizer],
        "scheduler": ["diffusers", SCHEDULER],
    }
