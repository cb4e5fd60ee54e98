"""Names of weights in single files: diffusers' names <-> those of the first latent diffusion code.

ComfyUI, A1111 and Civitai keep SDXL in one file by the old names. The mapping follows from the
networks' own keys, so that small models have names too, and every key has exactly one. The words
that are replaced stand in ldm_names.toml.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_WORDS: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)

_IN_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
)
"""A key of a layer within a block: direction, block, kind, place, and the layer's own name."""


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the old name of every key of a UNet2DConditionModel, without `UNET` before it.

    The old code numbers layers throughout the encoder and the decoder; how many a block has, and
    which blocks have attention, is read from the keys.
    """
    known = list(keys)
    attentive = set()
    resnets = 0
    for key in known:
        if match := re.match(r"up_blocks\.(\d+)\.attentions", key):
            attentive.add(match[1])
        if match := re.match(r"up_blocks\.0\.resnets\.(\d+)", key):
            resnets = max(resnets, int(match[1]) + 1)
    return {key: _unet_name(key, resnets, attentive) for key in known}


def _unet_name(key: str, resnets: int, attentive: set[str]) -> str:
    """Return the old name of one key.

    Arguments:
        key: diffusers' name.
        resnets: how many an up block has, one more than a down block.
        attentive: the up blocks with attention, where the upsampler is the third of its group.
    """
    if ".resnets." in key:  # the layers of attentions have the same names in both
        key = _replaced(key, _WORDS["resnet"])
    match = _IN_BLOCK.match(key)
    if match is None:
        return _replaced(key, _WORDS["unet"])
    direction, block, kind, place, rest = match.groups()
    first = resnets * int(block)
    if kind == "downsamplers":
        return f"input_blocks.{first + resnets}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        position = 2 if block in attentive else 1
        return f"output_blocks.{first + resnets - 1}.{position}.{rest}"
    position = 0 if kind == "resnets" else 1
    if direction == "down":  # input block 0 is the first convolution
        return f"input_blocks.{first + int(place) + 1}.{position}.{rest}"
    return f"output_blocks.{first + int(place)}.{position}.{rest}"


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the old name of every key of an AutoencoderKL, without `VAE` before it.

    The old code counts the decoder's blocks from the other end.
    """
    known = list(keys)
    matches = [re.match(r"decoder\.up_blocks\.(\d+)", key) for key in known]
    last = max(int(match[1]) for match in matches if match)

    def old_name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        return _replaced(key.replace("down_blocks", "down"), _WORDS["vae"])

    return {key: old_name(key) for key in known}


def clip_l_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name in the file of every key of a CLIPTextModel.

    They are Hugging Face's names; newer versions of transformers dropped the first word, which
    files keep.
    """
    return {key: key if key.startswith("text_model.") else f"text_model.{key}" for key in keys}


def clip_g_names(keys: Iterable[str]) -> dict[str, str]:
    """Return open_clip's name of every key of a CLIPTextModelWithProjection.

    Query, key and value keep names of their own; see `join`.
    """
    return {key: _replaced(key, _WORDS["clip_g"]) for key in keys}


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take query, key and value apart, which open_clip stacks, and transpose its projection."""
    apart: dict[str, Tensor] = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", key):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                apart[f"{match[1]}{letter}_proj.{match[2]}"] = part
        elif key == "text_projection":
            apart[key] = value.T.contiguous()
        else:
            apart[key] = value
    return apart


def join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack query, key and value, and transpose the projection: the inverse of `split`."""
    joined = {}
    for key, value in weights.items():
        if ".attn.q_proj." in key:
            parts = [weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            joined[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif key == "text_projection":
            joined[key] = value.T
        elif not re.search(r"\.attn\.[kv]_proj\.", key):
            joined[key] = value
    return joined


def _replaced(key: str, words: dict[str, str]) -> str:
    """Replace whole words, or sequences of words, between dots."""
    for word, replacement in words.items():
        key = re.sub(rf"(^|\.){re.escape(word)}(?=\.|$)", rf"\g<1>{replacement}", key)
    return key
