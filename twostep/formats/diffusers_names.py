"""The words of diffusers' scheduler configs for what a network predicts."""

from twostep.contract import PredictionType

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
}
"""diffusers' `prediction_type` by ours."""
