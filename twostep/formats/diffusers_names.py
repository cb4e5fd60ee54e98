"""The words of diffusers' scheduler configs for what a network predicts."""

from twostep.contract import PredictionType

PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}
"""Our prediction types by diffusers' `prediction_type`."""

DIFFUSERS_NAMES: dict[PredictionType, str] = {kind: name for name, kind in PREDICTION_TYPES.items()}
"""diffusers' `prediction_type` by ours."""
