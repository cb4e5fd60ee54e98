"""Finding the device that a recipe names, and knowing what it computes well."""

from functools import cache

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


def drawing_dtype(device: torch.device) -> torch.dtype:
    """Return the precision in which networks that are not trained compute on a device."""
    return torch.float32 if device.type == "cpu" else torch.float16


def has_own_memory(device: torch.device) -> bool:
    """Return whether a device has other memory than the main memory; a CPU or Apple's has not."""
    return device.type not in ("cpu", "mps")


@cache
def computes_bfloat16(device_type: str) -> bool:
    """Return whether a type of device, as in "cpu" or "cuda", computes bfloat16 in hardware.

    Every accelerator that torch knows does. A CPU without AVX-512 or its like emulates it, some
    forty times slower than float32.
    """
    if device_type != "cpu":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
