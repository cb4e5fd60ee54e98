"""The official SDXL-Lightning files of ByteDance, which are known by their names.

`sdxl_lightning_4step.safetensors` is a whole checkpoint, `.._unet` the UNet alone, and `.._lora` a
LoRA for any SDXL base. The same three exist for 8 and 2 steps. The names of the 1-step files end
with `_x0`, because they predict x0; there is no 1-step LoRA.
"""

import re
from pathlib import Path

from twostep.contract import TOP_TIME, ContractError

LIGHTNING = ("ByteDance/SDXL-Lightning", "sdxl-lightning")
"""ByteDance's repository on the hub, and its short name here."""

UNETS = {
    8: "sdxl_lightning_8step_unet.safetensors",
    4: "sdxl_lightning_4step_unet.safetensors",
    2: "sdxl_lightning_2step_unet.safetensors",
    1: "sdxl_lightning_1step_unet_x0.safetensors",
}
"""The file that holds the UNet of each number of steps."""

TRAINED_TIMES = {
    steps: tuple(TOP_TIME - place * TOP_TIME // max(steps, 4) for place in range(max(steps, 4)))
    for steps in UNETS
}
"""The times that each was trained at, falling, as `diffusion.trained_times` has them."""

DEFAULT_STEPS = 2
"""The UNet that the bare name of the repository stands for."""

NAMED = re.compile(r"sdxl_lightning_(\d+)step(|_unet|_lora)(|_x0)\.safetensors")
"""Official names: the number of steps, the kind of file, and whether it predicts x0."""


def official_file(model: str | Path, steps: int | None = None) -> str | None:
    """Return the name of the official file that `model` stands for.

    Arguments:
        model: the repository (by its hub id or short name), or an official file name, with or
            without the repository before it and the suffix behind it.
        steps: which UNet of the repository is meant; 2 if not given.

    Returns None for everything that is not official.
    Raises ContractError if the repository has no UNet of that many steps.
    """
    if str(model) in LIGHTNING:
        if steps is not None and steps not in UNETS:
            known = ", ".join(map(str, UNETS))
            raise ContractError(f"{model} has students for {known} steps; asked for {steps}.")
        return UNETS[steps or DEFAULT_STEPS]
    stem = str(model).removeprefix(f"{LIGHTNING[0]}/").removesuffix(".safetensors")
    name = f"{stem}.safetensors"
    return name if NAMED.fullmatch(name) else None
