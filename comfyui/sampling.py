"""From a file to how it is sampled in ComfyUI's terms: what kind of file, which times, which
prediction.

ComfyUI counts noise as sigma / alpha of the variance-preserving schedule, the sigma of k-diffusion.
A student's times are those of the trailing grid, so its sigmas are (sigma / alpha)(t) at T, .., T /
N, and 0 at the end. Nothing here imports ComfyUI.

A file is given as a path, or as the checkpoint that `twostep.formats.resolve` returned for it, so
that several questions cost one look at the file.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from twostep.contract import Contract, ContractError, VariancePreservingSpec
from twostep.diffusion import VariancePreserving, make_schedule
from twostep.errors import TwostepError
from twostep.export.pictures_only import check_makes_pictures
from twostep.formats import Checkpoint, ModelError, resolve
from twostep.formats.contracts import SDXL
from twostep.formats.single_file import NAMES, SingleFile
from twostep.models.lora_stack import LoraFile
from twostep.models.sampling import sampling_times

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

_MAX_SIGMAS_SHOWN = 9
_MAX_SIZES_SHOWN = 6


def kind_of(file: Path | Checkpoint) -> Kind:
    """Tell by its tensors whether a file is a whole checkpoint, a UNet alone, or a LoRA.

    Raises ModelError for what is no safetensors file.
    """
    checkpoint = resolve(file)
    if any("lora" in key for key in checkpoint.file.shapes):
        return "lora"
    return "checkpoint" if checkpoint.is_whole else "unet"


def read_contract(file: Path | Checkpoint, base: Path | Checkpoint | None = None) -> Contract:
    """Return how a file is sampled, a LoRA on the checkpoint `base`.

    A whole checkpoint that carries no contract is a teacher, and what it predicts is read from it.
    Raises ContractError for a LoRA that does not belong on that base, ModelError for a UNet or a
    LoRA that carries no contract, and for models of sounds and clips.
    """
    checkpoint = resolve(file)
    kind = kind_of(checkpoint)
    if checkpoint.carried is None:
        if kind == "checkpoint":
            return teacher_contract(checkpoint)
        raise ModelError(
            f"{checkpoint.path.name} carries no sampling contract, and its name is none of the "
            f"official ones: how a {kind} alone is sampled cannot be seen from its weights. Load "
            "it with ComfyUI's own nodes, or write it anew with `twostep export`."
        )
    check_makes_pictures(checkpoint.carried, "these nodes")
    if kind != "lora":
        return checkpoint.carried
    if base is None:
        raise ContractError(
            f"{checkpoint.path.name} is a LoRA: choose the checkpoint that it goes on as the base."
        )
    _check_dialect(checkpoint)
    return LoraFile(checkpoint).contract_on(_base_contract(resolve(base)))


def _check_dialect(lora: Checkpoint) -> None:
    """Raise ModelError unless ComfyUI reads all of a LoRA."""
    name = lora.path.name
    for key in lora.file.shapes:
        if not key.startswith(KOHYA):
            raise ModelError(
                f"{name} has names that ComfyUI reads only in part (as {key}). Write it for "
                f"ComfyUI first: twostep export {name} --to lora-kohya --out "
                "for-comfyui.safetensors"
            )


def _base_contract(base: Checkpoint) -> Contract:
    """Return the contract of the checkpoint that a LoRA goes on."""
    kind = kind_of(base)
    if kind != "checkpoint":
        raise ContractError(
            f"{base.path.name} is {KIND_WORDS[kind]}; a base is a whole checkpoint."
        )
    return base.carried or teacher_contract(base)


def teacher_contract(file: Path | Checkpoint) -> Contract:
    """Return the contract of a whole SDXL checkpoint that carries none.

    Its configs are not needed: ComfyUI knows those of SDXL. Raises ModelError for any other file.
    """
    checkpoint = resolve(file)
    header = checkpoint.file
    lacking = [part for part in NAMES if not header.has(part)]
    if lacking:
        raise ModelError(
            f"{header.path.name} is no whole SDXL checkpoint: it has no {lacking[0]}*. Nothing "
            "else is loaded here."
        )
    noise = SingleFile(header, header.path.parent).noise
    return replace(
        SDXL,
        name=header.path.stem,
        base=header.path.stem,
        prediction_type=noise.prediction_type or "eps",
        schedule=noise.schedule or SDXL.schedule,
        sizes=((1024, 1024),),
    )


def sigmas(contract: Contract) -> Float32[Tensor, " steps_plus_one"]:
    """Return sigma / alpha at the contract's times, falling, and 0 at the end.

    SamplerCustom follows them. Raises ContractError for a rectified flow, for EDM, and for a
    student that does not begin at the top.
    """
    is_known = isinstance(contract.schedule, VariancePreservingSpec)
    if contract.prediction_type not in PREDICTIONS or not is_known:
        raise ContractError(
            f"{contract.name} predicts {contract.prediction_type}, which these nodes do not "
            f"sample; they know {', '.join(PREDICTIONS)}. Draw with it in twostep."
        )
    schedule = make_schedule(**asdict(contract.schedule))
    assert isinstance(schedule, VariancePreserving)
    first, *rest = sampling_times(contract, schedule)
    if first != schedule.top:
        raise ContractError(
            f"{contract.name} takes pure noise for latents of time {first:g}, which ComfyUI's "
            "samplers cannot do. Draw with it in twostep."
        )
    times = torch.tensor([first, *rest])
    return (schedule.sigmas[times] / schedule.alphas[times]).float()


def _sampler(contract: Contract) -> str:
    """Return what to choose in ComfyUI's samplers: of the sigmas by these nodes, or by its own."""
    name = "lcm" if contract.sampler == "renoise" else "euler"
    if contract.sampling_times:
        return f"{name} (SamplerCustom with these sigmas: no scheduler has them)"
    return f"{name}, scheduler simple"


def student_beside(file: Path | Checkpoint, steps: int) -> Path:
    """Return the student of so many steps beside another one.

    It is the file of the same kind, base and recipe in the same folder. Raises ContractError with
    the steps there are, or with the files if there are several.
    """
    checkpoint = resolve(file)
    path = checkpoint.path
    if checkpoint.carried is None:
        raise ContractError(
            f"{path.name} carries no sampling contract; choose one of the students as the family."
        )
    students, broken = _students_like(checkpoint)
    fitting = students.get(steps, [])
    if path in fitting:
        return path
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(student.name for student in fitting)
        raise ContractError(
            f"{len(fitting)} files beside {path.name} draw in {steps} steps ({names}). Choose one."
        )
    offered = ", ".join(map(str, sorted(students, reverse=True)))
    raise ContractError(
        f"no file beside {path.name} draws in {steps} steps; there are students for {offered}. A "
        "student draws in the steps it was trained for." + "".join(broken)
    )


def _students_like(checkpoint: Checkpoint) -> tuple[dict[int, list[Path]], list[str]]:
    """Return the students of the same family in the same folder, by their steps.

    The second is what is wrong with files that cannot be read.
    """
    family = _family(checkpoint)
    students: dict[int, list[Path]] = {}
    broken = []
    for path in sorted(checkpoint.path.parent.glob("*.safetensors")):
        try:
            other = checkpoint if path == checkpoint.path else resolve(path)
            if other.carried is not None and _family(other) == family:
                students.setdefault(other.carried.steps, []).append(path)
        # a damaged neighbour matters only if it may be the one that is looked for
        except TwostepError as error:
            broken.append(f" Not readable: {error}")
    return students, broken


def _family(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what students of one teacher and one recipe have in common."""
    contract = checkpoint.contract
    return kind_of(checkpoint), contract.base, contract.recipe, contract.role


def explain(file: Path | Checkpoint) -> str:
    """Say in a few lines what a file is and how it is sampled.

    Raises ModelError if nothing is known of it.
    """
    checkpoint = resolve(file)
    carried = checkpoint.carried
    contract = carried or read_contract(checkpoint)
    what = KIND_WORDS[kind_of(checkpoint)]
    if contract.lora_rank is not None:
        what += f" of rank {contract.lora_rank} and alpha {contract.lora_alpha:g}"
    values = [f"{value:.4f}" for value in sigmas(contract).tolist()[:_MAX_SIGMAS_SHOWN]]
    if contract.steps >= _MAX_SIGMAS_SHOWN:
        values.append("...")
    sampling = SAMPLINGS[contract.prediction_type]
    sizes = [f"{width}x{height}" for width, height in contract.sizes[:_MAX_SIZES_SHOWN]]
    origin = "none: derived from what is in the file"
    if carried is not None:
        origin = "its own, or that of an official file"
    lines = {
        "name": f"{contract.name} ({what}, {contract.role})",
        "base": contract.base,
        "sampler": f"{_sampler(contract)}, {contract.steps} steps, cfg {contract.guidance:g}",
        "predicts": f"{contract.prediction_type} (node ModelSamplingDiscrete: {sampling})",
        "sigmas": ", ".join(values),
        "sizes": ", ".join(sizes),
        "trained at": ", ".join(map(str, contract.trained_times)) or "all times",
        "recipe": f"{contract.recipe or 'not said'}, written by {contract.version or 'others'}",
        "contract": origin,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
