"""Picture models of Stable Diffusion 1.5's kind, for motion modules to go on.

They are no family of their own: nothing is distilled from them, or drawn with them, without a
motion module. Most of AnimateDiff's are made for them.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from twostep.contract import Contract
from twostep.diffusion import make_schedule
from twostep.formats.checkpoint import Checkpoint
from twostep.formats.contracts import SDXL, sizes_around
from twostep.formats.diffusers_names import noise_of_scheduler
from twostep.formats.locate import INDEX_FILE, read_json
from twostep.formats.single_file import FolderFiles, Outline, Weights
from twostep.models.bundle import Bundle
from twostep.models.sdxl_networks import load_codec, load_network, load_tokenizer
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.text.single import SingleTextEncoder
from twostep.text.vocabulary import END

FAMILY = "sd15"
"""What contracts call it; no such family is registered."""

_PIPELINE = "StableDiffusionPipeline"
_GUIDANCE = 7.5
_STEPS = 32
_SAMPLE_SIZE = 64
_MULTIPLE = 64


def is_sd15(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is a diffusers folder of Stable Diffusion 1 or 2."""
    index = checkpoint.path / INDEX_FILE
    return index.is_file() and read_json(index).get("_class_name") == _PIPELINE


def load_sd15(checkpoint: Checkpoint, *, outline: bool = False) -> Bundle:
    """Load such a folder, frozen and in float32.

    Arguments:
        checkpoint: for which `is_sd15` says yes.
        outline: read configs alone, and leave the weights as they are initialised.

    Raises ModelError for missing or damaged parts.
    """
    folder = checkpoint.path
    source = FolderFiles(folder)
    weights: Weights = Outline(source) if outline else source
    contract = _contract(checkpoint, source.config("unet"))
    encoder = load_network(folder, "text_encoder", weights, lean=True)
    text = SingleTextEncoder(load_tokenizer(folder / "tokenizer", END, lean=True), encoder)
    return Bundle(
        denoiser=Denoiser(
            SdxlUnet(load_network(folder, "unet", weights, lean=True)),
            make_schedule(**asdict(contract.schedule)),
            contract.prediction_type,
        ),
        codec=load_codec(folder, weights, lean=True),
        text=text,
        contract=contract,
        origin=(checkpoint.name,),
    )


def _contract(checkpoint: Checkpoint, unet: dict[str, Any]) -> Contract:
    """Return a teacher's contract, of whose values configs say the noise and the size alone."""
    folder = checkpoint.path
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    prediction_type, schedule = noise_of_scheduler(config, folder)
    side = 8 * int(unet.get("sample_size") or _SAMPLE_SIZE)
    name = folder.resolve().name
    return replace(
        SDXL,
        name=name,
        base=name,
        steps=_STEPS,
        guidance=_GUIDANCE,
        family=FAMILY,
        prediction_type=prediction_type,
        schedule=schedule,
        sizes=sizes_around(side, min(_MULTIPLE, side)),
    )
