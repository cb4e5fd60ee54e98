"""Distillation: a chain of stages, in which every finished student can teach the next.

`distil` runs a recipe. A stage is trained by a method (`method.Method`, one file each under
`methods/`), and one trainer runs them all. Data comes as a source of latents and conditioning;
models are denoisers, of whatever backbone. Pictures are drawn only to be looked at.
"""

from twostep.distill.chain import distil
from twostep.distill.recipe import DistillRecipe

__all__ = ["DistillRecipe", "distil"]
