"""The mathematics of diffusion: schedules, prediction types, grids of times, steps, samplers.

Everything rests on x_t = alpha_t x0 + sigma_t eps (eq 1 of arXiv 2402.13929): t = 0 is clean, the
top time of the schedule is pure noise. Teacher, student and sampler all follow the same flow, at
many or few times. This room knows tensors only: no networks, no text, no files.
"""

from twostep.diffusion.flow import Denoise, initial_noise, sample, solve, step
from twostep.diffusion.grid import GridError, falling_times, landing, trailing_times, trained_times
from twostep.diffusion.prediction import Prediction, PredictionType, guide, prediction_from_output
from twostep.diffusion.samplers import find_sampler, seeded_noise
from twostep.diffusion.schedule import (
    Edm,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    make_schedule,
    noise_levels,
)

__all__ = [
    "Denoise",
    "Edm",
    "GridError",
    "Prediction",
    "PredictionType",
    "RectifiedFlow",
    "Schedule",
    "VariancePreserving",
    "falling_times",
    "find_sampler",
    "guide",
    "initial_noise",
    "landing",
    "make_schedule",
    "noise_levels",
    "prediction_from_output",
    "sample",
    "seeded_noise",
    "solve",
    "step",
    "trailing_times",
    "trained_times",
]
