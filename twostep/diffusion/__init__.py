"""The mathematics of the diffusion flow: schedule, prediction types, grids of times, steps.

Everything rests on x_t = alpha_t x0 + sigma_t eps (eq 1 of arXiv 2402.13929) with integer times t
in 0..T: t = 0 is clean, t = T is pure noise. Teacher, student and sampler are the same `solve` with
many or few times. This room knows tensors only: no networks, no text, no files.
"""

from twostep.diffusion.flow import Denoise, initial_noise, sample, solve, step
from twostep.diffusion.grid import GridError, falling_times, landing, trailing_times, trained_times
from twostep.diffusion.prediction import Prediction, PredictionType, guide, prediction_from_output
from twostep.diffusion.schedule import VariancePreserving

__all__ = [
    "Denoise",
    "GridError",
    "Prediction",
    "PredictionType",
    "VariancePreserving",
    "falling_times",
    "guide",
    "initial_noise",
    "landing",
    "prediction_from_output",
    "sample",
    "solve",
    "step",
    "trailing_times",
    "trained_times",
]
