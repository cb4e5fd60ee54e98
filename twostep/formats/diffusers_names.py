"""The words of diffusers' scheduler configs: what a network predicts, and how much noise each time
holds.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from twostep.contract import (
    TOP_TIME,
    ContractError,
    EdmSpec,
    PredictionType,
    RectifiedFlowSpec,
    ScheduleSpec,
    VariancePreservingSpec,
)
from twostep.formats.locate import ModelError

PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}
"""Our prediction types by diffusers' `prediction_type`, as SDXL's scheduler configs have it."""

DIFFUSERS_NAMES: dict[PredictionType, str] = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
    "edm": "epsilon",
}
"""diffusers' `prediction_type` by ours."""

_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
"""Our names of formulas for betas by diffusers' `beta_schedule`."""

_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
_VARIANCE_PRESERVING = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""The schedulers of diffusers by the law of noise that they follow; how they step is our affair."""

_USUAL_DEFAULTS: dict[str, Any] = {
    "prediction_type": "epsilon",
    "num_train_timesteps": TOP_TIME,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
"""What most schedulers of diffusers take where a config says nothing."""

_EDM_DEFAULTS: dict[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
}
_BETA_DEFAULTS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "EDMEulerScheduler": _EDM_DEFAULTS,
    "EDMDPMSolverMultistepScheduler": _EDM_DEFAULTS,
    "DPMSolverSDEScheduler": _BETA_DEFAULTS,
    "HeunDiscreteScheduler": _BETA_DEFAULTS,
    "KDPM2AncestralDiscreteScheduler": _BETA_DEFAULTS,
    "KDPM2DiscreteScheduler": _BETA_DEFAULTS,
    "LCMScheduler": {**_BETA_DEFAULTS, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_BETA_DEFAULTS, "beta_schedule": "scaled_linear"},
    "UNet2DConditionModel": {
        "block_out_channels": (320, 640, 1280, 1280),
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": None,
        "addition_embed_type": None,
    },
    "AutoencoderTiny": {"encoder_block_out_channels": (64, 64, 64, 64)},
    "AutoencoderKL": {"block_out_channels": (64,)},
}
"""What some classes of diffusers take instead, or beside."""


def noise_of_scheduler(
    config: dict[str, Any], where: str | Path
) -> tuple[PredictionType, ScheduleSpec]:
    """Return what a network predicts, and its schedule, by the config of its scheduler.

    What a config leaves out is what that scheduler of diffusers takes by default.

    Arguments:
        config: of scheduler_config.json.
        where: its folder, for errors.

    Raises ModelError for a law of noise that is not known, by its name.
    """
    name = str(config.get("_class_name", "EulerDiscreteScheduler"))
    name = name.replace("Flax", "")
    try:
        return _noise_of(name, config, where)
    except (TypeError, ValueError) as error:
        # A number that is none, say; the laws themselves refuse those out of range.
        raise ModelError(
            f"{where} has a damaged config of its scheduler ({error}). Fetch that model again."
        ) from error


def _noise_of(
    name: str, config: dict[str, Any], where: str | Path
) -> tuple[PredictionType, ScheduleSpec]:
    """Return what a network predicts, and its schedule, by its scheduler's name and config."""
    if name not in (*_EDM, *_FLOW, *_VARIANCE_PRESERVING):
        raise ModelError(
            f"{where} has the scheduler {name}, whose law of noise is not known here. Known are "
            "those of DDPM, EDM and flow matching: put the scheduler there that it was trained for."
        )
    values = {**library_defaults(name), **config}
    predicts = values.get("prediction_type", "epsilon")
    if name in _FLOW or values.get("use_flow_sigmas"):
        return "flow", _flow(values, where)
    if predicts not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        raise ModelError(f"{where} predicts {predicts!r}; known are {known}.")
    prediction_type = PREDICTION_TYPES[predicts]
    try:
        if name in _EDM:
            # Its "epsilon" is EDM's F, and no noise.
            return "edm" if prediction_type == "eps" else prediction_type, _edm(values)
        spec = _variance_preserving(values, where)
    except ContractError as error:
        raise ModelError(f"{where}: {error}") from error
    if spec.zero_snr and prediction_type == "eps":
        raise ModelError(
            f"{where} predicts noise and leaves no signal at the top (rescale_betas_zero_snr), "
            "where noise says nothing of the picture. Correct its prediction_type."
        )
    return prediction_type, spec


def library_defaults(name: str) -> dict[str, Any]:
    """Return what a class of diffusers takes for those arguments that are read here.

    They are written down, for asking diffusers itself takes seconds; a test compares them.
    """
    return _USUAL_DEFAULTS | _DEFAULTS.get(name, {})


def _flow(values: dict[str, Any], where: str | Path) -> RectifiedFlowSpec:
    for setting in ("use_dynamic_shifting", "invert_sigmas"):
        if values.get(setting):
            raise ModelError(f"{where} is a flow with {setting}, which is not known here.")
    shift = values.get("flow_shift") if values.get("use_flow_sigmas") else values.get("shift")
    return RectifiedFlowSpec(shift=float(shift or 1.0))


def _edm(values: dict[str, Any]) -> EdmSpec:
    return EdmSpec(
        sigma_min=float(values["sigma_min"]),
        sigma_max=float(values["sigma_max"]),
        sigma_data=float(values["sigma_data"]),
        ramp=values["sigma_schedule"],
        rho=float(values["rho"]),
    )


def _variance_preserving(values: dict[str, Any], where: str | Path) -> VariancePreservingSpec:
    num_times = values.get("num_train_timesteps", TOP_TIME)
    betas = values.get("beta_schedule", "linear")
    trained = values.get("trained_betas")
    if num_times != TOP_TIME or (betas not in _BETAS and trained is None):
        raise ModelError(
            f"{where} has the schedule {betas!r} over {num_times} times; known are "
            f"{', '.join(_BETAS)} and trained betas, over {TOP_TIME} times."
        )
    spec = VariancePreservingSpec(
        betas=_BETAS.get(betas, "scaled_linear"),  # type: ignore[arg-type]
        beta_start=float(values.get("beta_start", 0.0001)),
        beta_end=float(values.get("beta_end", 0.02)),
        num_times=num_times,
        zero_snr=bool(values.get("rescale_betas_zero_snr")),
        trained=() if trained is None else tuple(float(beta) for beta in trained),
    )
    return _without_needless_list(spec)


def _without_needless_list(spec: VariancePreservingSpec) -> VariancePreservingSpec:
    """Return a schedule without its list of betas where that is SDXL's own, which many configs say
    one by one.
    """
    sdxl = VariancePreservingSpec(zero_snr=spec.zero_snr)
    if not spec.trained:
        return spec
    # Imported here, for it loads torch, which locating a file does not need.
    import torch

    from twostep.diffusion import make_schedule
    from twostep.diffusion.schedule import VariancePreserving

    given, known = make_schedule(**asdict(spec)), make_schedule(**asdict(sdxl))
    assert isinstance(given, VariancePreserving) and isinstance(known, VariancePreserving)
    return sdxl if torch.allclose(given.alphas, known.alphas, rtol=1e-6, atol=0) else spec


def scheduler_settings(spec: ScheduleSpec) -> tuple[str, dict[str, Any]]:
    """Return the scheduler of diffusers for Euler's steps along a schedule, and its settings."""
    if isinstance(spec, RectifiedFlowSpec):
        return "FlowMatchEulerDiscreteScheduler", {"shift": spec.shift}
    if isinstance(spec, EdmSpec):
        values = asdict(spec)
        del values["kind"]
        values["sigma_schedule"] = values.pop("ramp")
        return "EDMEulerScheduler", values
    names = {ours: theirs for theirs, ours in _BETAS.items()}
    return "EulerDiscreteScheduler", {
        "num_train_timesteps": spec.num_times,
        "beta_schedule": names[spec.betas],
        "beta_start": spec.beta_start,
        "beta_end": spec.beta_end,
        "trained_betas": list(spec.trained) or None,
        "rescale_betas_zero_snr": spec.zero_snr,
        "timestep_spacing": "trailing",
    }
