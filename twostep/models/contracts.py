"""What a model says of itself, read without loading any weights.

Folders of ours carry a contract in `twostep.json`, students one in their metadata; for any other
SDXL folder or single file one is derived from its configs.
"""

import math
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from twostep.contract import METADATA_KEY, Contract, ContractError, PredictionType, is_student_name
from twostep.diffusion import trained_times
from twostep.formats.identify import DOWN, kind_of, read_header
from twostep.formats.locate import (
    CONTRACT_FILE,
    INDEX_FILE,
    LIGHTNING,
    NAMED,
    UNETS,
    ModelError,
    find_model,
    read_json,
)
from twostep.formats.single_file import find_single_file

PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}
DIFFUSERS_NAMES = {kind: name for name, kind in PREDICTION_TYPES.items()}
SDXL = Contract.from_json(Path(__file__).with_name("sdxl.json").read_text(encoding="utf-8"))
"""What SDXL would say of itself; its steps and guidance are those of section 3.6 of arXiv
2402.13929.
"""


def read_contracts(model: str | Path) -> list[Contract]:
    """Read the contracts of a model: the teacher's first, then the students' by falling steps;
    ModelError.
    """
    if str(model) in LIGHTNING:
        return [contract for name in UNETS.values() if (contract := official_contract(Path(name)))]
    path = find_model(model)
    if path.is_file():
        return [carried_contract(path) or _single_file_contract(path)]
    students = [file_contract(file) for file in student_files(path).values()]
    return [_folder_contract(path), *sorted(students, key=lambda contract: -contract.steps)]


def student_files(folder: Path, kind: str = "unet") -> dict[int, Path]:
    """Return the UNets of the students in a model folder by their steps, or as "lora" the LoRAs
    that make them.
    """
    files = {
        path: file_contract(path) for path in sorted(folder.glob(f"students/*_{kind}.safetensors"))
    }
    return {
        told.steps: path
        for path, told in files.items()
        if kind == "unet" or not goes_on_a_student(told)
    }


def file_contract(path: Path) -> Contract:
    """Read the contract in a student's file, or tell that of an official one by its name."""
    try:
        return official_contract(path) or Contract.from_metadata(read_header(path).metadata)
    except ContractError as error:
        raise ModelError(f"{path}: {error}") from error


def official_contract(path: Path) -> Contract | None:
    """Return what is known of a file by its name, None if it is not official; ContractError if it
    holds another thing.

    A path where there is no file stands for its name alone.
    """
    found = NAMED.fullmatch(path.name)
    if found is None:
        return None
    steps, is_x0 = int(found[1]), found[3] == "_x0"
    rank: int | None = None
    alpha: float | None = None
    what = {"": "a whole checkpoint", "_unet": "a UNet alone", "_lora": "a LoRA"}[found[2]]
    if steps not in UNETS or is_x0 != (steps == 1) or (what, steps) == ("a LoRA", 1):
        raise ContractError(
            f"There is no official {path.name}: 8, 4 and 2 steps predict eps, 1 step x0 (no LoRA)."
        )
    if path.is_file():
        header = read_header(path)
        if (holds := kind_of(header).what) != what:
            raise ContractError(
                f"{path} is {holds}; by its name it would be {what}. Fetch it again."
            )
        alpha = rank = next(iter(header.shape(DOWN)), None)
        if alphas := [key for key in header.shapes if key.endswith(".alpha")]:
            with safe_open(path, "pt") as file:
                alpha = file.get_tensor(alphas[0]).item()
    times, kind = trained_times(steps), PREDICTION_TYPES["sample" if is_x0 else "epsilon"]
    told = replace(
        SDXL, name=path.stem, role="student", steps=steps, trained_times=times, guidance=1.0
    )
    return replace(
        told,
        prediction_type=kind,
        lora_rank=rank,
        lora_alpha=alpha and float(alpha),
        recipe="ByteDance",
    )


def carried_contract(path: Path) -> Contract | None:
    """Return the contract in a file, or that of an official one by its name; None where there is
    neither.
    """
    return (
        file_contract(path)
        if METADATA_KEY in read_header(path).metadata or official_contract(path)
        else None
    )


def _single_file_contract(path: Path) -> Contract:
    """Say of a whole checkpoint in one file what the configs that fit it tell, and the file itself."""
    single = find_single_file(path)
    told = _derived_contract(single.folder)
    kind = single.prediction_type or told.prediction_type
    return replace(told, name=path.stem, base=path.stem, prediction_type=kind)


def goes_on_a_student(lora: Contract) -> bool:
    """Tell whether a LoRA was trained on a student of few steps, whose name is then that of its
    base.
    """
    return is_student_name(lora.base)


def _folder_contract(folder: Path) -> Contract:
    if not (folder / CONTRACT_FILE).is_file():
        return _derived_contract(folder)
    try:
        return Contract.from_json((folder / CONTRACT_FILE).read_text(encoding="utf-8"))
    except ContractError as error:
        raise ModelError(f"{folder / CONTRACT_FILE}: {error}") from error


def _derived_contract(folder: Path) -> Contract:
    """Say of a teacher what its configs tell; how many steps and how much guidance it likes, they
    do not.
    """
    index = read_json(folder / INDEX_FILE)
    kind = (
        "the SDXL refiner"
        if index.get("requires_aesthetics_score")
        else index.get("_class_name", "nothing")
    )
    unet, vae = (
        read_json(folder / "unet" / "config.json"),
        read_json(folder / "vae" / "config.json"),
    )
    if (
        not str(kind).startswith("StableDiffusionXL")
        or unet.get("addition_embed_type") != "text_time"
    ):
        found = f"{kind}, whose UNet has addition_embed_type {unet.get('addition_embed_type')!r}"
        expected = "an SDXL base or fine-tune (StableDiffusionXLPipeline, 'text_time')"
        raise ModelError(
            f"{folder} is {found}. Expected {expected}; nothing else is distilled here."
        )
    given, made = unet.get("in_channels", 4), unet.get("out_channels", 4)
    # an inpainting UNet takes the mask and what is not masked too
    if given not in (made, 2 * made + 1):
        raise ModelError(
            f"{folder} takes {given} channels; expected {made}, or {2 * made + 1} to inpaint with."
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    said = scheduler.get("prediction_type", "epsilon")
    if said not in PREDICTION_TYPES:
        raise ModelError(f"{folder} predicts {said!r}; known are {', '.join(PREDICTION_TYPES)}.")
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = pixels * 2 ** (len(unet["block_out_channels"]) - 1)
    name, sizes = (
        folder.resolve().name,
        sizes_around(unet["sample_size"] * pixels, max(multiple, 64)),
    )
    return replace(SDXL, name=name, prediction_type=PREDICTION_TYPES[said], sizes=sizes, base=name)


def sizes_around(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """List (width, height) in pixels, the square of `side` first, the rest by falling width.

    Every side is a multiple of `multiple`, no area is larger than the square's, and none wider than
    2 : 1. For 1024 and 64 these hold SDXL's own 1152x896, 1216x832 and 1344x768.
    """
    square = side // multiple * multiple
    if square < multiple:
        raise ValueError(f"a side of {side} px is less than one multiple of {multiple} px")
    found, widest = set(), 2
    for long in range(square + multiple, math.isqrt(widest * square**2) + 1, multiple):
        short = square**2 // long // multiple * multiple
        if long <= widest * short:
            found |= {(long, short), (short, long)}
    return ((square, square), *sorted(found, reverse=True))
