"""ByteDance's SDXL-Lightning files, which say nothing of themselves: known by name, and checked by what they hold.

`sdxl_lightning_4step.safetensors` is a whole checkpoint, `.._unet` the UNet alone, `.._lora` a LoRA for any SDXL base;
of 8, 4, 2 steps there is each. The 1-step files end with `_x0`, for they predict x0, and there is no such LoRA.
"""

import re
from pathlib import Path

from safetensors import safe_open

from twostep.contract import Contract, ContractError
from twostep.diffusion import trained_times
from twostep.models.ldm import UNET
from twostep.models.sizes import sizes_around

HUB_ID, ALIAS, BASE = "ByteDance/SDXL-Lightning", "sdxl-lightning", "stable-diffusion-xl-base-1.0"
STEPS = (8, 4, 2, 1)

_FILE = re.compile(r"sdxl_lightning_(\d+)step(|_unet|_lora)(|_x0)\.safetensors")
_KINDS = {"": "a whole checkpoint", "_unet": "a UNet alone", "_lora": "a LoRA"}


def official_file(model: str | Path, steps: int | None = None) -> str | None:
    """Return the name of the official file that is meant, by itself or as the UNet of so many steps (2 if not said)."""
    name = str(model).removeprefix(f"{HUB_ID}/").removesuffix(".safetensors") + ".safetensors"
    if str(model) in (HUB_ID, ALIAS):
        if steps not in (None, *STEPS):
            raise ContractError(f"{model} has students for {', '.join(map(str, STEPS))} steps; asked for {steps}.")
        return f"sdxl_lightning_{steps or 2}step_unet{'_x0' if steps == 1 else ''}.safetensors"
    return name if _FILE.fullmatch(name) else None


def official_contract(path: Path) -> Contract | None:
    """Return what is known of a file by its name, None if it is not official; ContractError if it holds another thing.

    A path where there is no file stands for its name alone.
    """
    found = _FILE.fullmatch(path.name)
    if found is None:
        return None
    steps, kind, is_x0 = int(found[1]), found[2], found[3] == "_x0"
    if steps not in STEPS or is_x0 != (steps == 1) or (kind, steps) == ("_lora", 1):
        raise ContractError(f"There is no official {path.name}: 8, 4 and 2 steps predict eps, 1 step x0 (no LoRA).")
    rank = alpha = None
    if path.is_file():
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            downs = [key for key in keys if "lora_down" in key or "lora_A" in key or "lora.down" in key]
            alphas = [key for key in keys if key.endswith(".alpha")]
            rank = file.get_slice(downs[0]).get_shape()[0] if downs else None
            alpha = file.get_tensor(alphas[0]).item() if alphas else rank
        holds = "_lora" if downs else "" if any(key.startswith(UNET) for key in keys) else "_unet"
        if holds != kind:
            raise ContractError(f"{path} is {_KINDS[holds]}; by its name it would be {_KINDS[kind]}. Fetch it again.")
    return Contract(
        name=path.stem,
        role="student",
        steps=steps,
        trained_times=trained_times(steps),
        prediction_type="x0" if is_x0 else "eps",
        spacing="trailing",
        guidance=1.0,
        sizes=sizes_around(1024, 64),
        base=BASE,
        lora_rank=rank,
        lora_alpha=None if alpha is None else float(alpha),
        recipe="ByteDance",
        version="",
    )
