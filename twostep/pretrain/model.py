"""The networks of a built-in model, untrained: SDXL's own classes at the size that is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.contract import Contract
from twostep.diffusion import VariancePreserving
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.pretrain.sizes import NANO, ModelSize
from twostep.pretrain.tokenizer import build_tokenizer
from twostep.text.clip import TextEncoders

TEST_CORPUS = (
    "a an on flat 3d noto twemoji red green blue white apple fox bird background picture , in style"
)
"""Words that a model with random weights knows."""


def build_vae(size: ModelSize) -> AutoencoderTiny:
    """Return an autoencoder between pictures in -1..1 and latents of about unit variance."""
    return AutoencoderTiny(
        encoder_block_out_channels=size.vae_channels,
        decoder_block_out_channels=size.vae_channels,
        num_encoder_blocks=size.encoder_blocks,
        num_decoder_blocks=size.decoder_blocks,
        latent_channels=size.latent_channels,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet(size: ModelSize) -> UNet2DConditionModel:
    """Return a UNet of SDXL's blocks, with its added conditioning on sizes and pooled text."""
    num_lower = len(size.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=size.latent_pixels,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * num_lower),
        up_block_types=(*("CrossAttnUpBlock2D",) * num_lower, "UpBlock2D"),
        block_out_channels=size.unet_channels,
        layers_per_block=size.unet_layers,
        transformer_layers_per_block=size.transformer_layers,
        attention_head_dim=size.unet_heads,  # diffusers' name; it counts heads
        cross_attention_dim=sum(size.text_widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_id_width,
        # The pooled text of the second encoder, and six numbers: SDXL's micro-conditioning.
        projection_class_embeddings_input_dim=size.text_widths[1] + 6 * size.time_id_width,
        norm_num_groups=size.norm_groups,
    )


def build_text_encoders(size: ModelSize, corpus: Sequence[str]) -> TextEncoders:
    """Return text encoders over a vocabulary in which every word of the corpus is one token."""
    first = build_tokenizer(corpus, size.max_tokens)
    second = build_tokenizer(corpus, size.max_tokens)
    encoders = (
        CLIPTextModel(_text_config(size, 0, first)),
        CLIPTextModelWithProjection(_text_config(size, 1, second)),
    )
    return TextEncoders((first, second), encoders)


def teacher_contract(
    size: ModelSize, *, name: str, recipe: str, version: str, guidance: float
) -> Contract:
    """Return the contract of a teacher of this size: 32 steps, eps prediction, with guidance."""
    return Contract(
        name=name,
        role="teacher",
        steps=32,
        trained_times=(),
        prediction_type="eps",
        spacing="trailing",
        guidance=guidance,
        sizes=((size.pixels, size.pixels),),
        base=name,
        lora_rank=None,
        lora_alpha=None,
        recipe=recipe,
        version=version,
    )


def random_bundle(
    seed: int = 0, corpus: Sequence[str] = (TEST_CORPUS,), *, size: ModelSize = NANO
) -> Bundle:
    """Return a teacher with random weights, for tests.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(size)
        vae = build_vae(size)
        text = build_text_encoders(size, corpus)
    for network in (unet, vae, *text.encoders):
        network.requires_grad_(False).eval()
    denoiser = Denoiser(SdxlUnet(unet), VariancePreserving.scaled_linear())
    contract = teacher_contract(size, name="random", recipe="none", version="none", guidance=4.0)
    return Bundle(denoiser, ImageCodec(vae), text, contract)


def _text_config(size: ModelSize, number: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return the configuration of the first (0) or the second (1) text encoder."""
    width = size.text_widths[number]
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=size.text_layers[number],
        num_attention_heads=size.text_heads,
        max_position_embeddings=size.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
