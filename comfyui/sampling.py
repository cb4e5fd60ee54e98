"""From a file to how it is sampled in ComfyUI's terms: what kind of file, which times, which
prediction.

ComfyUI counts noise as sigma / alpha of the variance-preserving schedule, the sigma of k-diffusion.
A student's times are those of the trailing grid, so its sigmas are (sigma / alpha)(t) at T, .., T /
N, and 0 at the end. Nothing here imports ComfyUI.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float32
from safetensors import safe_open
from torch import Tensor

from twostep.contract import Contract, ContractError
from twostep.diffusion import VariancePreserving, trailing_times
from twostep.errors import TwostepError
from twostep.formats.locate import ModelError
from twostep.formats.single_file import NAMES, SingleFile, is_whole
from twostep.models.contracts import SDXL, carried_contract, file_contract
from twostep.models.lora_stack import LoraFile

Kind = Literal["checkpoint", "unet", "lora"]

FOLDERS = ("checkpoints", "diffusion_models", "loras")
"""ComfyUI's model folders that are looked into; what a file there is, its tensors tell."""

PREDICTIONS = {"eps": "EPS", "x0": "X0", "v": "V_PREDICTION"}
"""The classes of `comfy.model_sampling` by our prediction types."""

KIND_WORDS: dict[Kind, str] = {
    "checkpoint": "a whole checkpoint",
    "unet": "a UNet alone",
    "lora": "a LoRA",
}
SAMPLINGS = {"eps": "eps", "x0": "x0", "v": "v_prediction"}
"""The choices of ComfyUI's node ModelSamplingDiscrete by our prediction types."""

KOHYA = ("lora_unet_", "lora_te")
"""How keys of LoRAs begin that ComfyUI reads in full; of PEFT's names it silently leaves most out.
"""


def kind_of(path: Path) -> Kind:
    """Tell by its tensors whether a file is a whole checkpoint, a UNet alone, or a LoRA."""
    if any("lora" in key for key in keys_of(path)):
        return "lora"
    return "checkpoint" if is_whole(path) else "unet"


def keys_of(path: Path) -> list[str]:
    """List a file's tensors without reading them; ModelError for what is no safetensors."""
    carried_contract(path)  # says what is wrong with a file that is none
    with safe_open(path, "pt") as file:
        return list(file.keys())


def read_contract(path: Path, base: Path | None = None) -> Contract:
    """Return how a file is sampled, a LoRA on the checkpoint `base`.

    A whole checkpoint that says nothing of itself is a teacher, and what it predicts is read from
    it. ContractError for a LoRA that does not belong on that base; ModelError for a UNet or a LoRA
    that carries no contract.
    """
    kind = kind_of(path)
    if not carried_contract(path):
        if kind == "checkpoint":
            return teacher_contract(path)
        raise ModelError(
            f"{path.name} carries no sampling contract, and its name is none of the official ones: how a "
            f"{kind} alone is sampled cannot be seen from its weights. Load it with ComfyUI's own nodes, or write it "
            "anew with `twostep export`."
        )
    if kind != "lora":
        return file_contract(path)
    if base is None:
        raise ContractError(
            f"{path.name} is a LoRA: choose the checkpoint that it goes on as the base."
        )
    if foreign := next((key for key in keys_of(path) if not key.startswith(KOHYA)), None):
        raise ModelError(
            f"{path.name} has names that ComfyUI reads only in part (as {foreign}). Write it for ComfyUI first: "
            f"twostep export {path.name} --to lora-kohya --out for-comfyui.safetensors"
        )
    if kind_of(base) != "checkpoint":
        raise ContractError(
            f"{base.name} is {KIND_WORDS[kind_of(base)]}; a base is a whole checkpoint."
        )
    told = file_contract(base) if carried_contract(base) else teacher_contract(base)
    return LoraFile(path, 1.0, file_contract(path)).together(told)


def teacher_contract(path: Path) -> Contract:
    """Say of a whole SDXL checkpoint what it tells of itself; ModelError for any other file.

    Its configs are not needed: ComfyUI knows those of SDXL.
    """
    keys = keys_of(path)
    if lacking := [part for part in NAMES if not any(key.startswith(part) for key in keys)]:
        raise ModelError(
            f"{path.name} is no whole SDXL checkpoint: it has no {lacking[0]}*. Nothing else is loaded here."
        )
    kind = SingleFile(path, path.parent).prediction_type or "eps"
    return replace(
        SDXL, name=path.stem, prediction_type=kind, sizes=((1024, 1024),), base=path.stem
    )


def sigmas(contract: Contract) -> Float32[Tensor, " steps_plus_one"]:
    """Return sigma / alpha at the contract's trailing times, falling, and 0 at the end: what
    SamplerCustom follows.
    """
    schedule = VariancePreserving.scaled_linear()
    times = torch.tensor([*trailing_times(contract.steps, schedule), 0])
    return (schedule.sigmas[times] / schedule.alphas[times]).float()


def student_beside(path: Path, steps: int) -> Path:
    """Return the file of the same kind, base and recipe in the same folder that draws in so many
    steps.

    ContractError lists the steps there are, or the files where there are several.
    """
    if not carried_contract(path):
        raise ContractError(
            f"{path.name} carries no sampling contract; choose one of the students as the family."
        )
    family = _family(path)
    found: dict[int, list[Path]] = {}
    broken = []
    for file in sorted(path.parent.glob("*.safetensors")):
        try:
            if carried_contract(file) and _family(file) == family:
                found.setdefault(file_contract(file).steps, []).append(file)
        # a damaged neighbour matters only if it may be the one that is looked for
        except TwostepError as error:
            broken.append(f" Not readable: {error}")
    fitting = found.get(steps, [])
    if path in fitting or len(fitting) == 1:
        return path if path in fitting else fitting[0]
    if fitting:
        names = ", ".join(file.name for file in fitting)
        raise ContractError(
            f"{len(fitting)} files beside {path.name} draw in {steps} steps ({names}). Choose one."
        )
    raise ContractError(
        f"no file beside {path.name} draws in {steps} steps; there are students for "
        f"{', '.join(map(str, sorted(found, reverse=True)))}. A student draws in the steps it was trained for."
        + "".join(broken)
    )


def _family(path: Path) -> tuple[str, ...]:
    contract = file_contract(path)
    return kind_of(path), contract.base, contract.recipe, contract.role


def explain(path: Path) -> str:
    """Say in a few lines what a file is and how it is sampled; ModelError where nothing is known of
    it.
    """
    kind, known = kind_of(path), carried_contract(path)
    contract = file_contract(path) if known else read_contract(path)
    what = KIND_WORDS[kind]
    if contract.lora_rank is not None:
        what += f" of rank {contract.lora_rank} and alpha {contract.lora_alpha:g}"
    listed = ", ".join(f"{value:.4f}" for value in sigmas(contract).tolist()[:9])
    lines = {
        "name": f"{contract.name} ({what}, {contract.role})",
        "base": contract.base,
        "sampler": f"euler, scheduler simple, {contract.steps} steps, cfg {contract.guidance:g}",
        "predicts": f"{contract.prediction_type} (node ModelSamplingDiscrete: {SAMPLINGS[contract.prediction_type]})",
        "sigmas": listed + (", ..." if contract.steps > 8 else ""),
        "sizes": ", ".join(f"{width}x{height}" for width, height in contract.sizes[:6]),
        "trained at": ", ".join(map(str, contract.trained_times)) or "all times",
        "recipe": f"{contract.recipe or 'not said'}, written by {contract.version or 'others'}",
        "contract": "its own, or that of an official file"
        if known
        else "none: derived from what is in the file",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
