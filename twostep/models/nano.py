"""Nano SDXL: the real classes of SDXL at a size that trains and draws on a laptop's CPU.

64x64 pictures, latents of 16 channels on an 8x8 grid, two CLIP text encoders, a UNet of some six million parameters.
Compared with SDXL it has two resolutions instead of three, one layer a block instead of two, and a vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.models.text import TextEncoders

PIXELS = 64
LATENT_CHANNELS = 16
LATENT_PIXELS = 8
MAX_TOKENS = 20
TEXT_WIDTHS = (64, 96)
TEXT_LAYERS = (2, 3)
TIME_ID_WIDTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """Return the autoencoder: 64x64x3 in -1..1 <-> 8x8x16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the UNet: SDXL's blocks and its added conditioning, with two resolutions instead of three."""
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(112, 144),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(4, 4),  # diffusers' name; it counts heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_ID_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoders(corpus: Sequence[str]) -> TextEncoders:
    """Return untrained text encoders over a vocabulary in which every word of the corpus is one token."""
    tokenizers = (build_tokenizer(corpus), build_tokenizer(corpus))
    first, second = (
        _text_config(tokenizers[0], width, layers) for width, layers in zip(TEXT_WIDTHS, TEXT_LAYERS, strict=True)
    )
    return TextEncoders(tokenizers, (CLIPTextModel(first), CLIPTextModelWithProjection(second)))


def build_tokenizer(corpus: Sequence[str]) -> CLIPTokenizer:
    """Train a CLIP tokenizer: bytes, bytes that end a word, and the merges that make whole words of the corpus."""
    pattern = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = pattern.backend_tokenizer.normalizer
    trained.pre_tokenizer = pattern.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=20_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    # Twice, because a pair must be seen more than once to be merged.
    trained.train_from_iterator([*corpus, *corpus], trainer)
    merges = [tuple(merge) for merge in _merges(trained)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
