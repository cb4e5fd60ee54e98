"""Pictures that say how they were made.

Every PNG carries two text chunks: `parameters`, the line that A1111 and its relatives write and
show, and `twostep`, JSON with the sampling contract of the model, the request that draws exactly
this picture again, the names of the model and its LoRAs, and which pictures were drawn together:
alone it may differ in its last bit.

This module does not know how a picture was drawn; it is handed a `Result`.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from twostep.contract import Contract
from twostep.errors import TwostepError
from twostep.files import write_atomically
from twostep.pipeline.request import MAX_BATCH, Request, Result

A1111_CHUNK = "parameters"
TWOSTEP_CHUNK = "twostep"
_MAX_SLUG_LETTERS = 60


class OutputError(TwostepError):
    """A picture could not be written."""


class ProvenanceError(TwostepError):
    """A picture does not say how it was made."""


@dataclass(frozen=True)
class Provenance:
    """How a picture was made: which contract, which request (of this one picture), and the A1111
    text.

    `origin` is the model and its LoRAs as they were named, `batch` the request of all that was
    drawn with it.
    """

    contract: Contract
    request: Request
    parameters: str
    origin: tuple[str, ...]
    batch: Request


def save_images(result: Result, folder: str | Path) -> list[Path]:
    """Write every image of a result as a PNG into `folder`, which is created where it is missing.

    Names are made of prompt, model and seed. The same picture again keeps its file; a different one
    by the same name gets a number, so nothing is overwritten. Raises `OutputError`, or
    WriteError for a full disk.
    """
    folder = prepare_folder(folder)
    paths = []
    for index, image in enumerate(result.images):
        data = encode_png(image, text_chunks(result, index))
        stem = f"{_slug(result.request.prompt)}_{_slug(result.contract.name)}_{result.seeds[index]}"
        path = _free_path(folder, stem, data)
        with write_atomically(path) as file:
            file.write(data)
        paths.append(path)
    return paths


def text_chunks(result: Result, index: int) -> dict[str, str]:
    """Write down the origin of image `index` as PNG text chunks, by chunk name."""
    request = result.request.only(result.seeds[index])
    first = index // MAX_BATCH * MAX_BATCH
    told = {
        "contract": json.loads(result.contract.to_json()),
        "request": json.loads(request.to_json()),
        "origin": result.origin,
        "batch": {
            "seed": result.seeds[first],
            "num_images": len(result.seeds[first : first + MAX_BATCH]),
        },
    }
    return {
        A1111_CHUNK: a1111_text(result.contract, request),
        TWOSTEP_CHUNK: json.dumps(told, ensure_ascii=False),
    }


def a1111_text(contract: Contract, request: Request) -> str:
    """Describe one picture the way A1111 does: prompt, negative prompt if any, then one line of
    settings.
    """
    settings = {
        "Steps": f"{request.steps}",
        "Sampler": "Euler",
        "Schedule type": "SGM Uniform",
        "CFG scale": f"{request.guidance:g}",
        "Seed": f"{request.seed}",
        "Size": f"{request.width}x{request.height}",
        "Model": contract.name,
        "RNG": "CPU",
        "Version": f"twostep {contract.version}",
    }
    avoided = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{avoided}\n{', '.join(f'{key}: {_quote(value)}' for key, value in settings.items())}"


def read_provenance(path: str | Path) -> Provenance:
    """Read from a PNG how it was made; raises `ProvenanceError` where the file does not say so."""
    try:
        with Image.open(path) as image:
            chunks = dict(image.info)
    except (OSError, ValueError) as error:
        raise ProvenanceError(
            f"{path} cannot be read as a picture: {error}. Give a PNG written by twostep."
        ) from error
    if TWOSTEP_CHUNK not in chunks:
        advice = "Give a PNG as twostep wrote it: editors, messengers and converters often strip text chunks"
        raise ProvenanceError(f"{path} has no {TWOSTEP_CHUNK!r} text chunk. {advice}.")
    try:
        told = json.loads(chunks[TWOSTEP_CHUNK])
        contract = Contract.from_json(json.dumps(told["contract"]))
        request = Request.from_json(json.dumps(told["request"]))
        batch = replace(request, **told.get("batch", {}))
    except (ValueError, TypeError, KeyError) as error:
        raise ProvenanceError(
            f"the {TWOSTEP_CHUNK!r} chunk of {path} is damaged: {error!r}."
        ) from error
    return Provenance(
        contract, request, str(chunks.get(A1111_CHUNK, "")), tuple(told.get("origin", ())), batch
    )


def prepare_folder(folder: str | Path) -> Path:
    """Create `folder` and prove that it can be written to, before work is spent; raises
    `OutputError`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"cannot write to {folder}: {reason}. Choose a folder that you may write to."
        ) from error
    return folder


def encode_png(image: Image.Image, chunks: Mapping[str, str]) -> bytes:
    """Encode an image as PNG with the given text chunks."""
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _free_path(folder: Path, stem: str, data: bytes) -> Path:
    path, number = folder / f"{stem}.png", 1
    while path.exists() and not (path.is_file() and path.read_bytes() == data):
        number += 1
        path = folder / f"{stem}_{number}.png"
    return path


def _slug(text: str) -> str:
    return (
        re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_MAX_SLUG_LETTERS].rstrip("-")
        or "untitled"
    )


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
