"""Evaluation: what pictures show, by a judge that has seen real drawings only, and how sets of pictures differ.

Takes images, never a pipeline: whatever drew them, they are measured by the same few functions.
"""

from twostep.evaluate.frechet import FeatureStatistics, FrechetError, fit_features, frechet_distance
from twostep.evaluate.judge import Judge, JudgeError, Verdict, load_judge
from twostep.evaluate.prompts import attributes_from_prompt
from twostep.evaluate.report import EvaluationError, Report, Score, evaluate

__all__ = [
    "EvaluationError",
    "FeatureStatistics",
    "FrechetError",
    "Judge",
    "JudgeError",
    "Report",
    "Score",
    "Verdict",
    "attributes_from_prompt",
    "evaluate",
    "fit_features",
    "frechet_distance",
    "load_judge",
]
