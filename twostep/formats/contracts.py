"""The sampling contract of a model, read or derived without loading any weights.

Folders that were written here carry a contract in `twostep.json`, students one in the metadata of
their file, and official SDXL-Lightning files are known by name. For every other SDXL folder or
single file, and folders of Stable Audio, a contract is derived from the configs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from twostep.contract import (
    METADATA_KEY,
    Contract,
    ContractError,
    is_student_name,
)
from twostep.formats import few_step
from twostep.formats.diffusers_names import library_defaults, noise_of_scheduler
from twostep.formats.header import Header
from twostep.formats.identify import DOWN, LORA, UNET_ALONE, WHOLE, kind_of
from twostep.formats.lightning import NAMED, TRAINED_TIMES, UNETS
from twostep.formats.locate import CONTRACT_FILE, INDEX_FILE, ModelError, read_json
from twostep.formats.single_header import config_folder, config_of, noise_of
from twostep.formats.stable_audio import is_stable_audio, stable_audio_contract

SDXL = Contract.from_json(Path(__file__).with_name("sdxl.json").read_text(encoding="utf-8"))
"""The contract of SDXL itself; steps and guidance are those of arXiv 2402.13929, section 3.6."""

_WIDEST = 2
"""The widest format is 2 : 1."""

_SAMPLE_SIZE = 128
"""The side of latents where a UNet's config does not say it, as in diffusers' pipelines of SDXL."""


def carried_contract(header: Header) -> Contract | None:
    """Return the contract in a file's metadata, or that of an official file, None without either.

    Raises ModelError for a damaged contract, ContractError for an official name on another file.
    """
    official = official_contract(header.path.name, header)
    if official is not None:
        return official
    if METADATA_KEY not in header.metadata:
        return None
    try:
        return Contract.from_metadata(header.metadata)
    except ContractError as error:
        raise ModelError(f"{header.path}: {error}") from error


def official_contract(name: str, header: Header | None = None) -> Contract | None:
    """Return the contract of an official SDXL-Lightning file, None if the name is not official.

    Arguments:
        name: the name of the file, with its suffix.
        header: what is in the file, to be checked against its name; without it the name alone
            counts, and the rank of a LoRA stays unknown.

    Raises ContractError if there is no such official file, or the file holds another thing.
    """
    match = NAMED.fullmatch(name)
    if match is None:
        return None
    steps = int(match[1])
    predicts_x0 = match[3] == "_x0"
    what = {"": WHOLE, "_unet": UNET_ALONE, "_lora": LORA}[match[2]]
    if steps not in UNETS or predicts_x0 != (steps == 1) or (what == LORA and steps == 1):
        raise ContractError(
            f"There is no official {name}: 8, 4 and 2 steps predict eps, 1 step x0 (no LoRA)."
        )
    rank = None
    alpha = None
    if header is not None:
        _check_kind(header, what)
        rank = next(iter(header.shape(DOWN)), None)
        alpha = rank if header.alpha is None else header.alpha
    return replace(
        SDXL,
        name=name.removesuffix(".safetensors"),
        role="student",
        steps=steps,
        trained_times=TRAINED_TIMES[steps],
        prediction_type="x0" if predicts_x0 else "eps",
        guidance=1.0,
        lora_rank=rank,
        lora_alpha=None if alpha is None else float(alpha),
        recipe="ByteDance",
    )


def _check_kind(header: Header, expected: str) -> None:
    actual = kind_of(header).what
    if actual != expected:
        raise ContractError(
            f"{header.path} is {actual}; by its name it would be {expected}. Fetch it again."
        )


def goes_on_a_student(lora: Contract) -> bool:
    """Tell whether a LoRA was trained on a few-step student, whose name is then its base."""
    return is_student_name(lora.base)


def single_file_contract(header: Header) -> Contract:
    """Derive the contract of a whole checkpoint from the configs that fit it and from its header.

    Raises ModelError for any other kind of file.
    """
    folder = config_folder(header)
    derived = derived_contract(folder, lambda name: config_of(header, folder, name))
    noise = noise_of(header)
    try:
        contract = replace(
            derived,
            name=header.path.stem,
            base=header.path.stem,
            prediction_type=noise.prediction_type or derived.prediction_type,
            schedule=noise.schedule or derived.schedule,
        )
    except ContractError as error:
        raise ModelError(f"{header.path} and {folder} disagree: {error}") from error
    found = few_step.detect(header.path.stem, header.metadata)
    return contract if found is None else few_step.drawn_as(contract, *found)


def folder_contract(folder: Path) -> Contract:
    """Read the contract of a model folder, or derive it from the configs; raises ModelError."""
    path = folder / CONTRACT_FILE
    if not path.is_file():
        if is_stable_audio(folder):
            return stable_audio_contract(folder)
        contract = derived_contract(folder)
        found = few_step.detect(contract.name, {})
        return contract if found is None else few_step.drawn_as(contract, *found)
    try:
        return Contract.from_json(path.read_text(encoding="utf-8-sig"))
    except ContractError as error:
        raise ModelError(f"{path}: {error}") from error


def derived_contract(
    folder: Path, config: Callable[[str], dict[str, Any]] | None = None
) -> Contract:
    """Derive a teacher's contract from its configs.

    They do not say how many steps and how much guidance suit it: those are SDXL's own. What configs
    leave out is what diffusers takes by default. Raises ModelError unless the folder holds an SDXL
    base or fine-tune, whose noise is known.

    Arguments:
        folder: the model folder.
        config: returns the config of a network; by default that in the folder.
    """
    index = read_json(folder / INDEX_FILE)
    read = config or (lambda name: read_json(folder / name / "config.json"))
    unet = library_defaults("UNet2DConditionModel") | read("unet")
    vae = read("vae")
    is_tiny = vae.get("_class_name") == "AutoencoderTiny"
    vae = library_defaults("AutoencoderTiny" if is_tiny else "AutoencoderKL") | vae
    _check_architecture(folder, index, unet)
    _check_channels(folder, unet)
    prediction_type, schedule = noise_of_scheduler(
        read_json(folder / "scheduler" / "scheduler_config.json"), folder
    )
    widths = vae["encoder_block_out_channels" if is_tiny else "block_out_channels"]
    pixels_per_latent = 2 ** (len(widths) - 1)
    multiple = pixels_per_latent * 2 ** (len(unet["block_out_channels"]) - 1)
    side = unet["sample_size"] or _SAMPLE_SIZE
    if not isinstance(side, int) or side < 0:
        raise ModelError(
            f"{folder}: its UNet has sample_size = {side!r}; expected the side of its latents, a "
            "whole number. Fetch that model again."
        )
    name = folder.resolve().name
    return replace(
        SDXL,
        name=name,
        base=name,
        prediction_type=prediction_type,
        schedule=schedule,
        sizes=sizes_around(side * pixels_per_latent, max(multiple, 64)),
    )


def _check_architecture(folder: Path, index: dict[str, Any], unet: dict[str, Any]) -> None:
    """Raise ModelError unless a folder is an SDXL pipeline with SDXL's kind of UNet."""
    pipeline = str(index.get("_class_name", "nothing"))
    if index.get("requires_aesthetics_score"):
        pipeline = "the SDXL refiner"
    embedding = unet.get("addition_embed_type")
    if not pipeline.startswith("StableDiffusionXL") or embedding != "text_time":
        raise ModelError(
            f"{folder} is {pipeline}, whose UNet has addition_embed_type {embedding!r}. Expected "
            "an SDXL base or fine-tune (StableDiffusionXLPipeline, 'text_time'); nothing else is "
            "distilled here."
        )


def _check_channels(folder: Path, unet: dict[str, Any]) -> None:
    """Raise ModelError unless the UNet takes latents, or also the mask and what is not masked."""
    taken = unet.get("in_channels", 4)
    made = unet.get("out_channels", 4)
    if taken not in (made, 2 * made + 1):
        raise ModelError(
            f"{folder} takes {taken} channels; expected {made}, or {2 * made + 1} to inpaint with."
        )


def sizes_around(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """List the sizes (width, height) in pixels that suit a model made for squares of `side`.

    The square comes first, the rest by falling width. Every side is a multiple of `multiple`, no
    area is larger than the square's, and none is wider than 2 : 1. For 1024 and 64 these hold
    SDXL's own 1152x896, 1216x832 and 1344x768. Raises ValueError if `side` is less than `multiple`.
    """
    square = side // multiple * multiple
    if square < multiple:
        raise ValueError(f"a side of {side} px is less than one multiple of {multiple} px")
    sizes = set()
    for long in range(square + multiple, math.isqrt(_WIDEST * square**2) + 1, multiple):
        short = square**2 // long // multiple * multiple
        if long <= _WIDEST * short:
            sizes |= {(long, short), (short, long)}
    return ((square, square), *sorted(sizes, reverse=True))
