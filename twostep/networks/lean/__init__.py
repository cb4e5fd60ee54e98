"""SDXL's networks in PyTorch alone, for drawing.

diffusers and transformers take several times as long to import as PyTorch, and everything that they
can do beside these networks is what takes the time. The classes here compute the same numbers from
the same names of weights, and nothing else: who trains, or writes models, uses those of the two
libraries. A config that asks for anything unusual has no network here.
"""

from twostep.networks.lean.autoencoders import KlAutoencoder, TinyAutoencoder
from twostep.networks.lean.building import lean_network
from twostep.networks.lean.clip import LeanClip
from twostep.networks.lean.config import Config
from twostep.networks.lean.unet import Inserted, LeanUnet

__all__ = [
    "Config",
    "Inserted",
    "KlAutoencoder",
    "LeanClip",
    "LeanUnet",
    "TinyAutoencoder",
    "lean_network",
]
