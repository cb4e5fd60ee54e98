"""Files that say how they were made.

Every PNG carries text chunks. `parameters` is the line that A1111 and its relatives write and show,
`prompt` and `workflow` are a graph for ComfyUI. `twostep` is JSON: the sampling contract of the
model, the request that draws exactly this picture again, the names of the model and its LoRAs, the
hashes of these, and which pictures were drawn in one batch, for alone a picture may differ in its
last bit.

This module does not know how a picture was drawn; it is handed a `Result`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from twostep.contract import Contract
from twostep.errors import TwostepError, reason_of
from twostep.export.page import page_of
from twostep.media.clip import read_clip, texts_in
from twostep.media.codec import FULL
from twostep.pipeline.graph_pictures import file_name
from twostep.pipeline.output import prepare_folder, stem_of, write_item
from twostep.pipeline.request import (
    MAX_BATCH,
    SAMPLERS,
    LoraChoice,
    ModelTraits,
    Request,
    Result,
)
from twostep.pipeline.workflow import workflow_of

A1111_CHUNK = "parameters"
TWOSTEP_CHUNK = "twostep"

SOUND_SUFFIXES = (".wav", ".flac", ".ogg")
"""Endings of files that are sounds; these carry the same texts as JSON in their comment."""


class ProvenanceError(TwostepError):
    """A picture does not say how it was made."""


@dataclass(frozen=True)
class Provenance:
    """How a picture was made.

    - `contract`: how its checkpoint is sampled.
    - `request`: the request of this one picture.
    - `parameters`: the text that A1111 shows.
    - `origin`: the model and its LoRAs as they were named; empty where that is not known.
    - `batch`: the request of all that was drawn in one batch with it.
    - `lora_hashes`: the SHA-256 of the files of its LoRAs, by their names as in the request.
    - `has_merged_loras`: whether its LoRAs were merged into the weights, as they were before a
      request could name them. The sums are then rounded in another order.
    """

    contract: Contract
    request: Request
    parameters: str
    origin: tuple[str, ...]
    batch: Request
    has_merged_loras: bool
    lora_hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workflow:
    """A graph that draws a picture in ComfyUI.

    - `prompt`: as its server takes it.
    - `page`: as its page opens it.
    - `inputs`: under which names its nodes load pictures, by what these are: "image", "mask",
      "control 1".
    """

    prompt: dict[str, Any]
    page: dict[str, Any]
    inputs: dict[str, str]


def save_images(result: Result, folder: str | Path) -> list[Path]:
    """Write every item of a result into `folder`, which is created where it is missing.

    The model's codec says what kind of file it is: a PNG for pictures. Names are made of prompt,
    model and seed. The same item again keeps its file; a different one by the same name gets a
    number, so nothing is overwritten. Raises `OutputError`, or WriteError for a full disk.
    """
    folder = prepare_folder(folder)
    paths = []
    for index, image in enumerate(result.images):
        encoded = result.to_file(image, text_chunks(result, index))
        stem = stem_of(result.request.prompt, result.contract.name, result.seeds[index])
        paths.append(write_item(folder, stem, encoded.data, encoded.suffix))
    return paths


def text_chunks(result: Result, index: int) -> dict[str, str]:
    """Return what image `index` says of its origin: the text of every PNG chunk by its name."""
    request = result.request.only(result.seeds[index])
    first = index // MAX_BATCH * MAX_BATCH
    batch_seeds = result.seeds[first : first + MAX_BATCH]
    described = {
        "contract": json.loads(result.contract.to_json()),
        "request": json.loads(request.to_json()),
        "origin": result.origin,
        "batch": {"seed": batch_seeds[0], "num_images": len(batch_seeds)},
    }
    if request.loras:
        # This brings torch, which pictures without LoRAs are saved without.
        from twostep.pipeline.lora_hashes import lora_hashes

        described["lora_hashes"] = lora_hashes(request)
    chunks = {
        A1111_CHUNK: a1111_text(result.contract, request),
        TWOSTEP_CHUNK: json.dumps(described, ensure_ascii=False),
    }
    return chunks | comfyui_chunks(result.contract, request, result.traits)


def comfyui_chunks(contract: Contract, request: Request, traits: ModelTraits) -> dict[str, str]:
    """Return the graph that draws one picture, as ComfyUI keeps it in the pictures it saves.

    "prompt" is for its server, "workflow" for its page, which opens it when the picture is dropped
    there. Empty for what its own nodes cannot do.
    """
    api = workflow_of(contract, request, traits)
    if api is None:
        return {}
    return {"prompt": json.dumps(api), "workflow": json.dumps(page_of(api))}


def a1111_text(contract: Contract, request: Request) -> str:
    """Describe one picture the way A1111 does.

    That is the prompt, in which A1111 also says its LoRAs, by the names of their files without
    ending; the negative prompt if there is any; and one line of settings.
    """
    settings = {
        "Steps": f"{request.steps}",
        "Sampler": SAMPLERS[request.sampler or contract.sampler],
        "Schedule type": "Simple",
        "CFG scale": f"{request.guidance:g}",
        "Seed": f"{request.seed}",
        "Size": f"{request.width}x{request.height}",
        "Model": contract.name,
        "RNG": "CPU",
        **({} if request.decoder == FULL else {"VAE Decoder": "TAESD"}),
        "Version": f"twostep {contract.version}",
    }
    choices = [LoraChoice.parse(str(lora)) for lora in request.loras]
    loras = [f"<lora:{Path(lora.name).stem}:{lora.weight:g}>" for lora in choices]
    lines = [" ".join([request.prompt, *loras])]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def read_workflow(data: bytes) -> Workflow | None:
    """Read ComfyUI's graph from the bytes of a PNG; None where it has none."""
    try:
        with Image.open(BytesIO(data)) as image:
            chunks = dict(image.info)
        described = json.loads(chunks[TWOSTEP_CHUNK])
        return Workflow(
            prompt=json.loads(chunks["prompt"]),
            page=json.loads(chunks["workflow"]),
            inputs=_inputs(_read_chunks(described, "").request),
        )
    except KeyError:
        return None


def _inputs(request: Request) -> dict[str, str]:
    """Return the names under which a graph loads pictures, by what they are in a request."""
    pictures = {"image": request.image, "mask": request.mask}
    pictures |= {f"control {i}": each.picture for i, each in enumerate(request.controls, 1)}
    return {what: file_name(each) for what, each in pictures.items() if each is not None}


def read_provenance(path: str | Path) -> Provenance:
    """Read from a PNG, a clip or a sound how it was made.

    Raises `ProvenanceError` where the file does not say so, AudioError for a damaged sound.
    """
    chunks = _chunks_of(path)
    if TWOSTEP_CHUNK not in chunks:
        raise ProvenanceError(
            f"{path} has no {TWOSTEP_CHUNK!r} text chunk. Give a file as twostep wrote it: "
            "editors, messengers and converters often strip text chunks."
        )
    try:
        return _read_chunks(json.loads(chunks[TWOSTEP_CHUNK]), str(chunks.get(A1111_CHUNK, "")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProvenanceError(
            f"the {TWOSTEP_CHUNK!r} chunk of {path} is damaged: {error!r}."
        ) from error


@dataclass(frozen=True)
class Difference:
    """How far the contents of two files are apart.

    - `largest`: the largest difference between values at the same place.
    - `range`: the largest value there can be.
    - `part`: what has values: "pixel" or "sample".
    """

    largest: int
    range: int
    part: str


def difference(first: Path, second: Path) -> Difference:
    """Compare two pictures of one size, or two clips or sounds of one length.

    Raises `ProvenanceError` for lengths that differ.
    """
    if second.suffix.lower() not in SOUND_SUFFIXES:
        before, after = (read_clip(path) for path in (first, second))
        if len(before) != len(after):
            raise ProvenanceError(
                f"{second} has {len(after)} frames, and {first} has {len(before)}."
            )
        apart = ImageChops.difference(before.strip(), after.strip())
        return Difference(max(apart.tobytes()), 255, "pixel")
    from twostep.media.audio import LEVELS, read_sound

    one, other = (read_sound(path, mixed=False)[0] for path in (first, second))
    if one.num_channels != other.num_channels:
        raise ProvenanceError(
            f"{second} has {other.num_channels} channels, and {first} has {one.num_channels}."
        )
    if len(one) != len(other):
        raise ProvenanceError(f"{second} has {len(other)} samples, and {first} has {len(one)}.")
    furthest = float((one.samples - other.samples).abs().max())
    return Difference(round(furthest * LEVELS), LEVELS, "sample")


def _chunks_of(path: str | Path) -> dict[str, Any]:
    """Return the texts that a picture, a clip or a sound carries, by their names."""
    if Path(path).suffix.lower() in SOUND_SUFFIXES:
        # This brings torch, which reading of pictures does without.
        from twostep.media.audio import read_sound

        return dict(read_sound(path)[1])
    try:
        with Image.open(path) as image:
            texts = {str(name): value for name, value in image.info.items()}
            return texts | texts_in(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ProvenanceError(
            f"{path} cannot be read as a picture: {reason_of(error)}. "
            "Give a PNG written by twostep."
        ) from error


def _read_chunks(described: dict[str, Any], parameters: str) -> Provenance:
    """Read what `text_chunks` wrote, also before a request named its model and its LoRAs."""
    contract = Contract.from_json(json.dumps(described["contract"]))
    request = Request.from_json(json.dumps(described["request"]))
    origin = tuple(described.get("origin", ()))
    is_old = "model" not in described["request"]
    if is_old and origin:
        model, *loras = origin
        choices = tuple(LoraChoice.parse(lora) for lora in loras)
        request = replace(request, model=model, loras=choices)
    return Provenance(
        contract=contract,
        request=request,
        parameters=parameters,
        origin=origin,
        batch=replace(request, **described.get("batch", {})),
        has_merged_loras=is_old and len(origin) > 1,
        lora_hashes=_hashes(described.get("lora_hashes", {})),
    )


def _hashes(described: object) -> dict[str, str]:
    """Check what a chunk says of LoRAs; raises TypeError for anything but names and hashes."""
    if not isinstance(described, dict):
        raise TypeError("lora_hashes is no object")
    return {str(name): str(value) for name, value in described.items()}


def _quote(value: str) -> str:
    """Quote a value as A1111 does where it holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
