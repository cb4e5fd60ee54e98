"""Finding the device that a recipe names."""

import torch

from twostep.training.recipe import RecipeError


def find_device(name: str) -> torch.device:
    """Return the device of a name; RecipeError if this machine does not have it.

    Args:
        name: what torch calls the device, as in "cpu" or "cuda:1"; "auto" is the accelerator if
            there is one, or else the CPU.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f'device "{name}" is not to be had ({reason}). Use "cpu", or "auto".'
        ) from error
    return torch.device(name)
