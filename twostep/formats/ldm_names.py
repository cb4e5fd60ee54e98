"""Names of weights in single files: diffusers' names <-> those of the first latent diffusion code.

ComfyUI, A1111 and Civitai keep SDXL in one file by the old names. Everything follows from the
networks' own keys, so small models have names too; every key has exactly one. The words stand in
ldm.toml; files and configs are unknown here.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
"""Where a single file keeps the parts."""

_WORDS: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)


def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the old name of every key of a UNet2DConditionModel, without `UNET` before it."""
    known = list(keys)
    # Where an attention stands between resnet and upsampler, the upsampler is the third of its
    # block.
    attentive = {m[1] for key in known if (m := re.match(r"up_blocks\.(\d+)\.attentions", key))}
    stride = 1 + max(
        int(m[1]) for key in known if (m := re.match(r"up_blocks\.0\.resnets\.(\d+)", key))
    )
    return {key: _unet_name(key, stride, attentive) for key in known}


def _unet_name(key: str, stride: int, attentive: set[str]) -> str:
    if ".resnets." in key:  # layers of attentions have the same names in both
        key = _replaced(key, _WORDS["resnet"])
    found = re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    )
    if found is None:
        return _replaced(key, _WORDS["unet"])
    way, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{stride * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{stride * block + stride - 1}.{2 if str(block) in attentive else 1}.{rest}"
    number = stride * block + place + (1 if way == "down" else 0)
    side = "input" if way == "down" else "output"
    return f"{side}_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the old name of every key of an AutoencoderKL, without `VAE` before it."""
    known = list(keys)
    last = max(int(m[1]) for key in known if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))

    def name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        return _replaced(key.replace("down_blocks", "down"), _WORDS["vae"])

    return {key: name(key) for key in known}


def clip_l_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name in the file of every key of a CLIPTextModel; newer transformers dropped its
    first word.
    """
    return {key: key if key.startswith("text_model.") else f"text_model.{key}" for key in keys}


def clip_g_names(keys: Iterable[str]) -> dict[str, str]:
    """Return open_clip's name of every key of a CLIPTextModelWithProjection; q, k and v still
    apart.
    """
    return {key: _replaced(key, _WORDS["clip_g"]) for key in keys}


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take q, k and v apart, which open_clip keeps stacked, and turn its projection round."""
    apart: dict[str, Tensor] = {}
    for key, value in weights.items():
        if found := re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", key):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                apart[f"{found[1]}{letter}_proj.{found[2]}"] = part
        else:
            apart[key] = value.T.contiguous() if key == "text_projection" else value
    return apart


def join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack q, k and v, and turn the projection round: what `split` takes apart."""
    joined = {
        key: value for key, value in weights.items() if not re.search(r"\.attn\.[qkv]_proj\.", key)
    }
    for key in (key for key in weights if ".attn.q_proj." in key):
        parts = [weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
        joined[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return joined | {"text_projection": weights["text_projection"].T}


def _replaced(key: str, words: dict[str, str]) -> str:
    """Replace whole words, or sequences of words, between dots."""
    for word, other in words.items():
        key = re.sub(rf"(^|\.){re.escape(word)}(?=\.|$)", rf"\g<1>{other}", key)
    return key
