"""Distillation: progressive, adversarial (arXiv 2402.13929). Stages hand their student on as the
next teacher.

A method is two functions: how a pair of transitions is drawn, and how it is judged; the trainer
never changes. Data comes as a source of (latents, captions); what is known of models is denoisers.
Pictures are drawn only to be seen.
"""

from twostep.distill.chain import distil
from twostep.distill.recipe import DistillRecipe, Phase

__all__ = ["DistillRecipe", "Phase", "distil"]
