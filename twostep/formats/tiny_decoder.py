"""Files of tiny decoders: TAESD's own, diffusers' AutoencoderTiny, and those distilled here.

All are one architecture: a convolution, blocks of three convolutions at every resolution, each of
which doubles the side of the one before, and a last convolution to colours. TAESD numbers its
layers from 1, for a clamp comes first (`Decoder` in taesd.py, https://github.com/madebyollin/taesd,
MIT licence); diffusers counts from 0 and puts `decoder.layers.` before them (`DecoderTiny`). Needs
no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.contract import Contract
from twostep.formats.header import Header, read_header
from twostep.formats.locate import (
    WEIGHTS,
    ModelError,
    NoModelFolderError,
    fetch,
    hub_id,
    read_json,
)
from twostep.media.codec import FULL, TINY

if TYPE_CHECKING:
    from twostep.formats.checkpoint import Checkpoint

DECODER_FILE = "tiny_decoder.safetensors"
"""The tiny decoder in a model folder."""

NOTE_KEY = "twostep.decoder"
"""Where a file that was distilled here says what it is for."""

_DIALECTS = (
    (r"decoder\.layers\.(\d+)(\..+)", 0),
    (r"taesd_decoder\.(\d+)(\..+)", 1),
    (r"decoder\.(\d+)(\..+)", 1),
    (r"(\d+)(\..+)", 1),
)
"""How files name layers, and how far their numbers are from those of diffusers' decoder alone: of
diffusers, of a whole TAESD in ComfyUI, of converters, and of TAESD's own files.
"""

_OWN_NUMBERS = 1
"""How far the numbers in files written here are: those of TAESD's own."""

_CONVOLUTIONS = (0, 2, 4)
"""The numbers of the convolutions in a block; activations stand between."""

_IN_FOLDERS = (
    DECODER_FILE,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "taesdxl_decoder.safetensors",
    "taesd_decoder.safetensors",
)
"""Files of a folder that hold a tiny decoder, the first that is there counts."""

_HUB_FILES = ("config.json", "*.safetensors")


@dataclass(frozen=True)
class TinyLayout:
    """How large a tiny decoder is.

    Args:
        latent_channels: Channels of the latents that it takes.
        width: Channels of all its layers, 64 in TAESD.
        blocks: Blocks at every resolution, from the latents' to the picture's: 3, 3, 3, 1 in TAESD.
    """

    latent_channels: int
    width: int
    blocks: tuple[int, ...]

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along each side of one latent."""
        return int(2 ** (len(self.blocks) - 1))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights by the names of diffusers' decoder, as `layers.0.weight`."""
        shapes = dict(_convolution(0, self.width, self.latent_channels))
        position = 2
        for level, num_blocks in enumerate(self.blocks):
            is_last = level == len(self.blocks) - 1
            for _ in range(num_blocks):
                for number in _CONVOLUTIONS:
                    place = f"{position}.conv.{number}"
                    shapes |= _convolution(place, self.width, self.width)
                position += 1
            position += not is_last  # where the side is doubled
            out_channels = 3 if is_last else self.width
            shapes |= _convolution(position, out_channels, self.width, bias=is_last)
            position += 1
        return shapes

    def __str__(self) -> str:
        """Return the layout in words."""
        return (
            f"{self.latent_channels} channels of latents, {self.pixels_per_latent} pixels to a "
            f"latent, {self.width} wide, {'+'.join(map(str, self.blocks))} blocks"
        )


@dataclass(frozen=True)
class DecoderNote:
    """What a tiny decoder was distilled from, in the metadata of its file.

    Args:
        family: Of the models whose latents it takes, as contracts name it.
        base: The model whose autoencoder it learned from.
        recipe: By which it was made.
        version: Of this package.
        psnr: Of its pictures against that autoencoder's at the end of the training, in dB.
    """

    family: str
    base: str
    recipe: str
    version: str
    psnr: float

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a safetensors file that `of_header` reads."""
        return {NOTE_KEY: json.dumps({"format": 1, **asdict(self)})}

    @classmethod
    def of_header(cls, header: Header) -> DecoderNote | None:
        """Return the note in a file, None without one; raises ModelError if it is damaged."""
        return cls.of_metadata(header.metadata, str(header.path))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], where: str) -> DecoderNote | None:
        """Return the note in metadata, None without one; raises ModelError if it is damaged."""
        if NOTE_KEY not in metadata:
            return None
        try:
            values: dict[str, Any] = json.loads(metadata[NOTE_KEY])
            values.pop("format")
            texts = {key: str(values[key]) for key in ("family", "base", "recipe", "version")}
            return cls(**texts, psnr=float(values["psnr"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{where}: what it says of itself ({NOTE_KEY}) is damaged ({error!r}). Fetch or "
                "distil it again."
            ) from error

    @classmethod
    def of_contract(
        cls, contract: Contract, *, recipe: str, version: str, psnr: float
    ) -> DecoderNote:
        """Return the note of what was distilled from the autoencoder of a contract's model."""
        return cls(contract.family, contract.base, recipe, version, psnr)


@dataclass(frozen=True)
class DecoderFile:
    """A tiny decoder that was found.

    Args:
        header: Of its file.
        layout: Its size.
        names: Name in the file of every weight, by its name in diffusers' decoder.
        scaling_factor: By which its latents are scaled, as a config beside it says.
    """

    header: Header
    layout: TinyLayout
    names: Mapping[str, str]
    scaling_factor: float = 1.0


def find_decoder(name: str) -> DecoderFile:
    """Find a tiny decoder and read its header.

    Args:
        name: A file, a folder (of diffusers' AutoencoderTiny, or a model's), or a hub id.

    Raises ModelError if there is none, or it is something else.
    """
    path = Path(name)
    if not path.exists():
        repository = hub_id(name)
        if repository is None:
            raise ModelError(
                f"there is no decoder {name}. Give `{TINY}`, `{FULL}`, a .safetensors file such as "
                "taesdxl_decoder.safetensors, a folder, or a hub id."
            )
        try:
            path = fetch(repository, only=_HUB_FILES, holding="config.json")
        except NoModelFolderError as error:
            raise ModelError(f"{name} has no config.json, so it is no tiny decoder.") from error
    folder = path if path.is_dir() else None
    if folder is not None:
        found = [folder / each for each in _IN_FOLDERS if (folder / each).is_file()]
        if not found:
            raise ModelError(
                f"{folder} has no tiny decoder; looked for {', '.join(_IN_FOLDERS[:2])}. Give its "
                "file."
            )
        path = found[0]
    scaling = _configured(folder) if folder is not None and path.name != DECODER_FILE else 1.0
    return look_at_decoder(path, scaling_factor=scaling)


def own_decoder(checkpoint: Checkpoint) -> Path | None:
    """Return the file of the tiny decoder that comes with a model, None if it has none.

    It lies in the model's folder; beside a model in one file as NAME_tiny_decoder.safetensors, or
    in the folder with its configs; that of a student in the folder of its teacher.
    """
    path = checkpoint.path
    if checkpoint.is_folder:
        folders = [path]
    elif checkpoint.is_whole:
        folders = [path.with_suffix("")]
    else:
        beside = path.parent.parent
        folders = [beside, beside / "model", WEIGHTS / checkpoint.contract.base]
    files = [folder / DECODER_FILE for folder in folders]
    if not checkpoint.is_folder:
        files.insert(0, path.with_name(f"{path.stem}_{DECODER_FILE}"))
    return next((file for file in files if file.is_file()), None)


def look_at_decoder(path: Path, *, scaling_factor: float = 1.0) -> DecoderFile:
    """Read the header of a tiny decoder's file; raises ModelError for any other file."""
    header = read_header(path)
    names = _names(header)
    if not names:
        # What it is instead is known to a module that asks this one about tiny decoders.
        from twostep.formats.identify import kind_of

        raise ModelError(
            f"{path} is {kind_of(header)}, no tiny decoder. Give a file such as "
            "taesdxl_decoder.safetensors, or what `twostep distill --decoder MODEL` writes."
        )
    layout = _layout(header, names)
    expected = layout.shapes
    found = {name: header.shapes[key] for name, key in names.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ModelError(
                f"{path} is no decoder of TAESD's architecture: {names.get(name, name)} is "
                f"{_words(found.get(name))}, and {_words(expected.get(name))} was expected."
            )
    return DecoderFile(header, layout, names, scaling_factor)


def layout_in(header: Header) -> TinyLayout | None:
    """Return the size of the tiny decoder in a file; None if there is none."""
    names = _names(header)
    if not names:
        return None
    try:
        return _layout(header, names)
    except ModelError:
        return None


def file_name(name: str) -> str:
    """Return the name in a file written here, which is TAESD's, of a weight by diffusers'."""
    _, number, rest = name.split(".", 2)
    return f"{int(number) + _OWN_NUMBERS}.{rest}"


def diffusers_config(layout: TinyLayout) -> dict[str, Any]:
    """Return the config of diffusers' AutoencoderTiny with a decoder of this size.

    Its encoder, which every such class has, has TAESD's size.
    """
    encoder_blocks = (1, *(3,) * (len(layout.blocks) - 1))
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "decoder_block_out_channels": [layout.width] * len(layout.blocks),
        "encoder_block_out_channels": [64] * len(layout.blocks),
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": layout.latent_channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": list(layout.blocks),
        "num_encoder_blocks": list(encoder_blocks),
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def _convolution(
    place: int | str, out_channels: int, in_channels: int, *, bias: bool = True
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"layers.{place}.weight", (out_channels, in_channels, 3, 3)
    if bias:
        yield f"layers.{place}.bias", (out_channels,)


def _names(header: Header) -> dict[str, str]:
    """Return the names of a decoder's weights in a file, by those in diffusers' decoder.

    Empty for what is no tiny decoder. A whole autoencoder's encoder is left out.
    """
    for pattern, offset in _DIALECTS:
        names = {}
        for key in header.shapes:
            match = re.fullmatch(pattern, key)
            if match is not None:
                names[f"layers.{int(match[1]) - offset}{match[2]}"] = key
        # The first convolution, and a block, which tells it from other numbered layers.
        if "layers.0.weight" in names and any(".conv.0.weight" in name for name in names):
            return names
    return {}


def _layout(header: Header, names: Mapping[str, str]) -> TinyLayout:
    """Read the size off the layers; those that do not fit it are found by their shapes."""
    first = header.shapes[names["layers.0.weight"]]
    if len(first) != 4:
        raise ModelError(
            f"{header.path} is no decoder of TAESD's architecture: it begins with "
            f"{names['layers.0.weight']} of {_words(first)}."
        )
    blocks = [0]
    numbers = sorted({int(name.split(".")[1]) for name in names} - {0})
    for number in numbers:
        if f"layers.{number}.conv.0.weight" in names:
            blocks[-1] += 1
        elif number != numbers[-1]:
            blocks.append(0)
    return TinyLayout(first[1], first[0], tuple(blocks))


def _configured(folder: Path) -> float:
    """Return the scaling factor of a config; raises ModelError for what computes otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        return 1.0
    config = read_json(path)
    usual = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    for key, value in usual.items():
        if config.get(key, value) != value:
            raise ModelError(
                f"{path} has {key} = {config[key]!r}; only {value!r} is known for tiny decoders."
            )
    return float(config.get("scaling_factor", 1.0))


def _words(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape))
