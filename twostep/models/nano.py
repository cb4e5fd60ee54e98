"""Nano SDXL: the real classes of SDXL at a size that trains and draws on a laptop's CPU.

64x64 pictures, latents of 4 channels on a 16x16 grid, two CLIP text encoders, a UNet of 7.3 million parameters.
Compared with SDXL: one layer a block instead of two, one transformer instead of two and ten, a vocabulary of its own,
and the tiny autoencoder class (without norms it learns faster and draws in milliseconds).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.contract import Contract
from twostep.diffusion import NoiseSchedule
from twostep.models.bundle import Bundle
from twostep.models.codec import ImageCodec
from twostep.models.denoiser import Denoiser
from twostep.models.text import TextEncoders

PIXELS = 64
LATENT_CHANNELS = 4
LATENT_PIXELS = 16
MAX_TOKENS = 20
TEXT_WIDTHS = (64, 96)
TEXT_LAYERS = (2, 3)
TIME_ID_WIDTH = 16
TEST_CORPUS = "a an on flat 3d noto twemoji red green blue white apple fox bird background picture , in style"
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderTiny:
    """Return the autoencoder: 64x64x3 in -1..1 <-> 16x16x4."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 1, 3),
        num_decoder_blocks=(3, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the UNet: SDXL's blocks at three resolutions, with its added conditioning."""
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 3, 5),  # diffusers' name; it counts heads
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
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer = pattern.backend_tokenizer.normalizer
    trained.pre_tokenizer = pattern.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=20_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    # Twice, because a pair must be seen more than once to be merged.
    trained.train_from_iterator([*corpus, *corpus], trainer)
    merges = _merges(trained)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def teacher_contract(name: str, recipe: str, version: str, guidance: float) -> Contract:
    """Return what a nano teacher says of itself: 32 steps, eps, with guidance."""
    return Contract(
        name=name,
        role="teacher",
        steps=32,
        trained_times=(),
        prediction_type="eps",
        spacing="trailing",
        guidance=guidance,
        sizes=((PIXELS, PIXELS),),
        base=name,
        lora_rank=None,
        lora_alpha=None,
        recipe=recipe,
        version=version,
    )


def random_bundle(seed: int = 0, corpus: Sequence[str] = (TEST_CORPUS,)) -> Bundle:
    """Return a nano teacher with random weights, for tests; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, text = build_unet(), build_vae(), build_text_encoders(corpus)
    for network in (unet, vae, *text.encoders):
        network.requires_grad_(False).eval()
    contract = teacher_contract("random", "none", "none", guidance=4.0)
    return Bundle(Denoiser(unet, NoiseSchedule.scaled_linear()), ImageCodec(vae), text, contract)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
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
