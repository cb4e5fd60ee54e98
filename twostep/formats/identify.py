"""What a .safetensors file is: which kind, for which architecture, and by whose names.

Only the header is looked at, so that a file of many gigabytes is identified in milliseconds. The
knowledge stands in identify.toml. Architectures that are not supported are listed there too, so
that the answer to them is a clear no.
"""

import math
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from twostep.formats.header import Header
from twostep.formats.peft_config import CONFIG_FILE, METADATA_KEY, read_peft_configs
from twostep.formats.tiny_decoder import DecoderNote, layout_in

_KNOWN: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
_SMALLER = "SDXL's classes, in another size"
_MOTION = "a motion module"

DOWN = r"(lora_down|lora_A(\.\w+)?|lora(_linear_layer)?\.down)\.weight"
"""The first half of a LoRA's layer, in any dialect."""

_UP = r"(lora_up|lora_B(\.\w+)?|lora(_linear_layer)?\.up)\.weight"
"""The second half."""

_RANKED = rf"({DOWN}|\.hada_w1_b|\.lokr_w[12]_b)$"
"""The tensors whose first side is a rank."""

LORA = "a LoRA"
WHOLE = "a whole checkpoint"
UNET_ALONE = "a UNet alone"
CONTROL = "a ControlNet"
"""The kinds of file that are loaded here, as identify.toml calls them."""

LORAS = (LORA, "a DoRA", "a LoHa", "a LoKr", "a full difference")
"""The kinds of file that change a model's layers, and are read by `lora_files`."""


@dataclass(frozen=True)
class Kind:
    """What a file is (as "a LoRA"), for which architecture, and by whose names, if known."""

    what: str
    architecture: str | None = None
    names: str | None = None

    def __str__(self) -> str:
        """Return kind and architecture in words, as "a LoRA for Flux"."""
        return self.what if self.architecture is None else f"{self.what} for {self.architecture}"

    @property
    def readers(self) -> str:
        """The programs that load such a file."""
        if self.architecture == _MOTION:
            return (
                "twostep, on models of clips; diffusers; AnimateDiff, if it has AnimateDiff's names"
            )
        if self.architecture is not None and not self.architecture.startswith("SDXL"):
            return "not twostep, which knows SDXL alone"
        if self.architecture == _SMALLER:
            return "twostep, diffusers; others know the full size alone"
        # Who reads a LoRA depends on its dialect, and of some other kinds too.
        key = (self.names or "") if self.what == LORA else self.what
        readers = _KNOWN["readers"]
        return readers.get(f"{key}, {self.names}", readers.get(key, "not twostep"))


@lru_cache(maxsize=64)
def kind_of(header: Header) -> Kind:
    """Identify a file by the names and shapes of its tensors.

    Headers are remembered by `header.read_header`, and what they are is remembered here: every
    picture that is saved asks for it, and the patterns take milliseconds.
    """
    names = "".join(f"{name}\n" for name in header.shapes)
    unknown = "no model that is known here" if names else "a file without any weights"
    what = _first("what", names) or unknown
    return Kind(
        what=what,
        architecture=(
            _first("architecture", names)
            or _architecture_by_shapes(header)
            or _first("otherwise", names)
        ),
        names=_first("names", names),
    )


def summary(header: Header) -> dict[str, str]:
    """Describe a file in a few lines by their headings; what cannot be known is left out."""
    kind = kind_of(header)
    readers = kind.readers
    what = str(kind)
    names = "\n".join(header.shapes)
    num_down, num_up = (len(re.findall(rf"{half}$", names, re.M)) for half in (DOWN, _UP))
    if num_down != num_up:
        what += f", with {num_down} lower and {num_up} upper halves"
        readers = "not twostep, which leaves no half out"
    lines = {
        "is": what,
        "names": kind.names,
        "rank": _ranks(header),
        "alpha": _alpha_source(header),
        "weights": _amount(header),
        "decodes": _decoded(header),
        "predicts": _prediction(header) if re.search("UNet|checkpoint", kind.what) else None,
        "title": header.metadata.get("modelspec.title"),
        "read by": readers,
    }
    return {heading: line for heading, line in lines.items() if line}


def _ranks(header: Header) -> str | None:
    """List the ranks of a LoRA's layers, None for what is no LoRA."""
    ranks = set()
    for name, shape in header.shapes.items():
        if re.search(_RANKED, name) and shape:
            ranks.add(shape[0])
    return ", ".join(map(str, sorted(ranks))) or None


def _alpha_source(header: Header) -> str | None:
    """Say where a LoRA's alpha stands, None for what is no LoRA."""
    if _ranks(header) is None:
        return None
    in_tensors = any(name.endswith(".alpha") for name in header.shapes)
    if in_tensors or METADATA_KEY in header.metadata:
        return "in the file"
    if read_peft_configs(header):
        return f"in {CONFIG_FILE}"
    return "not in the file: the rank, or the contract's"


def _amount(header: Header) -> str:
    sizes = [math.prod(shape) for shape in header.shapes.values()]
    precisions = ", ".join(sorted(set(header.precisions.values())))
    return f"{len(sizes):,} tensors, {sum(sizes):,} numbers, {precisions}"


def _decoded(header: Header) -> str | None:
    """Say of a tiny decoder what it takes, and whose latents these are if the file tells it."""
    layout = layout_in(header)
    if layout is None:
        return None
    note = DecoderNote.of_header(header)
    return f"{layout}{f', those of {note.base}' if note else ''}"


def _prediction(header: Header) -> str | None:
    if "v_pred" in header.shapes:
        return "v"
    return header.metadata.get("modelspec.prediction_type")


def _architecture_by_shapes(header: Header) -> str | None:
    """Tell a UNet's architecture by the width of its text and its number of input channels."""
    context = header.shape(rf"attn2[._](processor\.)?to_k(\.weight|[._]{DOWN}|\.(hada_w1_b|diff))")
    if len(context) < 2:
        return None
    first = header.shape(r"(input_blocks\.0\.0|(^|\.)conv_in)\.weight")
    channels = first[1] if len(first) > 1 else 4
    architecture = _KNOWN["context"].get(str(context[1]), _SMALLER)
    return architecture + _KNOWN["channels"].get(str(channels), "")


def _first(table: str, names: str) -> str | None:
    """Return what a table of identify.toml says for its first pattern that fits."""
    for pattern, answer in _KNOWN[table].items():
        if re.search(pattern, names, re.MULTILINE):
            return answer
    return None
