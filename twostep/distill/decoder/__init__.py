"""Distillation of a decoder: a tiny network learns what a model's autoencoder makes of latents.

It runs on the trainer and the loop of every other distillation; what differs is the pair, which is
two pictures of the same latents, and that no time and no noise level come into it.
"""

from twostep.distill.decoder.recipe import DecoderRecipe
from twostep.distill.decoder.run import distil_decoder

__all__ = ["DecoderRecipe", "distil_decoder"]
