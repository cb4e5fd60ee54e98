"""The shapes that all rooms speak of, as types: checked in tests, free in production."""

from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, "*shape"]
"""Anything, of one shape with what else is so called."""

Coefficients = Float[Tensor, "*#shape"]
"""What broadcasts against values."""

Batch = Float[Tensor, "batch *shape"]
"""Items of any kind."""

Latents = Float[Tensor, "batch c h w"]
"""Latents of pictures."""

Times = Int[Tensor, " batch"]
"""One integer time per item, in 0..T."""
