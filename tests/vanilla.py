"""A bundle as others keep it: in diffusers' own pipeline, and in one file; without the package's
writers.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from twostep.formats.locate import find_model
from twostep.formats.single_file import NAMES
from twostep.formats.single_header import CLIP_G, CLIP_L, UNET, VAE
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle


def with_sdxl_vae(bundle: Bundle, *, layers_per_block: int = 1) -> Bundle:
    """Return the bundle with a small autoencoder of the kind that SDXL has, random by seed 0."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=layers_per_block,
        norm_num_groups=8,
    )
    return replace(bundle, codec=ImageCodec(vae.eval().requires_grad_(False)))


def assemble(
    bundle: Bundle, *, zeros_for_empty: bool = False, **scheduler: object
) -> StableDiffusionXLPipeline:
    """Return the pipeline with an Euler scheduler of SDXL's betas and whatever else it is told."""
    return StableDiffusionXLPipeline(
        vae=bundle.codec.vae,
        text_encoder=bundle.text.encoders[0],
        text_encoder_2=bundle.text.encoders[1],
        tokenizer=bundle.text.tokenizers[0],
        tokenizer_2=bundle.text.tokenizers[1],
        unet=bundle.denoiser.network,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **scheduler
        ),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )


def fuse_into_nano(lora: Path, weight: float) -> StableDiffusionXLPipeline:
    """Return diffusers' pipeline of the nano teacher with a LoRA file fused into its weights."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        find_model("nano"), torch_dtype=torch.float32
    )
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"], lora_scale=weight)
    pipeline.unload_lora_weights()
    return pipeline


def assert_merged_alike(bundle: Bundle, pipeline: StableDiffusionXLPipeline) -> None:
    """Compare every weight of a bundle with that of a pipeline."""
    for part, network in bundle.parts.items():
        theirs = getattr(pipeline, part).state_dict()
        for key, value in network.state_dict().items():
            torch.testing.assert_close(
                value, theirs[key], atol=1e-6, rtol=1e-5, msg=f"{part} {key}"
            )


def write_single_file(
    bundle: Bundle, path: Path, metadata: dict[str, str] | None = None, **more: Tensor
) -> None:
    """Write a whole checkpoint into one file, in fp16 and by the old names; `more` are further
    keys.
    """
    parts = {UNET: bundle.denoiser.network, VAE: bundle.codec.vae}
    parts |= {CLIP_L: bundle.text.encoders[0], CLIP_G: bundle.text.encoders[1]}
    weights = dict(more)
    for part, network in parts.items():
        state = network.state_dict()
        named = {name: state[key] for key, name in NAMES[part](state).items()}
        named = _stacked(named) if part == CLIP_G else named
        weights |= {part + name: value.half().contiguous() for name, value in named.items()}
    for key in [key for key in weights if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)]:
        weights[key] = weights[key][:, :, None, None]
    save_file(weights, path, metadata)


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep q, k and v in one, and the projection the other way round, as open_clip does."""
    stacked = {
        key: value for key, value in weights.items() if not re.search(r"attn\.[qkv]_proj", key)
    }
    for key in (key for key in weights if ".attn.q_proj." in key):
        whole = torch.cat([weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        stacked[key.replace("q_proj.", "in_proj_")] = whole
    return stacked | {"text_projection": weights["text_projection"].T}
